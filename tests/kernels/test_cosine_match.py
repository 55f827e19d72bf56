import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from accel_kernels.cosine_match import cosine_match

IMPLS = ("reference", "triton")


def dense(x, src, dst):
    unit = F.normalize(x.float(), dim=-1)
    return torch.stack([unit[b, src[b]] @ unit[b, dst[b]].T for b in range(len(x))])


def cut(batch, tokens, sources, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    return order[:, :sources], order[:, sources:]


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl):
    x = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [5.0, 0.0], [0.0, 0.0]]])
    score, index = cosine_match(x, torch.tensor([1, 3, 4]), torch.tensor([2, 0]), impl=impl)
    torch.testing.assert_close(score, torch.tensor([[0.8, 1.0, 0.0]]))
    assert index.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("batch, tokens, sources, channels", ((2, 63, 40, 33), (1, 300, 170, 40), (3, 130, 129, 64)))
def test_triton_agrees_with_the_reference(dtype, batch, tokens, sources, channels):
    torch.manual_seed(1)
    x = torch.randn(batch, tokens, channels).to(dtype)
    src, dst = cut(batch, tokens, sources)
    score, index = cosine_match(x, src, dst, impl="triton")
    expected, _ = cosine_match(x, src, dst, impl="reference")
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense(x, src, dst).gather(2, index[..., None])[..., 0], expected, rtol=1e-5, atol=1e-5)


def test_reference_agrees_with_the_dense_product_over_several_tiles(monkeypatch):
    monkeypatch.setattr("accel_kernels._shapes.TILE", 1500)
    torch.manual_seed(2)
    x = torch.randn(5, 130, 24)
    for sources in (7, 90):  # whole batch elements in a tile, then parts of one
        src, dst = cut(5, 130, sources)
        score, index = cosine_match(x, src, dst)
        expected = dense(x, src, dst)
        torch.testing.assert_close(score, expected.amax(-1))
        assert torch.equal(index, expected.argmax(-1))


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_take_the_lowest_column(impl):
    x = torch.ones(1, 300, 16)  # 280 equal destinations: more than one tile of the kernel
    score, index = cosine_match(x, torch.arange(20), torch.arange(20, 300), impl=impl)
    assert index.count_nonzero() == 0
    torch.testing.assert_close(score, torch.ones(1, 20))


@pytest.mark.parametrize("impl", IMPLS)
def test_shared_positions_strides_and_an_empty_cut(impl):
    x = torch.randn(40, 2, 16).transpose(0, 1)
    src, dst = torch.arange(0, 30), torch.arange(30, 40)
    score, index = cosine_match(x, src, dst, impl=impl)
    again = cosine_match(x.contiguous(), src.repeat(2, 1), dst.repeat(2, 1), impl=impl)
    assert torch.equal(score, again[0]) and torch.equal(index, again[1])
    score, index = cosine_match(x, src[:0], dst, impl=impl)
    assert score.shape == index.shape == (2, 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_vectors_are_orthogonal_to_everything(impl):
    score, index = cosine_match(torch.zeros(1, 6, 8), torch.arange(4), torch.arange(4, 6), impl=impl)
    assert score.count_nonzero() == 0 and index.count_nonzero() == 0


def test_autocast_keeps_the_fp32_result():
    x, (src, dst) = torch.randn(1, 50, 16), cut(1, 50, 30)
    expected = cosine_match(x, src, dst)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score, index = cosine_match(x, src, dst)
    assert torch.equal(score, expected[0]) and torch.equal(index, expected[1])


@pytest.mark.parametrize(
    "x, src, dst, message",
    (
        (torch.zeros(3, 4), [0], [1], r"x has shape \(3, 4\), allowed: \(B, N, C\)"),
        (torch.zeros(1, 3, 4, dtype=torch.int64), [0], [1], "x has dtype torch.int64"),
        (torch.zeros(2, 3, 4), [[0]], [1], r"src has shape \(1, 1\), allowed: \(2, any\)"),
        (torch.zeros(2, 3, 4), [0], [1.0], "dst has dtype torch.float32, allowed: torch.int64"),
        (torch.zeros(1, 3, 4), [0], torch.zeros(0, dtype=torch.int64), "dst .* at least one"),
    ),
)
def test_bad_arguments_are_named(x, src, dst, message):
    with pytest.raises(ValueError, match=message):
        cosine_match(x, torch.as_tensor(src), torch.as_tensor(dst))


def test_compiles_into_one_graph(compiled):
    x, (src, dst) = torch.randn(2, 50, 16), cut(2, 50, 30)
    for result, expected in zip(compiled(cosine_match)(x, src, dst), cosine_match(x, src, dst), strict=True):
        assert torch.equal(result, expected)


def test_flops_are_those_of_the_product(flops):
    x, (src, dst) = torch.randn(2, 50, 16), cut(2, 50, 30)
    assert flops(cosine_match, x, src, dst) == 2 * 2 * 30 * 20 * 16


@pytest.mark.slow
def test_scores_are_never_held_whole():
    code = """
import resource, torch
from accel_kernels.cosine_match import cosine_match
torch.set_num_threads(1)
x, position = torch.randn(1, 16384, 320), torch.arange(16384)
cosine_match(x[:, :64], position[:32], position[32:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cosine_match(x, position[:8192], position[8192:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    added = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert added * 1024 < 64 << 20  # the 8,192 x 8,192 scores alone are 256 MiB
