"""Templates made to text, and text put into files."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import jinja2

TEMPLATES = Path(__file__).parents[1] / "templates"


def environment(folder: str = "", autoescape: bool = False, **filters: Callable) -> jinja2.Environment:
    """The templates of tools/templates, or of a folder there; a name that is not given is an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES / folder), autoescape=autoescape,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )
    env.filters |= filters
    return env


def write(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
