import pytest
from contracts import parallel

from methods import toy_parallel


@pytest.mark.parametrize("check, case", parallel.cases(toy_parallel), ids=parallel.name)
def test_contract(check, case):
    check(case)


def test_worked_by_hand():
    assert toy_parallel.Config() == toy_parallel.Config()
