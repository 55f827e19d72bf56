"""Parts of class-conditional diffusion transformers: as the library's DiT has them, and by hand."""
import math

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from accel_tools.measure.macs import count_macs
from methods._core.dit import FREQUENCIES, Head, Level, blocks, chain_macs, checked, ddpm, hidden, positions, sampled


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_noise_level_is_embedded_as_in_the_library():
    level, t = Level(12).double(), torch.tensor([0.0, 3.0, 999.0], dtype=torch.float64)
    waves = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)(t)
    torch.testing.assert_close(level(t), level.mlp(waves.double()), atol=1e-4, rtol=1e-4)
    by_hand = torch.cat([torch.tensor([[math.cos(0.7 * 10000 ** (-i / 128)) for i in range(128)]]),
                         torch.tensor([[math.sin(0.7 * 10000 ** (-i / 128)) for i in range(128)]])], 1).double()
    torch.testing.assert_close(level(torch.tensor([0.7], dtype=torch.float64)), level.mlp(by_hand), atol=1e-6, rtol=1e-6)
    assert level.to(torch.bfloat16)(torch.tensor([0, 999])).dtype == torch.bfloat16


def test_the_head_starts_at_zero_and_is_modulated():
    head, x, cond = Head(8, 6, 4).double(), torch.randn(2, 3, 8).double(), torch.randn(2, 6).double()
    assert not head(x, cond).any()
    for weight in head.parameters():
        weight.data.normal_(generator=generator())
    shift, scale = head.modulation[1](cond * cond.sigmoid()).chunk(2, -1)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(head(x, cond), head.linear(normed * (1 + scale[:, None]) + shift[:, None]))


def test_positions_tell_columns_from_rows():
    found = positions(8, 3)
    assert found.shape == (9, 8)
    for place in range(9):
        row, column = divmod(place, 3)
        expected = [f(at * w) for at in (column, row) for f in (math.sin, math.cos) for w in (1, 0.01)]
        torch.testing.assert_close(found[place], torch.tensor(expected))


def test_a_chain_costs_what_the_closed_form_says():
    chain = blocks(3, 8, 2, 6)
    assert all(block.mlp[1].approximate == "tanh" for block in chain)

    def run():
        x = torch.zeros(1, 5, 8)
        for block in chain:
            x = block(x, torch.zeros(1, 6))
    assert count_macs(run) == chain_macs(3, 5, 8, 6)


def test_labels_are_hidden_as_often_as_asked():
    labels = torch.arange(5000) % 10
    found = hidden(labels, 10, 0.3, generator())
    assert float((found == 10).double().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(found[found < 10], labels[found < 10]) and torch.equal(hidden(labels, 10, 0.0, generator()), labels)


def test_labels_that_are_not_known_are_refused():
    checked(torch.arange(5), 4)
    checked(torch.zeros(0, dtype=torch.long), 4)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, 4 for none; these reach from 0 to 5"):
        checked(torch.arange(6), 4)


def test_samples_of_a_model_that_sees_the_answer():
    """It says the noise that is in x if the answer is its label's; guidance goes from none's answer towards it and beyond."""
    kept = (1 - ddpm().betas.double()).cumprod(0)
    asked = []

    def model(x, t, labels):
        asked.append((len(x), int(t[0])))
        answer = labels.double()[:, None, None, None] / 10
        a = kept[t][:, None, None, None]
        return torch.cat([(x - a.sqrt() * answer) / (1 - a).sqrt(), torch.zeros_like(x)], 1)

    x, labels = torch.randn(3, 2, 4, 4, generator=generator()).double(), torch.tensor([1, 5, 10])
    found = sampled(model, x, labels, 10, 8, lambda t: 1.0, generator())
    torch.testing.assert_close(found, (labels.double() / 10)[:, None, None, None].expand_as(x))
    assert [rows for rows, _ in asked] == [3] * 8 and [t for _, t in asked] == [999, 856, 714, 571, 428, 285, 143, 0]
    found = sampled(model, x, 10 * labels, 100, 8, lambda t: 1.0, generator(), clip=2.0)
    torch.testing.assert_close(found, labels.double().clamp(max=2)[:, None, None, None].expand_as(x))
    asked.clear()
    found = sampled(model, x, labels, 10, 8, lambda t: 2.0 if t == 0 else 1.0, generator())
    torch.testing.assert_close(found, (2 * labels.double() / 10 - 1)[:, None, None, None].expand_as(x))
    assert [rows for rows, _ in asked] == [3] * 7 + [6]


def test_noise_levels_are_those_of_the_paper():
    betas = ddpm().betas
    assert len(betas) == 1000 and betas[0] == pytest.approx(1e-4) and betas[-1] == pytest.approx(0.02)
