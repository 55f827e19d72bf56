import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from methods import ca_tome, tome
from methods._core.cache import Slot
from methods._core.denoiser import describe
from methods._core.tokens import match_plan


@pytest.mark.parametrize("check, case", contract.cases(ca_tome, ca_tome.Config(threshold=0.0, checkpoints=(3,))),
                         ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("threshold, r", [(0.7, 2), (0.9, 1), (-1.0, 3)])
def test_threshold_on_the_worked_example(threshold, r):
    score = torch.tensor([[1.0, 0.0, 0.70711]])                            # three sources of a 2 x 2 grid
    assert ca_tome.adaptive_reduction(score, threshold) == r


def test_the_sample_with_most_pairs_decides_for_all():
    score = torch.tensor([[0.9, 0.8, 0.75, 0.1], [0.9, 0.2, 0.1, 0.0]])
    assert ca_tome.adaptive_reduction(score, 0.7) == 3


def test_r_does_not_grow_with_the_threshold():
    score = torch.rand(3, 50) * 2 - 1
    found = [ca_tome.adaptive_reduction(score, t) for t in torch.linspace(-1, 1, 21).tolist()]
    assert found == sorted(found, reverse=True) and found[0] == 50


@pytest.mark.parametrize("checkpoints, steps, expected", [
    (ca_tome.CHECKPOINTS["config_3"], 50, [0, 7, 10, 12, 19, 24, 29, 34, 44, 45, 46, 47, 48]),
    (ca_tome.CHECKPOINTS["config_1"], 10, [0, 1, 2, 4, 9]), ((), 5, [0]), (range(1, 6), 5, [0, 1, 2, 3, 4])])
def test_checkpoints_are_counted_from_one(checkpoints, steps, expected):
    assert [i for i in range(steps) if ca_tome.computes(i, checkpoints)] == expected


def first_layer(pipe):
    """The state of the first block that merges, found through what stands around its attention."""
    block = next(block for block in describe(pipe.unet).blocks if hasattr(block.attn, "_patch_site"))
    return block.attn._patch_site.arounds[0][2].__self__


def test_pairs_are_kept_until_the_next_checkpoint_and_forgotten_between_runs():
    family, pipe, seen = FAMILIES["unet"], FAMILIES["unet"].pipe(), []
    with ca_tome.apply(pipe, ca_tome.Config(threshold=0.0, checkpoints=(3,))) as patch:
        layer = first_layer(pipe)
        handle = layer.block.attn.register_forward_pre_hook(lambda *_: seen.append(layer.kept.value), prepend=True)
        family.run(pipe, steps=4)
        assert patch.counts == {"matched": 2 * 5, "reused": 2 * 5}         # five blocks at full resolution
        assert patch.report()["cached_bytes"] == sum(
            t.numel() * 8 for module in pipe.unet.modules() for t in kept(module))
        first, again = layer.kept.value, family.run(pipe, steps=4)
        handle.remove()
    assert seen[0] is None and seen[4] is None                             # before the first matching of either run
    assert seen[1] is seen[2] and seen[3] is first and seen[3] is not seen[2]
    assert not torch.equal(seen[3][0], seen[2][0])
    assert torch.equal(first[0], seen[7][0]) and again.isfinite().all()


def kept(module):
    site = module.__dict__.get("_patch_site")
    layer = next((f.__self__ for _, _, f in site.arounds if isinstance(f.__self__, ca_tome._Layer)), None) if site else None
    return layer.kept.value if layer is not None and layer.block.attn is module else ()


def test_matching_in_every_step_is_tome_with_that_reduction():
    """T = -1 merges all sources, which is ToMe at its largest ratio with the same draws."""
    family, results = FAMILIES["unet"], []
    every = ca_tome.Config(threshold=-1.0, checkpoints=(1, 2, 3, 4))
    for method, config in ((ca_tome, every), (tome, tome.Config(ratio=0.75))):
        pipe = family.pipe()
        with method.apply(pipe, config):
            results.append(family.run(pipe))
    assert torch.equal(*results)


def test_matching_in_every_step_is_tome_cut_at_the_threshold(monkeypatch):
    """The most sources above T in any sample, by the whole cosine matrix, in place of ToMe's ratio."""
    family, results, cuts = FAMILIES["unet"], [], []

    def planned(self, x):
        unit = x / x.norm(dim=-1, keepdim=True)
        score = (unit[:, self.src] @ unit[:, self.dst].mT).amax(-1)
        cuts.append(int((score >= 0.5).sum(1).max()))
        return match_plan(x, self.src, self.dst, cuts[-1])
    monkeypatch.setattr(tome.Matching, "__call__", planned)
    for method, config in ((ca_tome, ca_tome.Config(threshold=0.5, checkpoints=(1, 2, 3, 4))), (tome, tome.Config())):
        pipe = family.pipe()
        with method.apply(pipe, config):
            results.append(family.run(pipe))
    assert torch.equal(*results) and len(set(cuts)) > 1


def test_only_pairs_above_the_threshold_merge_where_the_sample_decides():
    x, src, dst = torch.randn(1, 48, 4), torch.arange(12, 48), torch.arange(12)
    layer = ca_tome._Layer(describe(FAMILIES["unet"].pipe().unet).blocks[0], Slot(), 0.5)
    layer.src, layer.dst = src, dst
    plan = layer.pair(x)
    unit = x[0] / x[0].norm(dim=-1, keepdim=True)
    best = (unit[12:] @ unit[:12].T).max(1)
    for i, (score, into) in enumerate(zip(*best, strict=True), start=12):
        together = plan.segments.source[0, i] == plan.segments.source[0, into]
        assert together == (score >= 0.5)
    layer.anew = False
    assert torch.equal(layer.pair(torch.randn(1, 48, 4)).segments.source, plan.segments.source)


@pytest.mark.parametrize("wrong, named", [({"threshold": 1.2}, "threshold=1.2"), ({"checkpoints": (0, 3)}, "checkpoints="),
                                          ({"stride": 0}, "stride=0"), ({"max_downsample": 3}, "max_downsample=3")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        ca_tome.Config(**wrong)
