"""What a module gave is kept and given again, or what is made of it."""
import torch
from families import FAMILIES

from methods._core.cache import Reuse
from methods._core.patch import Patch


class Doubled(Reuse):
    """Keeps a copy twice as large, and gives a half of it."""

    def store(self, slot, out):
        slot.keep(2 * out)
        return out

    def give(self, slot):
        return slot.get() / 2


def test_something_else_than_the_output_can_be_kept():
    """In forward chunking a module is called several times within one step: each has its own."""
    outs, kept = [], []
    for made in (Reuse, Doubled):
        pipe = FAMILIES["dit"].pipe()
        pipe.transformer.transformer_blocks[1].set_chunk_feed_forward(2, 1)
        patch = Patch(pipe, "made")
        reuses = [made(patch.slot) for _ in patch.denoiser.blocks]
        for block, reuse in zip(patch.denoiser.blocks, reuses, strict=True):
            patch.around(block.ff, reuse.around)

        def decide(context, reuses=reuses):
            for reuse in reuses:
                reuse.reuse = reuse.ready and context.i % 2 == 1

        patch.each_call(decide)
        with patch.on():
            outs.append(FAMILIES["dit"].run(pipe, steps=4))
            kept.append([slot.value for reuse in reuses for slot in reuse.slots])
    assert torch.equal(*outs) and not torch.equal(outs[0], FAMILIES["dit"].run(FAMILIES["dit"].pipe(), steps=4))
    assert len(kept[0]) > len(reuses) and all(torch.equal(2 * a, b) for a, b in zip(*kept, strict=True))
