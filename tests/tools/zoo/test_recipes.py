"""What the recipes feed their models: the right pictures at the right places."""
import pytest
import torch

from accel_tools.zoo import digits
from accel_tools.zoo.recipes import ar, judges, video
from accel_tools.zoo.training import Run, Trained, carry, conditional
from methods._zoo.ar import CODES, build


def scans(n=3):
    """Squares in place of digits: no download."""
    x = torch.full((n, 1, 32, 32), -1.0)
    x[:, :, 12:20, 12:20] = 1.0
    return x


@pytest.mark.parametrize("way", range(4), ids=list(digits.DIRECTIONS))
def test_a_clip_moves_two_pixels_a_frame_and_stays_in_view(way):
    clips = digits.moving(scans(16), torch.full((16,), way))
    assert clips.shape == (16, 8, 1, 32, 32)
    ink = (clips[:, :, 0] + 1) / 2
    mass = ink.flatten(2).sum(-1)
    assert torch.allclose(mass, mass[:, :1].expand(-1, 8))                       # nothing leaves the frame
    rows = (ink.sum(-1) * torch.arange(32)).sum(-1) / mass
    columns = (ink.sum(-2) * torch.arange(32)).sum(-1) / mass
    down, right = list(digits.DIRECTIONS.values())[way]
    assert torch.allclose(rows.diff(dim=1), torch.full((16, 7), 2.0 * down), atol=1e-4)
    assert torch.allclose(columns.diff(dim=1), torch.full((16, 7), 2.0 * right), atol=1e-4)


def test_every_prompt_of_a_clip_is_in_the_vocabulary():
    tokens = video.text.t5_tokenizer()
    ids = tokens(digits.prompts(), padding="max_length", max_length=video.text.SHORT).input_ids
    assert len(ids) == 40 and len({tuple(row) for row in ids}) == 40
    assert all(tokens.unk_token_id not in row and len(row) == video.text.SHORT for row in ids)


def test_a_tenth_of_the_prompts_is_dropped():
    run = Run(torch.nn.Linear(1, 1), steps=1, lr=0.1, average=0.9)
    x, prompts = torch.arange(5.0), torch.arange(6)
    found, asked = conditional(run, x, prompts, 4000)
    dropped = asked == 5
    assert torch.equal(found[~dropped].long(), asked[~dropped]) and 0.08 < dropped.float().mean() < 0.12


def test_pictures_joined_by_a_chain_are_one_cluster():
    base = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pictures = torch.cat([base, base + 0.1, base + 0.2, -base])
    assert judges.clusters(pictures, alike=0.11).tolist() == [0, 0, 0, 1]
    assert judges.clusters(pictures, alike=0.05).tolist() == [0, 1, 2, 3]


def test_the_token_recipe_learns_from_what_it_is_shown():
    torch.manual_seed(0)
    x, y = scans(40) * torch.linspace(0.2, 1, 40).view(-1, 1, 1, 1), torch.arange(40) % 10
    run = Run(build(layers=1), steps=60, lr=2e-3, average=0.9)
    loss_of = ar.tokenizer_loss(x, y, 8)
    losses = []
    for _ in range(12):
        losses.append(loss_of(run))
        run.update(losses[-1])
    assert losses[-1] < losses[0]
    tokens, labels = ar.tokens_of(run.averaged.eval(), x, y, seed=0)
    assert tokens.shape == (160, 64) and 0 <= tokens.min() and tokens.max() < CODES and len(labels) == 160
    first = ar.language_loss(tokens, labels, 16)(run)
    assert first.detach() == pytest.approx(torch.tensor(float(15 + CODES)).log().item(), rel=0.1)     # uniform at the start


def test_carry_refuses_another_architecture():
    with pytest.raises(ValueError, match="more than their positions"):
        carry(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))


def test_what_a_run_leaves_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("accel_tools.zoo.training.ZOO", tmp_path)
    run = Run(torch.nn.Linear(2, 2), steps=1, lr=0.1, average=0.9, losses=[(1, 0.5)])
    Trained(run, {"a": 1}, batch=4, data="none").write("model", seed=3)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "model.json"}
