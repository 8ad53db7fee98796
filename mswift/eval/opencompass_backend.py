"""OpenCompass by its command, in an environment of its own: its data sets against a server."""

import csv
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mswift.config.eval import EvalConfig
from mswift.errors import ConfigError
from mswift.eval.results import TaskResult
from mswift.eval.server import Server, server_of
from mswift.eval.task import Settings
from mswift.infer.url_engine import KEY

COMMAND = "MSWIFT_OPENCOMPASS"
_DATA = "COMPASS_DATA_CACHE"
_MODEL = "mswift_server"
_OUT_TOKENS = 1024
_SEQUENCE_TOKENS = 32768


def evaluate(config: EvalConfig, settings: Settings) -> tuple[list[TaskResult], dict[str, Any]]:
    """The scores of OpenCompass's summary; it tells none by row, so they have no intervals. Raises ConfigError."""
    _check(config)
    command, server = _command(), server_of(config)
    folder = (Path(config.eval_output_dir) / "opencompass").absolute()
    argv = [command, *arguments(config, server, folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **_data_place()}
    job = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False, env=environment, cwd=folder)  # it writes ./tmp
    summaries = sorted((folder / "work").glob("*/summary/summary_*.csv"))
    if job.returncode != 0 or not summaries:
        raise ConfigError(f"--eval_backend opencompass ended with {job.returncode}; its logs are in {folder / 'work'}")
    return read_summary(summaries[-1]), dict(server.about)


def _data_place() -> dict[str, str]:
    """Its variable for the folder above `data`, which it would look for where it runs."""
    given = os.environ.get(_DATA, "")
    return {_DATA: str(Path(given).absolute())} if given or Path("data").is_dir() else {}


def _check(config: EvalConfig) -> None:
    """ConfigError for what OpenCompass would leave out, or fetch."""
    for name in ("eval_limit", "num_fewshot", "fewshot_dataset"):
        if getattr(config, name) not in (None, ()):
            raise ConfigError(f"--{name}: OpenCompass has it in the configurations of its data sets; leave it out")
    if config.model is None:
        raise ConfigError(
            "--eval_backend opencompass: OpenCompass counts tokens of prompts; give --model DIR as well, for its "
            "tokenizer (it would download one of GPT-4 otherwise)"
        )


def arguments(config: EvalConfig, server: Server, folder: Path) -> list[str]:
    """Write OpenCompass's configuration of the server into `folder`; what its command is called with."""
    models = folder / "configs" / "models"
    models.mkdir(parents=True, exist_ok=True)
    (models / f"{_MODEL}.py").write_text(model_config(config, server), encoding="utf-8")
    (folder / "configs" / "datasets").mkdir(exist_ok=True)
    names = []
    for given in config.eval_dataset:
        if "=" in given:
            raise ConfigError(
                f"--eval_dataset {given}: OpenCompass finds its data itself (COMPASS_DATA_CACHE); give the name of a "
                "configuration, as gsm8k_gen"
            )
        names.append(given)
    flags = ["--models", _MODEL, "--datasets", *names]
    flags += ["--config-dir", str(folder / "configs"), "--work-dir", str(folder / "work")]
    for name, value in server.arguments.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


def model_config(config: EvalConfig, server: Server) -> str:
    """OpenCompass's Python configuration of the server; the key stays in the environment."""
    roles = "[dict(role='HUMAN', api_role='HUMAN'), dict(role='BOT', api_role='BOT', generate=True)]"
    fields = {
        "abbr": repr(_MODEL),
        "type": "OpenAISDK",
        "path": repr(server.model),
        "key": repr("ENV" if os.environ.get(KEY) else server.key),
        "openai_api_base": repr(server.url),
        "tokenizer_path": repr(str(Path(config.model or "").absolute())),
        "meta_template": f"dict(round={roles})",
        "query_per_second": repr(config.max_batch_size),
        "max_out_len": repr(config.max_new_tokens or _OUT_TOKENS),
        "max_seq_len": repr(_SEQUENCE_TOKENS),
        "batch_size": repr(config.max_batch_size),
        "temperature": repr(config.temperature),
    }
    lines = "".join(f"        {name}={value},\n" for name, value in fields.items())
    return f"from opencompass.models import OpenAISDK\n\nmodels = [\n    dict(\n{lines}    )\n]\n"


def read_summary(path: Path) -> list[TaskResult]:
    """summary_*.csv: dataset, version, metric, mode, and a column of scores for the model; "-" where there is none."""
    scores: dict[str, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if _MODEL not in row:
                raise ConfigError(f"{path}: no column {_MODEL}, only {', '.join(row)}")
            if row[_MODEL] not in ("-", ""):
                scores.setdefault(row["dataset"], {})[row["metric"]] = float(row[_MODEL])
    if not scores:
        raise ConfigError(f"{path}: OpenCompass scored nothing; why is in {path.parents[1] / 'logs'}")
    return [
        TaskResult(name, f"OpenCompass's {name}", "", 0, "", 0, metrics=(), samples=[], reported=found)
        for name, found in scores.items()
    ]


def _command() -> str:
    named = os.environ.get(COMMAND) or shutil.which("opencompass")
    if named is None or not Path(named).is_file():
        raise ConfigError(
            "--eval_backend opencompass: no command opencompass; install it into an environment of its own (python -m "
            f"venv oc; oc/bin/pip install opencompass) and name the command: {COMMAND}=oc/bin/opencompass"
        )
    return str(Path(named).absolute())
