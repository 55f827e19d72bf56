"""Who may stand on a module together, and in what order."""
import copy
import itertools
import pickle

import pytest
import torch
from families import FAMILIES
from torch import nn

from methods._core.patch import Patch
from methods._core.site import Claim, attach, conflict, detach


def passing(forward, *args, **kwargs):
    return forward(*args, **kwargs)


@pytest.mark.parametrize("mine, theirs, reason", [
    (Claim.OUTPUT, Claim.OUTPUT, "both cache the output of"), (Claim.TOKENS, Claim.TOKENS, "both reduce the tokens of"),
    (Claim.INSIDE, Claim.INSIDE, "both change the attention of"), (Claim.TOKENS, Claim.INSIDE, "both change the attention of"),
    (Claim.OUTPUT, Claim.TOKENS, None), (Claim.OUTPUT, Claim.INSIDE, None), (Claim.CALL, Claim.CALL, None),
    (Claim.CROP, Claim.SKIP, None), (Claim.CROP, Claim.CROP, "both cut the frame"),
    (Claim.SOLVER, Claim.SOLVER, "both replace the steps of the solver")])
def test_claims_that_do_not_stand_together(mine, theirs, reason):
    assert conflict(mine, "a", theirs, "b") == conflict(theirs, "a", mine, "b") == reason


def test_who_claims_the_whole_is_named_and_who_looks_is_in_nobodys_way():
    for claim in Claim:
        assert conflict(Claim.LOOK, "a", claim, "b") is conflict(claim, "a", Claim.LOOK, "b") is None
        if claim != Claim.LOOK:
            assert conflict(Claim.WHOLE, "a", claim, "b") == "a leaves room for nobody else in"
            assert claim == Claim.WHOLE or conflict(claim, "a", Claim.WHOLE, "b") == "b leaves room for nobody else in"


@pytest.mark.parametrize("order", itertools.permutations((Claim.OUTPUT, Claim.TOKENS, Claim.LOOK)))
def test_arounds_stand_in_the_order_of_their_claims(order):
    module, seen = nn.Linear(2, 2), []

    def note(claim):
        def around(forward, x):
            seen.append(claim)
            return forward(x)
        return around

    for claim in order:
        attach(module, claim, claim, note(claim))
    module(torch.ones(1, 2))
    assert seen == [Claim.OUTPUT, Claim.TOKENS, Claim.LOOK]
    for claim in order:
        detach(module, claim)
    assert not {"forward", "_patch_site"} & set(vars(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_patched_model_is_not_copied_and_one_that_was_patched_is(duplicate):
    model = FAMILIES["dit"].pipe().transformer
    attn = model.transformer_blocks[0].attn1
    patch = Patch(model, "ours")
    patch.around(attn, passing)
    with patch.on():
        for part in (model, attn):
            with pytest.raises(RuntimeError, match=r"cannot be copied or pickled: .*; remove the patches"):
                duplicate(part)
        theirs = attn.forward                                   # another library holds our forward inside its own
        attn.forward = lambda *args, **kwargs: theirs(*args, **kwargs)
    twin = copy.deepcopy(attn)
    assert torch.equal(twin.to_q.weight, attn.to_q.weight) and twin.to_q is not attn.to_q
    del attn.forward
    assert duplicate(model).transformer_blocks[0].attn1 is not attn
