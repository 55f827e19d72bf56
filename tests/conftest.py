import os
import warnings

import torch

import accel_tools  # noqa: F401  (tests this tree, whatever the interpreter has installed)

os.environ.setdefault("TRITON_INTERPRET", "1")          # before anything imports triton: kernels run on the CPU here

warnings.filterwarnings("ignore", message=".*should be kept in float32.*")
torch.set_num_threads(1)          # tests run in parallel processes


SLOW = ("test_contract", "core/test_compile.py", "site/test_site.py", "test_compile_kernels.py", "mutat",
        "test_imports_do_without", "test_compatibility.py", "test_pairs.py", "test_examples.py", "test_train", "test_bench",
        "test_pytest.py", "test_no_command")


MANY = ("test_contract", "core/test_compile.py", "core/test_rewrites.py", "core/test_surroundings.py", "test_pairs.py",
        "test_compatibility.py")            # the same lines over and over: tracing them tells nothing more


def pytest_configure(config):
    if config.getoption("--everything"):
        os.environ["EVERYTHING"] = "1"                  # read where tests are collected, and by their processes
    config.addinivalue_line("markers", "no_cover: not traced, where coverage is measured")
    config.addinivalue_line("markers", "slow: runs many pipelines, a browser or a compiler; left out of make test-fast")


def pytest_collection_modifyitems(items):
    for item in items:
        if any(part in item.nodeid for part in SLOW):
            item.add_marker("slow")
        if any(part in item.nodeid for part in MANY):
            item.add_marker("no_cover")


def pytest_addoption(parser):
    parser.addoption("--update", action="store_true", help="write golden files anew instead of comparing with them")
    parser.addoption("--method", metavar="SLUG", help="with --update: write anew only what tells of this method")
    parser.addoption("--everything", action="store_true", help="every check on every family, instead of on some of a kind")
