"""The bundled models: what their cards say is what they are."""
import hashlib
import importlib
import json

import pytest
import torch
from safetensors.torch import load_file

import methods
from accel_tools.measure.tasks import TASKS
from methods import _trained, sjd
from methods._zoo import FOLDER, MODELS, judge, load_judge, text
from methods._zoo.emoji_judge import nearest_clusters

JUDGES = ("judge", "emoji_judge", "video_judge")


@pytest.mark.parametrize("name", [*JUDGES, *MODELS])
def test_card_and_weights_agree(name):
    card, path = methods.card(name), FOLDER / f"{name}.safetensors"
    assert card["bytes"] == path.stat().st_size <= 8 * 2 ** 20
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}
    assert card["loss"][-1][1] < card["loss"][0][1] and card["space"] == "pixel"


def test_the_zoo_is_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 32 * 2 ** 20
    assert len(text.clip_tokenizer()) <= 2048


@pytest.mark.parametrize("path", sorted(_trained.FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_card_and_trained_weights_agree(path):
    card = _trained.weights_card(path.stem)
    assert card["name"] in importlib.import_module(f"methods.{card['method']}").TRAINED
    assert card["bytes"] == path.stat().st_size <= 2 * 2 ** 20
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    falls = [stage[-1][1] < stage[0][1] for stage in card["loss"] if len(stage) > 2]      # of fewer points chance decides
    assert all(falls) and card["metrics"]


def test_the_judges_know_real_images():
    assert methods.card("judge")["metrics"]["held_out_accuracy"] >= 0.98
    assert methods.card("video_judge")["metrics"]["held_out_accuracy"] >= 0.98
    assert methods.card("emoji_judge")["metrics"]["retrieval_top1"] >= 0.95


def test_the_cards_reach_their_bars():
    dit, ar = (methods.card(name)["metrics"] for name in ("dit", "ar"))
    assert dit["label_accuracy"] >= 0.97 and dit["frechet"] <= 5 * dit["frechet_real_vs_real"]
    assert ar["label_accuracy"] >= 0.90 and min(ar["recall"].values()) >= 0.75
    for name in ("unet", "mmdit"):
        assert methods.card(name)["metrics"]["retrieval"] >= 0.80, name
    clips = methods.card("video_dit")["metrics"]                       # the digit stays the same, and moves
    assert clips["frame_agreement"] >= 0.90 and clips["travel"] >= 4
    assert all(methods.card(name)["metrics"]["n"] >= 100 for name in MODELS)


PIPELINES = {"dit": "DiTPipeline", "unet": "StableDiffusionPipeline", "mmdit": "StableDiffusion3Pipeline",
             "video_dit": "CogVideoXPipeline"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_an_unmodified_pipeline_draws_what_is_asked_for(name, tmp_path):
    pipe, task = methods.tiny(name), TASKS[name]
    assert type(pipe).__name__ == PIPELINES[name] and type(pipe).__module__.startswith("diffusers.")
    prompts = task.prompts(10 if name != "video_dit" else 2)
    found = task.quality(task.sample(pipe, 10, prompts), prompts)
    assert found[task.score] >= 0.6
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == type(model).__name__


@pytest.mark.parametrize("name, prompt", [("unet", "red apple"), ("mmdit", "red apple"), ("video_dit", "seven moving left")])
def test_a_prompt_is_all_a_pipeline_needs(name, prompt):
    """The pipelines' defaults, of text lengths among others, are those of large models; they must do for small ones."""
    pipe = methods.tiny(name)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(prompt, num_inference_steps=2, output_type="np")
    images = out.frames[0] if name == "video_dit" else out.images
    assert images.shape == ((8, 32, 32, 1) if name == "video_dit" else (1, 32, 32, 3))


def test_the_token_model_draws_the_digits_asked_for():
    lm = methods.tiny("ar")
    decoded = sjd.generate(lm.model, lm.prompt(list(range(10))), sjd.Config(**lm.config()))
    images = lm.decode(decoded.tokens)
    assert images.shape == (10, 1, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert (load_judge()(images * 2 - 1).argmax(-1) == torch.arange(10)).sum() >= 7
    assert decoded.report["forwards"] < lm.tokens


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no tiny model 'sdxl'; there are: dit, unet, mmdit, video_dit, ar"):
        methods.tiny("sdxl")


def test_nearest_clusters_take_the_nearest_member_of_each():
    known = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]]), dim=-1)
    found = nearest_clusters(torch.tensor([[0.0, 1.0], [-1, 0.1]]), known, torch.tensor([0, 0, 1, 2]), 2)
    assert found.tolist() == [[1, 0], [2, 1]]


def test_frechet_distance_of_known_gaussians():
    eye, zero = torch.eye(3), torch.zeros(3)
    assert judge.frechet(zero, eye, zero, eye) == pytest.approx(0, abs=1e-9)
    assert judge.frechet(zero, eye, torch.tensor([3.0, 4, 0]), eye) == pytest.approx(25)
    assert judge.frechet(zero, eye, zero, 4 * eye) == pytest.approx(3)             # (1 - 2)^2 for each dimension
