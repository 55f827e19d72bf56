"""TiTok's recipe: the grid tokenizer, what each stage is shown, and where a recipe is looked for."""
from dataclasses import replace

import pytest
import torch

from accel_tools.measure import titok, trained
from accel_tools.zoo import digits
from methods._core.parts import patchify, unpatchify
from methods.titok import STAGES, TINY, build

pytestmark = pytest.mark.slow


def test_means_of_patches_are_those_of_a_plain_loop():
    random = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    points = torch.cat([centre + 0.1 * torch.randn(30, 2, generator=random) for centre in centres])
    found = titok.means(points, 3)
    nearest = [min(range(3), key=lambda i: float((point - found[i]).square().sum())) for point in points]
    for i in range(3):
        mine = points[[n == i for n in nearest]]
        assert len(mine) and torch.allclose(found[i], mine.mean(0), atol=1e-5)


def test_a_code_that_nothing_uses_moves_to_a_vector_that_something_has():
    model, images = build(TINY), torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.codes[1:] = -model.codes[0]                    # of equal codes only the first is ever the nearest
        before, z = model.codes.clone(), model.encoder(images).flatten(0, 1)
        used = model.encode(images).index.unique()
        titok.revive(model, images, torch.Generator().manual_seed(1))
    dead = [i for i in range(TINY.codes) if i not in used.tolist()]
    assert torch.equal(model.codes[used], before[used]) and len(dead) >= TINY.codes - 2
    assert all((z == model.codes[i]).all(-1).any() for i in dead)


def test_the_stages_of_titok_are_shown_the_grids_codes_and_then_their_own(monkeypatch):
    x, y = torch.rand(40, 1, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1, torch.arange(40) % 10
    monkeypatch.setattr(digits, "split", lambda held_out: (x, y))
    config = replace(TINY, size=32, channels=1, patch=4, proxy_depth=16, proxy_codes=4, classes=10)
    codebook, paste = titok.grid_tokenizer(config)
    tokens = torch.tensor([[0, 3] * 32])
    assert torch.equal(paste(codebook[tokens].mT.unflatten(-1, (8, 8))), unpatchify(codebook[tokens], 4, 8))
    random, shown = torch.Generator().manual_seed(0), []
    monkeypatch.setattr(titok.titok, "loss", lambda model, stage, *x: shown.append((stage, *x)) or torch.zeros(()))
    for stage in titok.training(None, config):
        trains = {name.split(".")[0] for name, weight in stage.model.named_parameters() if weight.requires_grad}
        assert set(stage.loss(x, y, 1, random)) == {"loss"} and trains == set(STAGES[shown[-1][0]])
    assert all(weight.requires_grad for weight in stage.model.parameters())
    (one, images, codes, *_), (two, again, *_), (three, tokens, labels, *_) = shown
    assert [one, two, three] == list(STAGES) and torch.equal(images, x) and torch.equal(again, x) and torch.equal(labels, y)
    distance = (patchify(x, 4)[..., None, :] - codebook).square().sum(-1)
    assert torch.equal(distance.gather(-1, codes[..., None])[..., 0], distance.amin(-1))
    with torch.no_grad():
        assert torch.equal(tokens, stage.model.encode(x).index)


def test_what_trains_a_method_stands_in_its_module_or_in_the_recipe_of_its_name(monkeypatch):
    assert trained.recipe("titok") is titok and trained.names("titok") == ["titok-4", "titok-8", "titok-16"]
    monkeypatch.setattr(titok.titok, "training", lambda pipe, config: iter(()), raising=False)
    assert trained.recipe("titok") is titok.titok
    with pytest.raises(ValueError, match="methods/fora.py has no TRAINED"):
        trained.names("fora")
