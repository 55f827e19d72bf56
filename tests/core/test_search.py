"""The greedy search; the evolutionary one is tested where it is used."""
import pytest

from methods._core.search import Journal, greedy


def distance(candidate):
    """From (2, 1, 0), in which a wrong gene counts more the farther back it stands."""
    return (sum(10 ** n * abs(gene - wanted) for n, (gene, wanted) in enumerate(zip(candidate, (2, 1, 0), strict=True))),)


def test_greedy_takes_the_first_option_below_the_limit_and_keeps_it():
    judged = []

    def cost(candidate):
        judged.append(candidate)
        return distance(candidate)
    # at place 0 options 1 and 2 both pass 11.5; at place 2 none does
    assert greedy(Journal(cost), (0, 0, 0), (1, 2), {0: 11.5, 1: 1.5, 2: 50}) == (1, 1, 0)
    assert judged == [(1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 1, 2)]


def test_greedy_leaves_genes_without_a_limit_and_at_the_limit():
    assert greedy(Journal(distance), (0, 0, 0), (1, 2), {0: 10}) == (0, 0, 0)       # 11 and 10 are not below
    assert greedy(Journal(distance), (0, 0, 0), (1, 2), {}) == (0, 0, 0)
    assert greedy(Journal(distance), (0, 0, 0), (2, 1), {1: 9.0, 0: 1.0}) == (2, 1, 0)


def test_greedy_goes_on_where_a_journal_ends(tmp_path):
    path, told = tmp_path / "journal", []

    def failing(candidate):
        if candidate == (1, 1, 1):
            raise KeyboardInterrupt
        return distance(candidate)
    limits = {0: 11.5, 1: 1.5, 2: 50}
    with pytest.raises(KeyboardInterrupt):
        greedy(Journal(failing, path), (0, 0, 0), (1, 2), limits)
    assert len(path.read_text().splitlines()) == 2
    assert greedy(Journal(distance, path, told.append), (0, 0, 0), (1, 2), limits) == (1, 1, 0)
    assert len(told) == 2 and len(path.read_text().splitlines()) == 4
    assert greedy(Journal(None, path), (0, 0, 0), (1, 2), limits) == (1, 1, 0)
