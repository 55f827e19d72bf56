"""Searches for the plans of a method: many candidates, each judged by a run of the model, none of them lost.

Candidates are tuples of integers 0..high. A `Journal` writes down every judgement as it is made, so that a search that was
stopped is started again in the same way and finds what it had.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Candidate = tuple[int, ...]
Costs = tuple[float, ...]


class Journal:
    """Costs of candidates, one JSON line each in a file, or in memory without one.

    Args:
        objective: costs of a candidate, to be minimised; infinite ones for a candidate that is not allowed.
        path: of the file; candidates that stand in it are not judged again.
        tell: called with a line of progress after each new judgement.
    """

    def __init__(self, objective: Callable[[Candidate], Sequence[float]], path: Path | None = None,
                 tell: Callable[[str], None] | None = None):
        self.objective, self.path, self.tell = objective, path, tell
        self.costs: dict[Candidate, Costs] = {}
        text = path.read_text() if path is not None and path.exists() else ""
        self._rest = "\n" if text and not text.endswith("\n") else ""       # behind a line cut off while it was written
        for line in text.splitlines():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.costs[tuple(found["candidate"])] = tuple(map(float, found["costs"]))

    def judge(self, candidate: Candidate) -> Costs:
        if candidate not in self.costs:
            self.costs[candidate] = costs = tuple(map(float, self.objective(candidate)))
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(self._rest + json.dumps({"candidate": candidate, "costs": costs}) + "\n")
                self._rest = ""
            if self.tell is not None:
                self.tell(f"{len(self.costs)} judged, the last one {', '.join(f'{cost:.4g}' for cost in costs)}")
        return self.costs[candidate]


class Pool:
    """The candidates of an elitist search, of any hashable kind, with what each costs; none is judged twice.

    Args:
        judge: a candidate -> its cost, to be minimised.
        legal: whether a candidate may be judged at all.
    """

    def __init__(self, judge: Callable[[Any], float], legal: Callable[[Any], bool]):
        self.judge, self.legal = judge, legal
        self.costs: dict[Any, float] = {}

    def add(self, make: Callable[[], Any], count: int) -> None:
        """Judge `count` new candidates that `make()` gives, or those among ten times as many."""
        wanted = len(self.costs) + count
        for _ in range(10 * count):
            if len(self.costs) < wanted and (made := make()) not in self.costs and self.legal(made):
                self.costs[made] = self.judge(made)

    def best(self, count: int | None = None) -> list[Any]:
        """Those with the lowest costs, all by default, the best first."""
        return sorted(self.costs, key=self.costs.__getitem__)[:count]


def greedy(journal: Journal, start: Candidate, options: Sequence[int], limits: Mapping[int, float]) -> Candidate:
    """Change one gene of `start` after another, keeping what was changed before, to the first of `options` whose first cost
    lies below the limit of its place. Where none does, the gene stays.

    Args:
        limits: place of a gene -> limit, in the order in which the genes are decided.
    """
    for place, limit in limits.items():
        tries = ((*start[:place], option, *start[place + 1:]) for option in options)
        start = next((candidate for candidate in tries if journal.judge(candidate)[0] < limit), start)
    return start


def rank(costs: np.ndarray) -> np.ndarray:
    """Non-dominated front of each row of costs (n, m), all to be minimised: 0 the best."""
    no_worse = (costs[:, None] <= costs[None]).all(-1)
    dominates = no_worse & (costs[:, None] < costs[None]).any(-1)
    fronts, left, front = np.zeros(len(costs), dtype=int), np.ones(len(costs), dtype=bool), 0
    while left.any():
        best = left & ~(dominates & left[:, None]).any(0)
        fronts[best], left, front = front, left & ~best, front + 1
    return fronts


def crowding(costs: np.ndarray) -> np.ndarray:
    """Crowding distance of each row of one front (n, m): sides of the box to its neighbours, infinite at the ends."""
    distance = np.zeros(len(costs))
    for column in costs.T:
        order = np.argsort(column, kind="stable")
        distance[order[[0, -1]]] = np.inf
        if np.isfinite(column).all() and np.ptp(column) > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / np.ptp(column)
    return distance


def cross(a: np.ndarray, b: np.ndarray, high: int, eta: float, random: np.random.Generator) -> np.ndarray:
    """Simulated binary crossover of two parents in [0, high] within bounds, gene by gene with probability 1/2, rounded."""
    low, top = np.minimum(a, b).astype(float), np.maximum(a, b).astype(float)
    gap, u = np.maximum(top - low, 1e-14), random.random(len(a))
    children = []
    for edge, sign in ((low, -1), (high - top, 1)):
        spread = 2 - (1 + 2 * edge / gap) ** -(eta + 1)
        inside = u <= 1 / spread
        power = np.where(inside, u * spread, 1 / np.where(inside, 1, 2 - u * spread)) ** (1 / (eta + 1))
        children.append(0.5 * (low + top + sign * power * gap))
    child = np.where(random.random(len(a)) < 0.5, *children)
    child = np.where((random.random(len(a)) < 0.5) & (a != b), child, a)
    return np.clip(np.rint(child), 0, high).astype(int)


def mutate(x: np.ndarray, high: int, eta: float, random: np.random.Generator) -> np.ndarray:
    """Polynomial mutation in [0, high], of one gene in `len(x)` on average (at most half), rounded."""
    u = random.random(len(x))
    down, up = 1 - x / high, x / high                       # 1 - the distances to the two bounds
    fall = (2 * u + (1 - 2 * u) * down ** (eta + 1)) ** (1 / (eta + 1)) - 1
    rise = 1 - (2 * (1 - u) + (2 * u - 1) * up ** (eta + 1)) ** (1 / (eta + 1))
    moved = np.clip(np.rint(x + np.where(u < 0.5, fall, rise) * high), 0, high).astype(int)
    return np.where(random.random(len(x)) < min(0.5, 1 / len(x)), moved, x)


def evolve(journal: Journal, length: int, high: int, initial: Callable[[int, np.random.Generator], np.ndarray], *,
           population: int = 15, generations: int = 30, crossover: tuple[float, float] = (0.8, 15),
           mutation: tuple[float, float] = (0.8, 15), seed: int = 0) -> list[tuple[Candidate, Costs]]:
    """NSGA-II (Deb et al. 2002): the candidates that no other one found beats in all costs, by their first cost.

    Args:
        journal: judges candidates; the search is the same for the same seed, so that it goes on where a journal ends.
        initial: (length, random) -> a candidate to start from.
        crossover, mutation: probability and distribution index eta.
    """
    random = np.random.default_rng(seed)
    plans = costs = None

    def child() -> np.ndarray:
        mother, father = (plans[min(random.integers(0, len(plans), 2))] for _ in range(2))    # sorted: the lower is better
        x = cross(mother, father, high, crossover[1], random) if random.random() < crossover[0] else mother
        return mutate(x, high, mutation[1], random) if random.random() < mutation[0] else x

    for generation in range(generations):
        make = child if generation else lambda: initial(length, random)
        known, new = {tuple(plan) for plan in plans} if generation else set(), []
        for _ in range(100 * population):                                     # plans met before are not measured again
            if len(new) < population and (x := tuple(int(gene) for gene in make())) not in known:
                known.add(x)
                new.append(x)
        if new:
            judged = np.array([journal.judge(x) for x in new], dtype=float)
            plans = np.concatenate([plans, new]) if generation else np.array(new)
            costs = np.concatenate([costs, judged]) if generation else judged
        fronts = rank(costs)
        spread = np.zeros(len(costs))
        for front in set(fronts):
            spread[fronts == front] = crowding(costs[fronts == front])
        keep = np.lexsort((-spread, fronts))[:population]
        plans, costs = plans[keep], costs[keep]
    best = [i for i in np.argsort(costs[:, 0], kind="stable") if rank(costs)[i] == 0]
    return [(tuple(plans[i].tolist()), tuple(costs[i].tolist())) for i in best]
