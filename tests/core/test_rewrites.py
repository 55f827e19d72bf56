"""A call that is changed for everybody: half of its batch, none, two in its place."""
import importlib
import os

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from methods._core.context import Rewrite, Rows, given
from methods._core.patch import Patch
from methods._core.site import Claim, conflict

STEPS = 6


def halving(pipe, k):
    """As T-GATE does: from step k on the conditional half alone, with no guidance left."""
    patch = Patch(pipe, "halving")

    def gate(context):
        if context.i < k or not context.guided:
            return None
        patch.counts["halved"] += 1
        patch.tally(1, 2)
        return Rewrite((context.only("cond"),), lambda cond: torch.cat([cond] * 2))

    patch.rewrite(gate, Claim.GUIDANCE)
    return patch.on()


def guides(method, family):
    """Whether the method itself decides which branches of guidance run, and so cannot stack with the halving."""
    with method.apply(contract.untouched(family.name), contract.engaging(method)) as patch:
        return any(conflict(claim, "", Claim.GUIDANCE, "") for claim, _ in patch.rewrites)


GUIDED = [(method, family, k) for method in contract.patches() for family in contract.working(method) for k in (1, 3, 5)
          if family.name != "flux" and not guides(method, family)
          and (k == 3 or family.name in contract.ARCHETYPES or "EVERYTHING" in os.environ)]


@pytest.mark.slow
@pytest.mark.parametrize("method, family, k", GUIDED, ids=lambda v: getattr(v, "name", None) or getattr(v, "__name__", None))
def test_every_patch_sees_the_call_as_it_is_made(method, family, k):
    setting, outs = {"steps": STEPS} | contract.several(method), []
    plain = contract.plain(family.name, **setting)
    for first in (0, 1):
        pipe = family.pipe()
        put = [lambda pipe: method.apply(pipe, contract.engaging(method)), lambda pipe: halving(pipe, k)]
        a, b = put[first](pipe), put[1 - first](pipe)
        outs.append(family.run(pipe, **setting))
        assert torch.equal(family.run(pipe, **setting), outs[-1])
        evaluations = (a if first == 0 else b).counts["evaluations"] or STEPS                 # a solver takes fewer steps
        assert (b if first == 0 else a).counts["halved"] == max(0, evaluations - k)
        a.remove()
        b.remove()
        assert torch.equal(family.run(pipe, **setting), plain)
    assert torch.equal(*outs) and outs[0].isfinite().all() and not torch.equal(outs[0], plain)


@pytest.mark.parametrize("name", ["unet", "dit", "sd3"])
def test_the_half_is_the_conditional_one(name):
    """Without guidance a pipeline gives what its guided run gives when both halves are the conditional one."""
    family = FAMILIES[name]
    pipe = family.pipe()
    with halving(pipe, 0):
        torch.testing.assert_close(family.run(pipe), family.run(family.pipe(), guidance=1.0), atol=1e-4, rtol=1e-4)


def test_none_and_two_in_place_of_a_call():
    """An output kept from one step is given in the next; a frame and its twin are two branches of their own."""
    family, seen, last = FAMILIES["sd3"], [], {}
    pipe = family.pipe()
    skip, both, watch = Patch(pipe, "skip"), Patch(pipe, "both"), Patch(pipe, "watch")
    skip.rewrite(lambda context: given(last["out"]) if context.i == 2 else None, Claim.SKIP)
    skip.after_call(lambda context, out: last.update(out=out))
    both.rewrite(lambda context: Rewrite((context.replace({}, branch="a"), context.replace({}, branch="b")), torch.maximum)
                 if context.i == 1 else None, Claim.CROP)
    watch.each_call(lambda context: seen.append((context.i, context.branch, context.fresh)))
    with skip.on(), both.on(), watch.on():
        family.run(pipe, steps=4)
    assert seen == [(0, (0,), True), (1, (0, "a"), True), (1, (0, "b"), True), (3, (0,), False)]


def test_rewrites_are_asked_in_the_order_of_their_claims():
    pipe, asked = FAMILIES["sd3"].pipe(), []
    patches = [Patch(pipe, claim.name) for claim in (Claim.SKIP, Claim.SOLVER, Claim.CROP, Claim.GUIDANCE)]
    for patch in patches:
        patch.rewrite(lambda context, patch=patch: asked.append(patch.name), Claim[patch.name])
        patch.on()
    FAMILIES["sd3"].run(pipe, steps=1)
    assert asked == ["SOLVER", "GUIDANCE", "CROP", "SKIP"]
    with pytest.raises(ValueError, match="both cut the frame"):
        other = Patch(pipe, "other")
        other.rewrite(lambda context: None, Claim.CROP)
        other.on()
    for patch in patches:
        patch.remove()


def test_equal_noise_is_no_guidance():
    """Two prompts from one seed, without guidance, are two images: what each gives alone they give together."""
    rows = []
    for name in ("unet", "pixart", "sd3"):
        family = FAMILIES[name]
        pipe = family.pipe()
        patch = Patch(pipe, "watch")
        patch.each_call(lambda context: rows.append(context.rows))
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        with patch.on():
            family.run(pipe, batch=2, guidance=1.0, generator=generators)
    assert set(rows) == {Rows(("cond",), 2)}


def test_rows_take_what_belongs_to_a_part():
    rows = Rows(("null", "cond", "perturbed"), 2)
    x = torch.arange(6)
    taken = rows.take({"a": x, "b": [x.view(6, 1), None], "c": torch.arange(5), "d": 3}, "cond")
    assert taken["a"].tolist() == [2, 3] and taken["b"][0].flatten().tolist() == [2, 3] and taken["b"][1] is None
    assert len(taken["c"]) == 5 and taken["d"] == 3 and rows.guided
    with pytest.raises(ValueError):
        Rows(("cond",), 2).of("null")


def test_perturbed_attention_guidance_has_a_part_of_its_own():
    from diffusers import StableDiffusionPAGPipeline
    family, rows = FAMILIES["unet"], []
    pipe = StableDiffusionPAGPipeline(**family.pipe().components, requires_safety_checker=False, pag_applied_layers="mid")
    pipe.set_progress_bar_config(disable=True)
    patch = Patch(pipe, "watch")
    patch.each_call(lambda context: rows.append(context.rows))
    with patch.on():
        for pag, guidance in ((3.0, 3.0), (3.0, 1.0), (0.0, 3.0)):
            family.run(pipe, steps=1, pag_scale=pag, guidance=guidance)
    assert [each.parts for each in rows] == [("null", "cond", "perturbed"), ("cond", "perturbed"), ("null", "cond")]


SKIPPING = dict(skip_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("slug", [contract.slug(m) for m in contract.patches()
                                  if any(family.name == "sd3" for family in contract.working(m))])
def test_an_extra_call_with_layers_skipped_is_served(slug):
    method, family = importlib.import_module(f"methods.{slug}"), FAMILIES["sd3"]
    pipe, setting = family.pipe(), SKIPPING | contract.several(method)
    plain = family.run(pipe, steps=STEPS, **setting)
    with method.apply(pipe, contract.engaging(method)) as patch:
        out = family.run(pipe, steps=STEPS, **setting)
        assert patch.report()["state"] == "engaged" and out.isfinite().all() and not torch.equal(out, plain)
        assert torch.equal(family.run(pipe, steps=STEPS, **setting), out)
    assert torch.equal(family.run(pipe, steps=STEPS, **setting), plain)
    assert Family.model(pipe) is pipe.transformer
