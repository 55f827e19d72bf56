"""The bundled models: what their cards say is what they are."""
import hashlib
import json

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file

import methods
from methods._zoo import FOLDER, MODELS, judge, load_judge


@pytest.mark.parametrize("name", ["judge", *MODELS])
def test_card_and_weights_agree(name):
    card, path = methods.card(name), FOLDER / f"{name}.safetensors"
    assert card["bytes"] == path.stat().st_size <= 8 * 2 ** 20
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}
    assert card["loss"][-1][1] < card["loss"][0][1]


def test_the_cards_reach_their_bars():
    measured = methods.card("judge")["metrics"]
    assert measured["held_out_accuracy"] >= 0.98
    metrics = methods.card("dit")["metrics"]
    assert metrics["images"] == 500 and metrics["label_accuracy"] >= 0.95 and len(metrics["recall"]) == 10
    assert metrics["frechet"] <= 5 * metrics["frechet_real_vs_real"]


def test_an_unmodified_pipeline_draws_the_digits_asked_for(tmp_path):
    pipe = methods.tiny("dit")
    assert type(pipe) is DiTPipeline
    pipe.set_progress_bar_config(disable=True)
    out = pipe(list(range(10)), num_inference_steps=10, guidance_scale=2.0, generator=torch.Generator().manual_seed(0),
               output_type="np")
    images = torch.from_numpy(out.images).permute(0, 3, 1, 2) * 2 - 1
    right = (load_judge()(images).argmax(-1) == torch.arange(10)).sum()
    assert right >= 7
    pipe.transformer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "DiTTransformer2DModel"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no tiny model 'sdxl'; there are: dit"):
        methods.tiny("sdxl")


def test_frechet_distance_of_known_gaussians():
    eye, zero = torch.eye(3), torch.zeros(3)
    assert judge.frechet(zero, eye, zero, eye) == pytest.approx(0, abs=1e-9)
    assert judge.frechet(zero, eye, torch.tensor([3.0, 4, 0]), eye) == pytest.approx(25)
    assert judge.frechet(zero, eye, zero, 4 * eye) == pytest.approx(3)             # (1 - 2)^2 for each dimension
