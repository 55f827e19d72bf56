import pytest
from contracts import training

from methods import dydit


@pytest.mark.parametrize("check, case", training.cases(dydit), ids=training.name)
def test_contract(check, case):
    check(case)
