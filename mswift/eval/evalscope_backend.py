"""EvalScope as a library, in an environment of its own (it needs older packages): its data sets against a server."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mswift.config.eval import EvalConfig
from mswift.errors import ConfigError
from mswift.eval.results import TaskResult, file_sha256, prompt_sha256
from mswift.eval.server import Server, server_of
from mswift.eval.statistics import Metric
from mswift.eval.task import Settings

PYTHON = "MSWIFT_EVALSCOPE_PYTHON"
_JOB = Path(__file__).with_name("evalscope_job.py")
_LAST_WORDS = 1500


def evaluate(config: EvalConfig, settings: Settings) -> tuple[list[TaskResult], dict[str, Any]]:
    """Results of EvalScope's run_task, sample by sample. Raises ConfigError."""
    python, server = _python(), server_of(config)
    task = _task(config, server)
    task["work_dir"] = str((Path(config.eval_output_dir) / "evalscope").absolute())
    job = subprocess.run(
        [python, "-I", str(_JOB)],
        input=json.dumps(task).encode(),
        capture_output=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if job.returncode != 0:
        said = job.stderr.decode(errors="replace")[-_LAST_WORDS:].strip()
        raise ConfigError(f"--eval_backend evalscope ended with {job.returncode}: {said}")
    answer = json.loads(job.stdout.splitlines()[-1])
    files = dict(_dataset(given) for given in config.eval_dataset)
    results = [_task_result(name, files, samples) for name, samples in answer["samples"].items()]
    if not any(result.samples for result in results):
        raise ConfigError(f"--eval_backend evalscope scored nothing; its logs are in {task['work_dir']}/logs")
    return results, {**server.about, "evalscope": answer["version"]}


def _python() -> str:
    """The interpreter that has EvalScope."""
    named = os.environ.get(PYTHON)
    if named is None and find_spec("evalscope") is not None:
        return sys.executable
    if named is None or not Path(named).is_file():
        raise ConfigError(
            f"--eval_backend evalscope: EvalScope needs an environment of its own (python -m venv es; es/bin/pip "
            f"install evalscope==1.14.1); name its interpreter: {PYTHON}=es/bin/python"
            + (f" ({named} is no file)" if named else "")
        )
    return named


def _dataset(given: str) -> tuple[str, Path | None]:
    name, equals, path = given.partition("=")
    if equals and not Path(path).exists():
        raise ConfigError(f"--eval_dataset {given}: no such file or folder")
    return name, Path(path).absolute() if equals else None


def _task(config: EvalConfig, server: Server) -> dict[str, Any]:
    """EvalScope's TaskConfig; --eval_args go over it."""
    datasets = dict(_dataset(given) for given in config.eval_dataset)
    arguments: dict[str, dict[str, Any]] = {}
    for name, path in datasets.items():
        own: dict[str, Any] = {} if path is None else _local(path)
        if config.num_fewshot is not None:
            own["few_shot_num"] = config.num_fewshot
        arguments[name] = own
    generation: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
    if config.max_new_tokens is not None:
        generation["max_tokens"] = config.max_new_tokens
    task: dict[str, Any] = {
        "model": server.model,
        "api_url": server.url,
        "api_key": server.key,
        "eval_type": "openai_api",
        "datasets": list(datasets),
        "dataset_args": arguments,
        "generation_config": generation,
        "eval_batch_size": config.max_batch_size,
        "seed": config.seed,
        "no_timestamp": True,
    }
    if config.eval_limit is not None:
        task["limit"] = config.eval_limit
    return {**task, **server.arguments}


def _local(path: Path) -> dict[str, Any]:
    """A folder of SUBSET_val.jsonl (or _test, _dev and .csv) files, or one such file."""
    if path.is_file():
        return {"local_path": str(path.parent), "subset_list": [_subset(path)]}
    subsets = sorted({_subset(file) for file in path.iterdir() if file.suffix in (".jsonl", ".csv")})
    return {"local_path": str(path), **({"subset_list": subsets} if subsets else {})}


def _subset(path: Path) -> str:
    for ending in ("_val", "_test", "_dev"):
        if path.stem.endswith(ending):
            return path.stem.removesuffix(ending)
    return path.stem


def _task_result(name: str, files: dict[str, Path | None], samples: list[dict[str, Any]]) -> TaskResult:
    """EvalScope's reviews of a subset as rows."""
    rows: list[dict[str, Any]] = []
    names: list[str] = []
    for sample in sorted(samples, key=lambda sample: int(sample["index"])):
        asked = [message["content"] for message in sample["messages"] if message["role"] != "assistant"]
        score = sample["sample_score"]["score"]
        values = {metric: float(value) for metric, value in score["value"].items()}
        names += [metric for metric in values if metric not in names]
        rows.append(
            {
                "id": str(sample["index"]),
                "prompt_sha256": prompt_sha256(asked),
                "answers": [score["prediction"]],
                "values": values,
            }
        )
    path = next((path for task, path in files.items() if name.startswith(task)), None)
    binary = {metric: all(row["values"].get(metric) in (0.0, 1.0, None) for row in rows) for metric in names}
    return TaskResult(
        name=name,
        file=str(path) if path else f"EvalScope's {name}",
        file_sha256=file_sha256(path) if path else "",
        num_fewshot=0,
        prompts_sha256=prompt_sha256([row["prompt_sha256"] for row in rows]),
        num_cut=0,
        metrics=tuple(Metric(metric, binary=binary[metric]) for metric in names),
        samples=rows,
    )
