"""Parts of a tensor and how they come together, with the exchange acted out in one process; tests/contracts/parallel.py starts
real ones."""
import pytest
import torch
import torch.distributed as dist

from methods._core.processes import Processes


@pytest.fixture
def three(monkeypatch):
    """Three processes, and what each puts into an exchange."""
    found = []
    for rank in range(3):
        each = Processes(None, "a_method")
        each.alone, each.size, each.rank = False, 3, rank
        found.append(each)
    put: list[torch.Tensor] = []

    def all_gather(parts, mine, group=None):
        put.append(mine.clone())
        for part, given in zip(parts, put[-3:], strict=False):
            part.copy_(given)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    return found


def test_alone_everything_is_ones_own():
    alone, x = Processes(None, "a_method"), torch.arange(6.0).view(2, 3)
    assert (alone.alone, alone.size, alone.rank) == (True, 1, 0)
    assert torch.equal(alone.part(x, 1), x) and torch.equal(alone.gather(x, 1, 3), x) and alone.sent == 0


@pytest.mark.parametrize("length", [3, 4, 5, 7, 2])
def test_parts_of_any_length_come_together(three, length):
    x = torch.randn(2, length, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [each.part(x, 1) for each in three]
    sizes = [part.shape[1] for part in parts]
    assert sum(sizes) == length and max(sizes) - min(sizes) <= 1
    whole = [each.gather(part, 1, length) for each, part in zip(three, parts, strict=True)][-1]   # the last has heard all
    assert torch.equal(whole, x)
    padded = -(-length // 3)
    assert [each.sent for each in three] == [2 * padded * 4 * 8 * 2] * 3                          # to each of two others


def test_a_lost_process_is_one_error_with_the_methods_name(three, monkeypatch):
    def lost(*_, **__):
        raise RuntimeError("[pair.cc:1] Connection closed by peer\nand more lines")

    monkeypatch.setattr(dist, "all_gather", lost)
    with pytest.raises(RuntimeError) as caught:
        three[1].gather(torch.ones(1, 2), 1, 6)
    assert str(caught.value) == ("a_method: process 1 of 3 waits for another one that has ended or does not answer; start all "
                                 "of them again ([pair.cc:1] Connection closed by peer)")
    assert caught.value.__cause__ is None and three[1].sent == 0


@pytest.fixture
def exchanging(three, monkeypatch):
    """Three processes whose every exchange is called twice by all: first to hear what each gives, then to get it."""
    put: list[torch.Tensor] = []

    def all_to_all_single(out, mine, group=None):
        rank, heard = len(put) % 3, put[-(len(put) % 3) - 3:]
        put.append(mine.clone())
        if len(put) > 3:
            out.copy_(torch.stack([each[rank] for each in heard[:3]]))

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)

    def switched(parts, *setting):
        put.clear()
        for each, part in zip(three, parts, strict=True):
            each.switch(part, *setting)
        return [each.switch(part, *setting) for each, part in zip(three, parts, strict=True)]
    return three, switched


@pytest.mark.parametrize("frames, places", [(3, 6), (5, 7), (1, 4), (2, 3)])
def test_a_switch_exchanges_which_dimension_is_cut(exchanging, frames, places):
    (one, *_), switched = exchanging
    x = torch.randn(frames, places, 4, generator=torch.Generator().manual_seed(0))
    cut = one.padded(x, 1).chunk(3, 1)                              # places cut, frames whole
    turned = switched(cut, 0, 1, places)
    padded = one.padded(x, 0)
    assert all(torch.equal(mine, part) for mine, part in zip(turned, padded.chunk(3, 0), strict=True))
    assert one.sent == 2 * one.padded(padded, 1).numel() // 3 * 2 // 3 * 4          # (M / N) (N - 1) / N, called twice
    back = switched(turned, 1, 0, frames)
    assert all(torch.equal(mine, part) for mine, part in zip(back, cut, strict=True))
