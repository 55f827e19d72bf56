"""Makes a tool act on the tree it lies in, whichever checkout the interpreter that runs it has installed.

`python tools/x.py` looks for `accel_tools` in its own folder first and finds this file, which becomes the package of that
folder and makes `methods` and `accel_kernels` those of the same tree.
"""
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
__path__ = [str(TOOLS)]


class _Tree:
    """Finds the packages beside the folder `tools` of a checkout."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name == "methods":
            return PathFinder.find_spec(name, [str(TOOLS.parent)])
        if name == "accel_kernels":
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(TOOLS.parent / "kernels")]
            return spec
        return None


if TOOLS.name == "tools":                     # installed, the three lie together already
    sys.meta_path.insert(0, _Tree())
