import os
import warnings
from collections import defaultdict

import pytest
import torch

import accel_tools  # noqa: F401  (tests this tree, whatever the interpreter has installed)

os.environ.setdefault("TRITON_INTERPRET", "1")          # before anything imports triton: kernels run on the CPU here

warnings.filterwarnings("ignore", message=".*should be kept in float32.*")
torch.set_num_threads(1)          # tests run in parallel processes


SLOW = ("test_contract", "compil", "mutat")       # in a test's name: all checks of a method, a compiler, thousands of inputs
LONG = 3.0                                         # seconds of a processor; tests that take more are to be marked slow


MANY = (*SLOW, "core/test_compile.py", "core/test_rewrites.py", "core/test_surroundings.py", "test_families.py",
        "test_pairs.py", "test_compatibility.py", "test_contributing.py")    # the same lines over and over: not traced


def pytest_configure(config):
    if config.getoption("--everything"):
        os.environ["EVERYTHING"] = "1"                  # read where tests are collected, and by their processes
    config.addinivalue_line("markers", "no_cover: not traced, where coverage is measured")
    config.addinivalue_line("markers", f"slow: takes more than {LONG} seconds of a processor; left out of make test-fast")


def pytest_collection_modifyitems(items):
    for item in items:
        if any(part in item.name for part in SLOW) or "compile" in item.path.stem:
            item.add_marker("slow")
        if any(part in item.nodeid for part in MANY):
            item.add_marker("no_cover")


def spent() -> float:
    """Seconds of a processor that this process and those it started and that ended have taken."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    before = spent()
    yield
    if not item.get_closest_marker("slow"):
        item.user_properties.append(("spent", spent() - before))


def pytest_terminal_summary(terminalreporter):
    """Tests that are not marked slow and are: all cases of a function together, in whatever processes they ran."""
    functions = defaultdict(float)
    for report in terminalreporter.getreports("passed"):
        functions[report.nodeid.split("[")[0]] += dict(report.user_properties).get("spent", 0) * (report.when == "call")
    for name, seconds in sorted(functions.items(), key=lambda pair: -pair[1]):
        if seconds > LONG:
            terminalreporter.write_line(f"mark as slow: {name} took {seconds:.1f} s of a processor")


def pytest_addoption(parser):
    parser.addoption("--update", action="store_true", help="write golden files anew instead of comparing with them")
    parser.addoption("--method", metavar="SLUG", help="with --update: write anew only what tells of this method")
    parser.addoption("--everything", action="store_true", help="every check on every family, instead of on some of a kind")
