import pytest
from contracts import patch as contract

from methods import toy_patch


@pytest.mark.parametrize(
    "check, case", contract.cases(toy_patch, toy_patch.Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


def test_worked_by_hand():
    assert [toy_patch.computes(i, 3) for i in range(4)] == [True, False, False, True]
