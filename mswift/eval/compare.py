"""Two evaluations of the same questions side by side: is the difference more than chance? Torch-free."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mswift.errors import ConfigError
from mswift.eval import results
from mswift.eval.results import TaskResult
from mswift.eval.statistics import NUM_RESAMPLES, Difference, Estimate, Metric, difference, estimate

COMPARISON = "comparison"
_HOW = (
    "Difference: second minus first, on the same rows; its 95 % interval by paired bootstrap "
    f"({NUM_RESAMPLES} resamples of rows). p: McNemar's exact test, two-sided, for scores that are 0 or 1 a row. "
    "Beyond chance: the interval is without 0."
)


def compare(first: Path, second: Path, output: Path, seed: int) -> str:
    """Write comparison.json, .md and .png into `output`; the table. ConfigError where they asked different things."""
    (about_first, before), (about_second, after) = results.read(first), results.read(second)
    by_name = {result.name: result for result in after}
    if missing := [result.name for result in before if result.name not in by_name]:
        raise ConfigError(
            f"--compare: {second} has no {', '.join(missing)}, which {first} has; evaluate the same tasks"
        )
    rows: list[tuple[str, Metric, Difference | None]] = []
    bars: list[tuple[str, Metric, list[Estimate]]] = []
    for result in before:
        other = by_name[result.name]
        _check_same(result, other, first, second)
        for metric in result.metrics:
            values = result.values(metric), other.values(metric)
            rows.append((result.name, metric, difference(metric, *values, seed)))
            both = [estimate(metric, one, seed) for one in values]
            if all(both):
                bars.append((f"{result.name} {metric.name}", metric, [one for one in both if one]))
    labels = [str(about.get("model", "")) for about in (about_first, about_second)]
    table = _table(rows, labels)
    output.mkdir(parents=True, exist_ok=True)
    results.chart(output / f"{COMPARISON}.png", bars, labels)
    (output / f"{COMPARISON}.md").write_text(table, encoding="utf-8")
    value = {"first": str(first), "second": str(second), "how": _HOW, "rows": [_row(*row) for row in rows]}
    (output / f"{COMPARISON}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return table


def _check_same(first: TaskResult, second: TaskResult, one: Path, other: Path) -> None:
    if not (first.samples and second.samples):
        raise ConfigError(f"--compare: {first.name} was reported without its rows, which a comparison needs")
    ids = [[(sample["id"], sample.get("prompt_sha256")) for sample in result.samples] for result in (first, second)]
    if ids[0] != ids[1]:
        differ = sum(a != b for a, b in zip(*ids, strict=False)) + abs(len(ids[0]) - len(ids[1]))
        raise ConfigError(
            f"--compare: {one} and {other} asked different things in {first.name}: {differ} of {len(ids[0])} and "
            f"{len(ids[1])} prompts; use the same file, limit, examples and --use_chat_template"
        )


def _row(task: str, metric: Metric, found: Difference | None) -> dict[str, Any]:
    return {"task": task, "metric": metric.name, **({} if found is None else asdict(found))}


def _table(rows: list[tuple[str, Metric, Difference | None]], labels: list[str]) -> str:
    lines = [f"First: {labels[0]}  ", f"Second: {labels[1]}", ""]
    lines += ["| task | metric | first | second | difference | 95 % interval | p | beyond chance | rows |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for task, metric, found in rows:
        if found is None:
            lines.append(f"| {task} | {metric.name} | - | - | - | - | - | - | 0 |")
            continue
        change = found.second - found.first
        beyond = found.low > 0 or found.high < 0
        better = (change > 0) == metric.higher_is_better
        verdict = ("better" if better else "worse") if beyond else "no"
        p_value = "-" if found.p_value is None else f"{found.p_value:.3g}"
        cells = (task, metric.name, f"{found.first:.4f}", f"{found.second:.4f}", f"{change:+.4f}")
        lines.append(
            "| "
            + " | ".join((*cells, f"{found.low:+.4f} to {found.high:+.4f}", p_value, verdict, str(found.num_samples)))
            + " |"
        )
    return "\n".join([*lines, "", _HOW]) + "\n"
