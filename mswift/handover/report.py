"""What the gate found: the comparison of engines, and the report as JSON and Markdown. Torch-free."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

MEAN_LIMIT, MAX_LIMIT, AGREEMENT = 2e-5, 5e-4, 0.999
"""Of |log p - log p| in nats in float32, and of the share of tokens whose likeliest token is the same. Engines that
compute one model were within 2e-6, 4e-5 and 1.0 of each other; another rope_theta is beyond 1e-2."""


@dataclass(frozen=True)
class Comparison:
    """Two engines on the same tokens of the same subject; differences in nats."""

    subject: str
    engines: tuple[str, str]
    num_tokens: int
    mean: float
    max: float
    agreement: float

    @property
    def passed(self) -> bool:
        """Whether they compute the same; nan is not."""
        return self.mean <= MEAN_LIMIT and self.max <= MAX_LIMIT and self.agreement >= AGREEMENT


@dataclass
class Report:
    """The whole of it; `problems` and comparisons beyond the limits make it fail, `notes` do not."""

    model: str
    adapter: str | None
    run: str | None
    versions: Mapping[str, str]
    problems: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the model may be handed over."""
        return not self.problems and all(comparison.passed for comparison in self.comparisons)

    def lines(self) -> list[str]:
        """As Markdown."""
        verdict = "passed" if self.passed else "FAILED"
        subject = self.model if self.adapter is None else f"{self.adapter} on {self.model}"
        lines = [f"# Handover {verdict}: {subject}", ""]
        lines += [f"- problem: {problem}" for problem in self.problems] or ["- files: as config.json and the run say"]
        lines += [f"- {note}" for note in self.notes]
        lines += [f"- {name} {version}" for name, version in self.versions.items()]
        if self.comparisons:
            lines += [
                "",
                "| subject | engines | tokens | mean | max | same argmax | |",
                "|---|---|---|---|---|---|---|",
            ]
        for each in self.comparisons:
            numbers = f"{each.num_tokens:,} | {each.mean:.1e} | {each.max:.1e} | {each.agreement:.2%}"
            judged = "same" if each.passed else "**DIFFERENT**"
            lines.append(f"| {each.subject} | {each.engines[0]}, {each.engines[1]} | {numbers} | {judged} |")
        limits = f"mean {MEAN_LIMIT}, max {MAX_LIMIT}, argmax {AGREEMENT:.1%}"
        lines += ["", f"Differences of log-probabilities in nats, computed in float32; limits: {limits}."]
        return lines

    def write(self, folder: Path) -> None:
        """handover.json and handover.md."""
        content: dict[str, Any] = {"passed": self.passed, **asdict(self)}
        for entry, comparison in zip(content["comparisons"], self.comparisons, strict=True):
            entry["passed"] = comparison.passed
        (folder / "handover.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / "handover.md").write_text("\n".join(self.lines()) + "\n", encoding="utf-8")


def compare(scores: Mapping[tuple[str, str], tuple[Any, Any]]) -> list[Comparison]:
    """scores: (subject, engine) -> (log-probabilities, argmax), in order; each pair of engines of a subject.

    The merged model is also compared with the training engine's adapter.
    """
    found = []
    for (first, a), (second, b) in combinations(scores, 2):
        of_adapter = (first, a, second) == ("adapter", "megatron", "merged")
        if first == second or of_adapter:
            found.append(_comparison(second, (a, b), scores[first, a], scores[second, b]))
    return found


def _comparison(subject: str, engines: tuple[str, str], mine: tuple[Any, Any], theirs: tuple[Any, Any]) -> Comparison:
    apart = np.abs(mine[0].astype(np.float64) - theirs[0])
    same = float((mine[1] == theirs[1]).mean())
    return Comparison(subject, engines, apart.size, float(apart.mean()), float(apart.max()), same)
