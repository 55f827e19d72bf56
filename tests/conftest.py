import os
import warnings

import torch

os.environ.setdefault("TRITON_INTERPRET", "1")          # before anything imports triton: kernels run on the CPU here

warnings.filterwarnings("ignore", message=".*should be kept in float32.*")
torch.set_num_threads(1)          # tests run in parallel processes


def pytest_addoption(parser):
    parser.addoption("--update", action="store_true", help="write golden files anew instead of comparing with them")
