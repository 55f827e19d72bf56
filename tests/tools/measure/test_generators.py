"""Recipes of networks that are trained from scratch: rivals cost what they are said to, and every recipe runs."""
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from accel_tools.measure import diffmae, generators, imagefolder, maskdit, mdtv2, trained, u_dit
from accel_tools.measure.macs import count_macs
from accel_tools.zoo import digits
from methods._zoo import load_judge


def test_rivals_of_maskdit_cost_the_same():
    costs = {words: sum(steps * maskdit.macs(config, config.ratio if stage == "masked" else 0)
                        for stage, steps in maskdit.lengths(config).items())
             for words, config in {"": maskdit.TRAINED["maskdit"], **maskdit.RIVALS["maskdit"]}.items()}
    assert max(costs.values()) / min(costs.values()) < 1.005
    assert maskdit.lengths(maskdit.TRAINED["maskdit"])["masked"] > maskdit.lengths(
        maskdit.RIVALS["maskdit"]["plain DiT, whole sequences"])["whole"]


def test_rivals_of_mdtv2_cost_the_same_or_take_as_many_steps():
    (plain, steps), (also, fewer) = mdtv2.RIVALS["mdtv2"].values()
    config = mdtv2.TRAINED["mdtv2"]
    both = mdtv2.macs(config) + mdtv2.macs(config, 0.4)
    assert also == plain and fewer == mdtv2.STEPS < steps
    assert steps * mdtv2.macs(plain) == pytest.approx(mdtv2.STEPS * both, rel=0.005)


def test_rivals_of_u_dit_cost_the_same():
    shipped = u_dit.STEPS * u_dit.macs(u_dit.TRAINED["u_dit"], folded=False)
    for config in u_dit.RIVALS["u_dit"].values():
        each = config.macs if isinstance(config, u_dit.Plain) else u_dit.macs(config, folded=False)
        assert u_dit.steps_of(config) * each == pytest.approx(shipped, rel=0.005)
    plain = u_dit.Plain()
    model = next(iter(u_dit.training(None, plain))).model
    x = torch.zeros(1, 4, 16, 16)
    assert count_macs(lambda: model(x, torch.zeros(1), torch.zeros(1, dtype=torch.long))) == plain.macs
    assert plain.macs == pytest.approx(u_dit.macs(u_dit.TRAINED["u_dit"]), rel=0.1)


def test_rivals_of_diffmae_cost_the_same():
    for config in diffmae.RIVALS["diffmae"].values():
        assert diffmae.steps_of(config) * sum(diffmae.macs(config)) == pytest.approx(
            diffmae.STEPS * sum(diffmae.macs(diffmae.TRAINED["diffmae"])), rel=0.005)


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Sixty made-up digits to train on, a thousand and sixty held out, and runs of two steps."""
    def split(held_out):
        count, random = 1060 if held_out else 60, torch.Generator().manual_seed(int(held_out))
        return torch.rand(count, 1, 32, 32, generator=random) * 2 - 1, torch.arange(count) % 10
    monkeypatch.setattr(digits, "split", split)
    monkeypatch.setattr(trained, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr("methods._trained.FOLDER", tmp_path)
    monkeypatch.setattr(generators, "SAMPLES", 10)
    for recipe in (maskdit, mdtv2, u_dit):
        monkeypatch.setattr(recipe, "SAMPLER", {"steps": 2, "guidance": 1.5})
    monkeypatch.setattr(diffmae, "STEPS_DRAWN", 2)
    monkeypatch.setattr(diffmae, "DRAWN", 10)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("slug", [path.stem for path in sorted(Path(generators.__file__).parent.glob("*.py"))
                                  if "accel_tools.measure.generators import" in path.read_text()])
def test_a_recipe_runs_with_its_rivals(few, slug):
    card = trained.train_method(slug, slug, 0, 0.005, "command")
    found = trained.metrics(slug, slug, 0, scale=0.005)
    assert found["rivals"] and card["config"]["seed"] == 0
    for each in (found, *found["rivals"].values()):
        json.dumps(each)
    low, high = next(value for name, value in found.items() if name.endswith("spread"))
    assert low <= high


def test_a_linear_classifier_reads_what_is_there():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 10
    told, noise = torch.eye(10)[labels], torch.randn(400, 5, generator=random)
    assert generators.linear(torch.cat([told, noise], 1), labels, torch.cat([told, noise.flip(0)], 1), labels) == 1
    assert generators.linear(noise, labels, torch.randn(400, 5, generator=random), labels) < 0.25


def test_a_code_that_nothing_uses_moves_to_what_a_place_has():
    model, images = imagefolder.build(imagefolder.SHIPPED), torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        used = [torch.cat([index.flatten() for index in each.index]).unique() for each in model.encode(images)]
        before = [quantiser.codes.clone() for quantiser in model.quantisers]
        imagefolder.revive(model, images, torch.Generator().manual_seed(1))
        for quantiser, f, codes, mine in zip(model.quantisers, model.maps(images), before, used, strict=True):
            places = f.flatten(2).mT.flatten(0, 1)
            for i in range(len(codes)):
                assert torch.equal(quantiser.codes[i], codes[i]) if i in mine else (places == quantiser.codes[i]).all(-1).any()


def test_worth_counts_what_it_is_told(monkeypatch):
    monkeypatch.setattr(generators, "SAMPLES", 20)
    images, labels = torch.zeros(1500, 1, 32, 32), torch.zeros(1500, dtype=torch.long)
    layer = nn.Linear(1024, 1024)

    def draw(asked, random):
        return layer(torch.rand(len(asked), 1, 1, 1024, generator=random)).view(-1, 1, 32, 32)
    errors = iter([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    found = generators.worth(draw, lambda part, names, random: torch.tensor(next(errors)), images, labels)
    assert found["n"] == 60 and found["macs_per_image"] == 1024 ** 2
    assert found["held_out_loss"] == pytest.approx((1.5 + 4 + 5) / 3) and found["held_out_loss_spread"] == [1.5, 5]
    right = [float((load_judge()(draw(torch.arange(20) % 10, torch.Generator().manual_seed(seed)).clamp(-1, 1)).argmax(-1)
                    == torch.arange(20) % 10).float().mean()) for seed in generators.SEEDS]
    assert found["label_accuracy"] == pytest.approx(sum(right) / 3)
