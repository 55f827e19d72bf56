import pytest
import torch
from contracts import module

from methods import toy_module

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def run(model, random):
    return {"back": model(X.to(model.wide.weight.dtype), random)}


def loss(model, stage, random):
    return toy_module.loss(model, stage, X, random)


@pytest.mark.parametrize("check, case", module.cases(toy_module, module.Work(run, {"back": (6, 4)}, loss, ({"inside": 0},))),
                         ids=module.name)
def test_contract(check, case):
    check(case)


def test_worked_by_hand():
    model = toy_module.build(toy_module.TINY)
    for weight in model.parameters():
        weight.data.zero_()
    assert float(toy_module.loss(model, "all", torch.full((1, 4), 2.0), torch.Generator())) == 4
