"""Small changes of a method's code, and whether its tests notice them."""
import ast

import pytest

from accel_tools import mutate
from accel_tools.catalog import ROOT

SOURCE = '''"""Words, 1 of them."""
class Config:
    ratio: float = 0.5
    on: bool = True

TINY = Config(ratio=3)

def rule(x: int, y=2) -> bool:
    """More words, 2."""
    if x < 0:
        raise ValueError(f"x={x + 1} is too low")
    patch.explain(lambda: f"{x + 1}")
    return max(-x, y) >= 1 and not y
'''


def test_one_place_is_changed_at_a_time_and_words_are_not():
    found = [(line, what) for line, what, _ in mutate.changes(ast.parse(SOURCE))]
    assert sorted(found) == [
        (3, "0.5: one more"), (4, "True: the opposite"), (8, "2: one more"), (10, "0: one more"), (10, "x < 0: operator 0"),
        (13, "-x: sign"), (13, "1: one more"), (13, "max(-x, y) >= 1 and (not y): operator"),
        (13, "max(-x, y) >= 1: operator 0"), (13, "max(-x, y): name"), (13, "not y: sign")]


def test_each_change_is_a_program_that_differs_in_one_line():
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    for line, what, changed in mutate.changes(ast.parse(SOURCE)):
        compile(ast.fix_missing_locations(changed), "x", "exec")
        assert sum(a != b for a, b in zip(plain, ast.unparse(changed).splitlines(), strict=True)) == 1, (line, what)


@pytest.mark.slow
def test_tests_of_a_method_notice_what_they_test():
    """A step of the schedule more is noticed by the test of the schedule, and no change by none."""
    path = ROOT / "methods/fora.py"
    tests = f"{ROOT}/tests/methods/test_fora.py::test_bad_values_are_named"
    tree = ast.parse(path.read_text())
    assert not mutate.noticed("fora", tree, tests)
    assert mutate.noticed("fora", ast.parse(path.read_text().replace("raise ValueError", "return ValueError")), tests)


def test_the_score_goes_into_the_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    entry = tmp_path / "catalog/entries/one.yaml"
    entry.parent.mkdir(parents=True)
    entry.write_text("name: One\nfidelity:\n  level: official\n  against: x\nnotes: y\n")
    for score in ((3, 4), (4, 4)):
        mutate.put("one", *score)
    assert entry.read_text() == ("name: One\nfidelity:\n  mutants: {noticed: 4, of: 4}\n  level: official\n"
                                 "  against: x\nnotes: y\n")


def test_a_method_without_tests_is_named(capsys):
    with pytest.raises(SystemExit):
        mutate.main(["--method", "no_such"])
    assert "there is no tests/methods/test_no_such.py" in capsys.readouterr().err
