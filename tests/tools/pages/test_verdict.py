"""What a run is worth beside the line of fewer steps, on points whose place is plain to see."""
import math

import pytest

from accel_tools.pages.measured import Measured, Run
from accel_tools.pages.verdict import against, verdict

CURVE = [{"speedup": 0.98, "psnr": None, "n": 60, "label_accuracy": 1.0, "frechet": 5.0},
         {"speedup": 2.0, "psnr": 40.0, "n": 60, "label_accuracy": 1.0, "frechet": 5.0},
         {"speedup": 4.0, "psnr": 30.0, "n": 60, "label_accuracy": 0.9, "frechet": 6.0}]
BETWEEN = -10 * math.log10((1e-4 + 1e-3) / 2)              # at 3x the mean square lies half way


@pytest.mark.parametrize("speedup, psnr, word", [
    (2.0, 41.0, "better"), (2.0, 39.0, "loses"), (2.0, 40.4, "trades"), (3.0, BETWEEN + 0.6, "better"),
    (3.0, BETWEEN - 0.6, "loses"), (1.5, 10 * math.log10(2) + 40 + 0.6, "better"), (1.5, 42.0, "loses"),
    (6.0, 31.0, "better"), (6.0, 29.0, "loses"), (1.05, 60.0, "loses"), (0.9, 60.0, "loses"), (1.5, math.inf, "better")])
def test_at_its_speed_on_the_line(speedup, psnr, word):
    assert against({"speedup": speedup, "psnr": psnr}, CURVE, noise=(0.95, 1.06)).word == word


@pytest.mark.parametrize("arm, word", [
    ({"label_accuracy": 0.98}, "better"), ({"label_accuracy": 0.9}, "trades"), ({"frechet": 5.9}, "better"),
    ({"frechet": 6.1}, "trades")])
def test_a_judge_may_object(arm, word):
    """By more than chance: two of 60 images, a fifth of the distance."""
    said = against({"speedup": 2.0, "psnr": 45.0, "n": 60, **arm}, CURVE)
    assert said.word == word and ("but" in said.why) == (word == "trades")


def test_a_judge_may_speak_for_a_run_that_is_far_from_the_plain_images():
    said = against({"speedup": 4.0, "psnr": 20.0, "n": 500, "label_accuracy": 1.0}, CURVE)
    assert said.word == "trades" and "10.0 dB farther" in said.why and "label accuracy is 1 against 0.9" in said.why


def test_nothing_is_said_without_a_line_or_an_image():
    assert against({"speedup": 2.0}, CURVE) is None and against({"psnr": 30.0}, CURVE) is None
    assert against({"speedup": 2.0, "psnr": 30.0}, CURVE[:1]) is None
    found = Measured("m", [Run("plain", "plain", CURVE[0]), *(Run("fewer", "f", arm) for arm in CURVE[1:]),
                           Run("method", "a", {"speedup": 2.0, "psnr": 45.0}), Run("peer", "b", {"error": "no"})])
    assert [said and said.word for said in (verdict(found, run) for run in found.runs)] == [None, None, None, "better", None]
