import json

import pytest
from families import FAMILIES

from methods._core.cache import Reuse
from methods._core.patch import Patch
from methods._core.schedule import always, means, of_length, read, watch


def test_a_schedule_is_read_from_words_a_file_or_what_was_read(tmp_path):
    found = read({"ff": "101", "attn": ["110", "10"]} | {"ff": ["10", "101"]})
    assert found == (("attn", ("110", "10")), ("ff", ("10", "101"))) and read(found) == found and hash(found)
    (tmp_path / "schedule.json").write_text(json.dumps({"attn": "1001"}))
    assert read(tmp_path / "schedule.json") == read(str(tmp_path / "schedule.json")) == (("attn", ("1001",)),)
    assert read({"attn": 1001, "ff": [1001]}) == read({"attn": "1001", "ff": ["1001"]})             # as YAML reads them
    assert of_length(found, 3, "x") == {"attn": "110", "ff": "101"} and of_length((), 3, "x") == {}
    assert always(read({"attn": "111"})) and always(read({})) and not always(found)
    with pytest.raises(ValueError, match="x: the schedule is for 2, 3 steps, and this run has 4"):
        of_length(found, 4, "x")


@pytest.mark.parametrize("bad, said", [
    ({"attn": "0101"}, "'0101' must be of 1 and 0, one for each step, and begin with 1"), ({"attn": ""}, "'' must be"),
    ({"attn": "12"}, "'12' must be"), ({"attn": "101", "ff": "1010"}, r"not \[\[3\], \[4\]\]"),
    ({"attn": ["10", "11"]}, r"the same numbers of steps, not \[\[2, 2\]\]")])
def test_bad_schedules_are_named(bad, said):
    with pytest.raises(ValueError, match=said):
        read(bad)


def test_changes_of_places_and_runs_are_meant():
    changes = {("ff", 1, 0): [1.0, 3.0], ("ff", 1, 1): [4.0], ("ff", 2, 0): [6.0], ("attn", 1, 0): [0.5]}
    assert means(changes) == {"attn": [[0.5]], "ff": [[2.0, 4.0], [6.0]]}
    with pytest.raises(ValueError, match="no change of 'ff' from step 1 was observed"):
        means({("ff", 1, 0): [1.0], ("ff", 1, 2): [1.0]})


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_is_watched_are_the_last_values_of_every_branch_and_run(guidance):
    """`wan` is guided by two calls, each compared with itself; the first step of a run with nothing."""
    family, changes, kept = FAMILIES["wan"], {}, []
    pipe = family.pipe()
    patch = Patch(pipe, "watch", edits=True)
    reuse = Reuse(patch.slot)
    patch.around(patch.denoiser.blocks[0].ff, reuse.around)
    patch.each_call(lambda context: setattr(reuse, "reuse", False))
    watch(patch, [("ff", reuse.slots)], 2, lambda old, new: float((old - new).sum()), changes)
    patch.after_call(lambda context, output: kept.append(float(reuse.slots[0].get().sum())))
    with patch.on():
        for _ in range(2):
            family.run(pipe, steps=4, guidance=guidance)
    calls = 1 if guidance == 1.0 else 2
    assert len(kept) == 2 * 4 * calls
    for lag in (1, 2):
        for step in range(4 - lag):
            expected = [kept[(run * 4 + step) * calls + call] - kept[(run * 4 + step + lag) * calls + call]
                        for run in range(2) for call in range(calls)]
            assert changes[("ff", lag, step)] == pytest.approx(expected, abs=1e-2)
    assert set(changes) == {("ff", 1, 0), ("ff", 1, 1), ("ff", 1, 2), ("ff", 2, 0), ("ff", 2, 1)}
