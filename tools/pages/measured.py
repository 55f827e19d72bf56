"""What was measured on one model, gathered from the files of all methods: the runs that its plots and its table show."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SCORES = {"label_accuracy": "Label accuracy", "retrieval": "Retrieval"}       # shares a judge gives, by the key in an arm


@dataclass(frozen=True)
class Run:
    """One arm: `kind` is plain, fewer, method or peer. `arm` holds its numbers, or what went wrong under "error".

    `bound` is the speed-up its saved arithmetic allows; a decoder saves passes, not arithmetic, and has none.
    """

    kind: str
    name: str
    arm: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    slug: str | None = None
    bound: float | None = None
    stale: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The config as a table shows it: of a long list or a mapping, only how long it is."""
        return {key: f"({len(value)} values)"
                if isinstance(value, dict) or isinstance(value, list | tuple) and len(value) > 4 else value
                for key, value in self.config.items()}

    @property
    def short(self) -> bool:
        """Whether the config can be written down in a line."""
        return self.settings == dict(self.config)

    @property
    def label(self) -> str:
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return f"{self.name}, {settings}" if settings else self.name


@dataclass(frozen=True)
class Measured:
    """All runs on one model. `noise`: lowest and highest quartile of plain against plain, over all tables."""

    model: str
    runs: list[Run]
    noise: tuple[float, float] | None = None
    real: Mapping[str, Any] = field(default_factory=dict)          # {frechet, n} of real images
    facts: Mapping[str, Any] = field(default_factory=dict)         # hardware, date, commit and suite of the newest record

    def of(self, *kinds: str) -> list[Run]:
        return [run for run in self.runs if run.kind in kinds]

    @property
    def score(self) -> str | None:
        """The share by which a judge scores this model."""
        return next((key for key in SCORES if any(key in run.arm for run in self.runs)), None)


def measured(model: str, results: Mapping[str, Mapping], baseline: Mapping[str, Any] | None, names: Mapping[str, str],
             hashes: Mapping[str, str] | None = None) -> Measured:
    """`results`: slug -> its file; `baseline`: the model's file; `names`: slug -> what it is called; `hashes`: slug -> hash
    of its code as it is now, without which nothing counts as stale."""
    found = [(slug, record) for slug, result in results.items() for record in result.get("records", [])
             if record["model"] == model and record.get("suite", {}).get("name") != "overhead"]
    baseline = baseline or {}
    return Measured(model, [*_fewer(baseline, found), *_methods(found, names, hashes or {}), *_peers(baseline)],
                    _noise(baseline, found), _real(baseline, found), _facts(baseline, found))


def models(results: Mapping[str, Mapping], baselines: Iterable[str] = ()) -> list[str]:
    """Every model something was measured on, in order of first sight."""
    seen = [record["model"] for result in results.values() for record in result.get("records", [])
            if record.get("suite", {}).get("name") != "overhead"]
    return list(dict.fromkeys([*baselines, *seen]))


def _fewer(baseline: Mapping, found: list[tuple[str, Mapping]]) -> list[Run]:
    """The plain run and the curve of fewer steps; without a curve, the fewer-steps arms of the methods."""
    curve = baseline.get("plain", {}).get("curve")
    if curve is None:
        arms = [record["arms"] for _, record in found if "fewer_steps" in record["arms"]]
        by_steps = {arm["steps"]: arm for each in arms for name in ("plain", "fewer_steps")
                    if "steps" in (arm := each.get(name, {}))}
        curve = [by_steps[steps] for steps in sorted(by_steps, reverse=True)]
        if not curve:
            curve = [record["arms"]["plain"] for _, record in found if "plain" in record["arms"]][:1]
    return [Run("fewer" if i else "plain", f"{arm['steps']} steps" if i else "Unaccelerated", arm,
                bound=allowed(curve[0], arm)) for i, arm in enumerate(curve)]


def _methods(found: list[tuple[str, Mapping]], names: Mapping[str, str], hashes: Mapping[str, str]) -> list[Run]:
    runs = []
    for slug, record in found:
        arms = record["arms"]
        if "method" in arms:
            bound = arms["method"].get("mac_bound") or allowed(arms.get("plain", {}), arms["method"])
            runs.append(Run("method", names.get(slug, slug), arms["method"], record.get("config", {}), slug, bound,
                            slug in hashes and record.get("code_hash") != hashes[slug]))
        package = record.get("peer", {}).get("package")
        if package in arms:
            runs.append(Run("peer", f"{package} package", arms[package], record.get("config", {}),
                            bound=arms[package].get("mac_bound")))
    return runs


def _peers(baseline: Mapping) -> list[Run]:
    plain = next(iter(baseline.get("plain", {}).get("curve", [])), {})
    return [Run("peer", f"{peer['package']} package", peer.get("arm", {"error": peer.get("error", "")}),
                peer.get("config", {}), bound=allowed(plain, peer.get("arm", {})))
            for peer in baseline.get("peers", {}).get("runs", [])]


def allowed(plain: Mapping[str, Any], arm: Mapping[str, Any]) -> float | None:
    """The speed-up that an arm's multiply-accumulates allow; None where either is unknown, and for a decoder."""
    if "passes" in arm or not plain.get("macs") or not arm.get("macs"):
        return None
    return plain["macs"] / arm["macs"]


def _noise(baseline: Mapping, found: list[tuple[str, Mapping]]) -> tuple[float, float] | None:
    arms = [record["arms"].get("plain", {}) for _, record in found] + baseline.get("plain", {}).get("curve", [])[:1]
    spreads = [spread for arm in arms if (spread := arm.get("speedup_spread"))]
    return (min(low for low, _ in spreads), max(high for _, high in spreads)) if spreads else None


def _real(baseline: Mapping, found: list[tuple[str, Mapping]]) -> Mapping[str, Any]:
    every = [baseline.get("plain", {}).get("real_vs_real"), *(record.get("real_vs_real") for _, record in found)]
    return next((real for real in every if real), {})


def _facts(baseline: Mapping, found: list[tuple[str, Mapping]]) -> Mapping[str, Any]:
    every = [record for _, record in found] + ([baseline["plain"]] if "plain" in baseline else [])
    newest = max(every, key=lambda record: record.get("date", ""), default={})
    return {key: newest[key] for key in ("hardware", "date", "commit", "suite") if key in newest}
