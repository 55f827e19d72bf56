"""A training run that is stopped and called again ends where an unbroken one ends, bit for bit."""
import pytest
import torch
from torch import nn

from accel_tools.zoo import training

pytestmark = pytest.mark.slow


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x):
        return self.transformer_blocks(x)


def fresh(steps=6, **more):
    torch.manual_seed(0)
    return training.Run(Blocks(), steps=steps, lr=1e-2, average=0.9, **more)


def loss_of(run):
    x = torch.randn(16, 4, generator=run.random)
    return (run.model(x) - x.sum(1, keepdim=True)).square().mean()


@pytest.mark.parametrize("matrices", [None, 5e-2], ids=["AdamW", "Muon"])
def test_resuming_is_exact(tmp_path, matrices):
    whole, first, second = (fresh(matrices=matrices) for _ in range(3))
    training.train(whole, loss_of, tmp_path / "whole.ckpt")
    torch.manual_seed(0)
    fresh()
    training.train(first, loss_of, tmp_path / "parts.ckpt", until=3)
    torch.manual_seed(99)                                    # whatever happened in between
    training.train(second, loss_of, tmp_path / "parts.ckpt")
    assert second.step == whole.step == 6
    for name, value in whole.averaged.state_dict().items():
        assert torch.equal(value, second.averaged.state_dict()[name]), name
    assert whole.losses[-1][0] == second.losses[-1][0] == 6


def test_groups_of_weights_learn_at_rates_of_their_own_and_frozen_ones_not_at_all(tmp_path):
    torch.manual_seed(0)
    model = Blocks()
    model.transformer_blocks[2].requires_grad_(False)
    frozen = model.transformer_blocks[2].weight.clone()
    run = training.Run(model, steps=6, lr=1e-2, average=0.9, rates={"transformer_blocks.0.weight": 5.0})
    training.train(run, lambda run: {"size": torch.tensor(2.0), "loss": loss_of(run)}, tmp_path / "run.ckpt")
    slow, fast = run.optimizers[0].param_groups[::-1]
    assert [weight.shape for weight in fast["params"]] == [(8, 4)] and [weight.shape for weight in slow["params"]] == [(8,)]
    assert fast["lr"] == pytest.approx(5 * slow["lr"]) and torch.equal(model.transformer_blocks[2].weight, frozen)
    assert run.shown == ("loss", "size") and run.losses[-1][2] == 2.0


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    run = fresh(matrices=5e-2)
    adamw, muon = ([weight.shape for group in optimizer.param_groups for weight in group["params"]]
                   for optimizer in run.optimizers)
    assert muon == [(8, 4), (1, 8)] and adamw == [(8,), (1,)]
    run.update(loss_of(run))
    assert [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers] == [1e-2 / 200, 5e-2 / 200]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    training.train(fresh(), loss_of, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="belongs to a run of 6 steps, not 9"):
        training.train(fresh(steps=9), loss_of, tmp_path / "run.ckpt")


def test_positions_of_the_coarse_grid_lie_between_those_of_the_fine_one():
    coarse, fine = training.position_embedding(8, 16, 32), training.position_embedding(16, 16, 32)
    assert coarse.shape == (1, 64, 32) and fine.shape == (1, 256, 32)
    nearest = torch.cdist(coarse[0], fine[0]).argmin(1)
    rows, cols = nearest // 16, nearest % 16
    assert set((rows // 2).tolist()) == set(range(8)) and torch.equal(cols // 2, torch.arange(8).repeat(8))
