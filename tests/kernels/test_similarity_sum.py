import pytest
import torch

from accel_kernels.similarity_sum import similarity_sum

IMPLS = ("reference", "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl):
    x = torch.tensor([[[1.0, 0], [2, 0], [0, 5], [-3, 0], [0, 0]]])
    torch.testing.assert_close(similarity_sum(x, impl=impl), torch.tensor([[1.0, 1, 1, -1, 0]]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.float16, 1e-5), (torch.bfloat16, 1e-5)))
@pytest.mark.parametrize("batch, tokens, channels", ((2, 63, 20), (1, 300, 130), (3, 1, 7)))
def test_is_the_row_sum_of_the_cosine_matrix(impl, dtype, tolerance, batch, tokens, channels):
    x = torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    score = similarity_sum(x, impl=impl)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), (unit @ unit.mT).sum(-1), rtol=tolerance, atol=tolerance * tokens)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_empty_input(impl):
    x = torch.randn(30, 2, 6).transpose(0, 1)
    torch.testing.assert_close(similarity_sum(x, impl=impl), similarity_sum(x.contiguous(), impl=impl))
    assert similarity_sum(x[:, :0], impl=impl).shape == (2, 0)


def test_autocast_keeps_the_fp32_result():
    x = torch.randn(2, 30, 8)
    expected = similarity_sum(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity_sum(x), expected)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\), allowed: \(B, N, C\)"):
        similarity_sum(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="x has dtype torch.int64"):
        similarity_sum(torch.zeros(1, 3, 4, dtype=torch.int64))


def test_compiles_into_one_graph(compiled):
    x = torch.randn(2, 30, 6)
    assert torch.equal(compiled(similarity_sum)(x), similarity_sum(x))


def test_flops_are_linear_in_the_tokens(flops):
    assert flops(similarity_sum, torch.randn(2, 30, 6)) == 2 * 2 * 30 * 6
