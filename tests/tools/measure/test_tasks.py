"""What each bundled model is asked and how its answers are scored, on answers whose score is known."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from untrained import UNTRAINED

from accel_tools.measure import quality, sweep, tasks
from accel_tools.measure.arms import Arm, sample
from accel_tools.measure.cells import Cells
from accel_tools.measure.sweep import Bench, Suite
from accel_tools.measure.tasks import TASKS
from accel_tools.zoo import digits
from methods import sjd

NAMES = ["red square", "green square", "green again", "blue square", "yellow square", "cyan square", "white square"]
GROUPS = ["warm", "cold", "cold", "cold", "warm", "cold", "grey"]


class MeanColour(nn.Module):
    """The feature of an image is the direction of its mean colour."""

    def features(self, x):
        return F.normalize(x.mean((2, 3)), dim=1)


class BrightestColumn(nn.Module):
    """Sees the digit c in an image that is brightest in column c."""

    def features(self, x):
        return x.mean((1, 2))[:, :10]

    def head(self, features):
        return features


@pytest.fixture
def emoji(monkeypatch):
    """A judge of squares; "green again" is a near-duplicate of "green square"."""
    colours = torch.tensor([[1., -1, -1], [-1, 1, -1], [-1, .95, -1], [-1, -1, 1], [1, 1, -1], [-1, 1, 1], [1, 1, 1]])
    real = {"features": F.normalize(colours, dim=1).half(), "cluster": torch.tensor([0, 1, 1, 2, 3, 4, 5])}
    monkeypatch.setattr(quality, "_judge", lambda name: (MeanColour(), real))
    for module in (quality, tasks):
        monkeypatch.setattr(module, "card", lambda name: {"names": NAMES, "groups": GROUPS})


@pytest.fixture
def moving(monkeypatch):
    real = {"mean": torch.zeros(10), "cov": torch.eye(10)}
    monkeypatch.setattr(quality, "_judge", lambda name: (BrightestColumn(), real))


def squares(*colours):
    return (torch.tensor(colours, dtype=torch.float32)[:, :, None, None]).expand(-1, -1, 32, 32)


# ---- prompts -----------------------------------------------------------------------------------------------------------

def test_parts_of_a_series_of_prompts_join(emoji):
    for name in ("dit", "unet", "video_dit", "ar"):
        task = TASKS[name]
        assert task.prompts(3) + task.prompts(4, first=3) == task.prompts(7), name


def test_every_prompt_comes_once_before_one_comes_twice(emoji):
    assert sorted(TASKS["unet"].prompts(7)) == sorted(NAMES)
    clips = TASKS["video_dit"].prompts(40)
    assert len(set(clips)) == 40 and {prompt.split()[0] for prompt in clips} == set(digits.WORDS)


def test_a_share_of_each_seed_covers_the_images_once():
    suite = Suite("s", images=11, rounds=1)
    shares = [suite.share(seed) for seed in suite.seeds]
    numbers = [first + i for n, first in shares for i in range(n)]
    assert numbers == list(range(11))


# ---- scores ------------------------------------------------------------------------------------------------------------

def test_an_emoji_is_found_among_its_nearest_clusters(emoji):
    images = squares((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1))
    found = TASKS["unet"].quality(images, ["red square", "green again", "white square", "yellow square"])
    assert found["retrieval_top1"] == 0.5 and found["retrieval"] == 0.75 and found["n"] == 4      # yellow is last for blue
    assert found["recall"] == {"cold": 1.0, "grey": 1.0, "warm": 0.5} and found["frechet"] > 0


def test_real_halves_share_no_cluster():
    """Two far apart clusters: each half is one of them."""
    features = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 100])
    found = quality.halves_frechet(features, torch.arange(100) // 50, 30)
    assert found["n"] == 30 and found["frechet"] == pytest.approx(20_000, rel=0.05)


def test_a_clip_shows_the_digit_of_most_of_its_frames(moving):
    clips = torch.zeros(2, 4, 1, 32, 32)
    for clip, columns in enumerate([(3, 3, 3, 5), (7, 7, 7, 7)]):
        for frame, column in enumerate(columns):
            clips[clip, frame, :, :, column] = 1
    found = TASKS["video_dit"].quality(clips.expand(-1, -1, 3, -1, -1), ["three moving right", "one moving up"])
    assert found["label_accuracy"] == 0.5 and found["recall"] == {"1": 0.0, "3": 1.0}
    assert found["frame_agreement"] == pytest.approx(7 / 8)
    assert found["travel"] == pytest.approx(1.0, abs=1e-3) and (found["n"], found["frames"]) == (2, 8)   # 3 to 5, and none


def test_the_centre_of_a_dot_is_the_dot():
    image = torch.zeros(32, 32)
    image[4, 20] = 1
    assert quality.centroid(image).tolist() == pytest.approx([4, 20], abs=0.02)
    assert quality.centroid(torch.zeros(32, 32)).tolist() == pytest.approx([15.5, 15.5], abs=1e-3)


def test_distances_of_clips_count_all_frames():
    clip = torch.full((1, 2, 1, 16, 16), 0.5)
    other = clip.clone()
    other[:, 0] += 0.1
    assert quality.psnr(clip, other) == pytest.approx(-10 * math.log10(0.01 / 2), abs=1e-4)
    assert quality.ssim(clip, clip) == pytest.approx(1)


# ---- sampling ----------------------------------------------------------------------------------------------------------

class Noise:
    """A pipeline whose images are its noise."""

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompts, *, generator, **_):
        return type("Out", (), {"images": torch.rand(len(prompts), 2, 2, 1, generator=generator)})


def test_batches_of_a_set_can_be_drawn_in_any_order():
    whole = sample(Noise(), 1, list(range(5)), seed=3, batch=2)
    parts = [TASKS["dit"].draw(Noise(), 1, [0] * n, seed=3, first=first, guidance=1.0) for first, n in ((4, 1), (0, 2), (2, 2))]
    assert torch.equal(whole, torch.cat([parts[1], parts[2], parts[0]])) and len(whole.unique()) == 20


def test_a_decoder_is_on_only_while_it_is_entered():
    model = UNTRAINED["ar"].load()
    with pytest.raises(RuntimeError, match="under a decoder"):
        model.generate([1], seed=0, guidance=1.0)
    with model.decoding(sjd, {"window": 4}) as decoder:
        images = model.generate([1, 2], seed=0, guidance=1.0)
        assert images.shape == (2, 1, 32, 32) and 0 <= images.min() <= images.max() <= 1
        assert decoder.report() == {"method": "sjd", "state": "engaged", "passes": decoder.report()["passes"], "tokens": 64}
    with pytest.raises(ValueError, match="window=0"), model.decoding(sjd, {"window": 0}):
        pass


def test_a_decoder_is_compared_with_its_own_off_config(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "card", lambda name: {"sha256": "0", "config": {}})
    monkeypatch.setattr(sweep, "memory_of", lambda model, arm, images: {
        "peak_bytes": 2, "peak_resident_bytes": 3, "report": {}})
    task = UNTRAINED["ar"]
    assert task.plain("sjd") == Arm(None, "sjd", {"window": 1})
    record = Bench(task, Suite("small", images=4, rounds=2), Cells(tmp_path)).record("sjd", {})
    plain, method = record["arms"]["plain"], record["arms"]["method"]
    assert list(record["arms"]) == ["plain", "method"] and "no steps to leave out" in record["missing"]["fewer_steps"]
    assert plain["speedup"] > 0 and method["macs"] > 0 and "psnr" not in method
    assert (plain["passes"], "steps" in plain) == (64, False) and method["passes"] <= 64
    assert method["n"] == 4 and sorted(method["recall"]) == ["0", "1", "2", "3"]


def test_the_off_decoder_takes_one_pass_a_token():
    task = UNTRAINED["ar"]
    model = task.load()
    with task.plain("sjd").applied(model) as decoder:
        task.sample(model, None, [1, 2])
        assert decoder.report() == {"method": "sjd", "state": "off", "passes": 64, "tokens": 64}


@pytest.mark.parametrize("name", ["dit", "unet", "mmdit", "video_dit"])
def test_a_pipeline_of_each_kind_is_asked_and_judged(name):
    """With the real judges: prompts that its tokenizer knows, images of the right shape, a verdict for every one."""
    task = UNTRAINED[name]
    prompts = task.prompts(3)
    images = task.sample(task.load(), 1, prompts, batch=2)
    assert images.shape == {"dit": (3, 1, 32, 32), "video_dit": (3, 8, 1, 32, 32)}.get(name, (3, 3, 32, 32))
    found = task.quality(images, prompts)
    assert found["n"] == 3 and 0 <= found[task.score] <= 1 and found["frechet"] > 0 and 1 <= len(found["recall"]) <= 3
    assert task.real_frechet(3)["frechet"] > 0


def test_each_task_names_its_own_model():
    assert [task.model for task in TASKS.values()] == list(TASKS)
    assert set(tasks.bundled()) <= TASKS.keys()
