"""What is kept from step to step, and the arounds that give it again."""
import pytest
import torch
from families import FAMILIES, FIRST, Family

from methods._core.cache import Delta, Passed, Slot, chains
from methods._core.context import Rewrite
from methods._core.denoiser import describe
from methods._core.patch import Patch
from methods._core.site import Claim

CHAINED = [family for name in FIRST if not describe(Family.model((family := FAMILIES[name]).pipe())).unet]


def call(model):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return model(x, torch.tensor([10, 10]), torch.tensor([3, 4])).sample


def spanning(pipe, first, last):
    """A patch that runs blocks `first` to `last` in every second step and adds their delta in the others."""
    patch = Patch(pipe, "spanning")
    patch.deltas = [Delta(patch.slot(), chain) for chain in chains(patch.denoiser.blocks[first:last + 1])]
    for delta in patch.deltas:
        for module, around in delta.arounds():
            patch.around(module, around)

    def decide(context):
        for delta in patch.deltas:
            delta.reuse = delta.ready and context.i % 2 > 0

    patch.each_call(decide)
    return patch.on()


def met(modules):
    """How often the norm of each block really runs, below whatever patches it carries."""
    calls = [0] * len(modules)
    for i, module in enumerate(modules):
        module.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    return calls


@pytest.mark.parametrize("family", CHAINED, ids=lambda family: family.name)
def test_a_span_runs_where_its_delta_is_not_added(family):
    pipe = family.pipe()
    blocks = describe(Family.model(pipe)).blocks
    calls = met([block.norm for block in blocks])
    with spanning(pipe, 1, len(blocks) - 2):
        out = family.run(pipe, steps=5)
    assert calls == [5, *[3] * (len(blocks) - 2), 5]
    assert not torch.equal(out, family.run(family.pipe(), steps=5))


@pytest.mark.parametrize("family", CHAINED, ids=lambda family: family.name)
@pytest.mark.parametrize("first, last", [(0, -1), (0, 0), (1, -1), (0, 1)])
def test_the_same_call_again_gives_the_same(family, first, last):
    """With unchanged inputs a delta is exact, in every layout and with both streams."""
    pipe, seen, outs = family.pipe(), [], []
    model = Family.model(pipe)
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    family.run(pipe, steps=1)
    handle.remove()
    args, kwargs = seen[0]
    with spanning(model, first, last % len(describe(model).blocks)) as patch:
        for _ in range(2):
            outs.append(model(*args, **kwargs | {"return_dict": False})[0])
        assert all(delta.reuse for delta in patch.deltas)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-4, rtol=1e-4)


def test_a_delta_is_what_was_added_and_not_what_came_out():
    """Blocks that take 3 to 5 keep 2: where 3.5 comes next, 5.5 comes out."""
    model = FAMILIES["dit"].pipe().transformer
    patch, entered, left = Patch(model, "toy"), [], []
    delta = Delta(patch.slot(), patch.denoiser.blocks)
    steps = {3.0: 3.5, 3.5: 4.25, 4.25: 5.0}

    def block(x, **_):
        entered.append(float(x[0, 0, 0]))
        return torch.full_like(x, steps[entered[-1]])

    for module, around in delta.arounds():
        patch.around(module, around)
    for each in patch.denoiser.blocks:
        each.module.forward = block
    model.norm_out.register_forward_pre_hook(lambda m, args: left.append(float(args[0][0, 0, 0])))
    patch.each_call(lambda context: setattr(delta, "reuse", delta.ready))
    with patch.on():
        for start in (3.0, 3.5):
            model.pos_embed.forward = lambda x, start=start: torch.full((1, 4, 32), start)
            model(torch.zeros(1, 4, 4, 4), torch.tensor([10]), torch.tensor([3]))
    assert entered == [3.0, 3.5, 4.25] and left == [5.0, 5.5]


@pytest.mark.parametrize("layer, reused", [(0, {(0,)}), (1, {(0,), (1,)}), (2, {(0,)})])
def test_no_delta_is_kept_of_a_call_that_passes_over_an_end_of_the_span(layer, reused):
    family, seen = FAMILIES["sd3"], []
    pipe = family.pipe()
    with spanning(pipe, 0, 2) as patch:
        patch.each_call(lambda context: seen.append((context.branch, patch.deltas[0].reuse)))
        out = family.run(pipe, skip_guidance_layers=[layer], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    assert out.isfinite().all() and {branch for branch, _ in seen} == {(0,), (1,)}
    assert {branch for branch, reuse in seen if reuse} == reused


def test_blocks_are_chained_where_tokens_stay_as_they_lie():
    found = {family.name: chains(describe(Family.model(family.pipe())).blocks) for family in CHAINED}
    assert {name: list(map(len, chain)) for name, chain in found.items()} == {
        "dit": [3], "pixart": [3], "sd3": [3], "flux": [4], "latte": [1] * 4, "cogvideox": [3]}


def test_another_span_may_be_chosen_for_each_call():
    """What was kept of one span is never added in place of another."""
    model = FAMILIES["dit"].pipe().transformer
    patch = Patch(model, "choosing")
    delta, spans, ran = Delta(patch.slot(), patch.denoiser.blocks), iter([range(2), range(2), range(1, 3), range(1, 3)]), []
    ready = []
    for module, around in delta.arounds():
        patch.around(module, around)
    for block in patch.denoiser.blocks:
        block.norm.register_forward_hook(lambda *_, i=block.index: ran.append(i))

    def decide(context):
        delta.choose(next(spans))
        delta.reuse = delta.ready and context.i % 2 > 0
        ready.append(delta.ready)

    patch.each_call(decide)
    with patch.on():
        outs = [call(model) for _ in range(4)]
    assert ready == [False, True, False, True]                     # a call that computes forgets before it begins
    assert ran == [0, 1, 2, 2, 0, 1, 2, 0] and delta.blocks == list(patch.denoiser.blocks[1:])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-4, rtol=1e-4)


def test_a_delta_may_be_kept_in_half_precision():
    pipe = FAMILIES["sd3"].pipe()
    with spanning(pipe, 0, 1) as patch:
        FAMILIES["sd3"].run(pipe)
        whole = patch.report()["cached_bytes"]
        patch.limit(dtype=torch.bfloat16)
        assert FAMILIES["sd3"].run(pipe).isfinite().all() and patch.report()["cached_bytes"] == whole / 2 > 0


def halving(pipe, start, part="null", **limit):
    """A patch that keeps what one attention gives, reads it in every step, and from step `start` on runs one part of guidance,
    which begins with its rows of what is kept of all."""
    patch = Patch(pipe, "halving")
    slot, patch.found = patch.slot(), []
    block = patch.denoiser.blocks[0]
    patch.around(block.attn, lambda forward, *args, **kwargs: slot.keep(forward(*args, **kwargs)))

    def halve(context):
        if context.i < start or not context.guided:
            return None
        half = context.only(part)
        if half.fresh and slot.value is not None:
            slot.hand(half.branch, context.rows.take(slot.get(), part))
        return Rewrite((half,), lambda out: torch.cat([out] * 2))

    patch.rewrite(halve, Claim.GUIDANCE)
    patch.each_call(lambda context: patch.found.append(slot.get() if slot.value is not None else None))
    return patch.limit(**limit).on()


@pytest.mark.parametrize("part", ["null", "cond"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_branch_may_begin_with_what_is_kept_of_another(part, dtype):
    pipe, gave = FAMILIES["pixart"].pipe(), []
    describe(pipe.transformer).blocks[0].attn.register_forward_hook(lambda m, args, out: gave.append(out))
    with halving(pipe, 2, part, dtype=dtype) as patch:
        for _ in range(2):                                         # a second run begins with nothing again
            gave.clear()
            patch.found.clear()
            FAMILIES["pixart"].run(pipe, steps=4)
            null, cond = gave[1].chunk(2)
            expected = [None, gave[0], null if part == "null" else cond, gave[2]]
            assert patch.found[0] is None and [len(x) for x in patch.found[1:]] == [2, 1, 1]
            for found, x in zip(patch.found[1:], expected[1:], strict=True):
                assert torch.equal(found, x if dtype is None else x.to(dtype).to(x.dtype)) and found.dtype == x.dtype


def test_what_is_handed_counts_and_is_dropped_with_the_rest():
    slot = Slot()
    slot.select((0,), stale=True)
    slot.keep(torch.ones(2, 3))
    slot.hand((0, "null"), torch.ones(1, 3))
    assert sum(x.numel() for x in slot.tensors()) == 9 and slot.of((0, "null")) is None
    slot.select((0, "null"), stale=True)
    assert torch.equal(slot.get(), torch.ones(1, 3)) and torch.equal(slot.of((0,)), torch.ones(2, 3))
    slot.hand((0, "null"), torch.zeros(1, 3))                      # in place of what it has
    slot.select((0, "null"), stale=False)
    assert torch.equal(slot.get(), torch.zeros(1, 3))
    slot.select((0, "null"), stale=True)
    assert slot.value is None
    slot.hand((1,), torch.ones(1))
    slot.clear()
    slot.select((1,), stale=True)
    assert slot.value is None and not list(slot.tensors())


@pytest.mark.parametrize("family", CHAINED, ids=lambda family: family.name)
def test_blocks_that_are_passed_over_give_what_came(family):
    pipe = family.pipe()
    patch, blocks = Patch(pipe, "passing"), describe(Family.model(pipe)).blocks
    passed = [Passed(block) for block in blocks[1:]]
    for each in passed:
        patch.around(each.block.module, each.around)
        each.over = True
    calls = met([block.norm for block in blocks])
    with patch.on():
        out = family.run(pipe, steps=3)
    assert calls == [3, *[0] * (len(blocks) - 1)] and out.isfinite().all()
