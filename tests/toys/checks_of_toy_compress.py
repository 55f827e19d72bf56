import pytest
import torch
from contracts import compress

from methods import toy_compress


@pytest.mark.parametrize("check, case", compress.cases(toy_compress), ids=compress.name)
def test_contract(check, case):
    check(case)


def test_worked_by_hand():
    assert toy_compress.kept(torch.tensor([[1.0, 0.0], [3.0, 4.0], [2.0, 0.0]]), 1 / 3).tolist() == [1, 2]
