"""`mswift handover`: the gate between training and serving. This process imports no torch; engines are processes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mswift import __version__, rundir
from mswift.config.handover import GateEngine, HandoverConfig
from mswift.converters.catalog import read_config
from mswift.converters.plan import table_for
from mswift.converters.quantization import codes_of
from mswift.errors import ConfigError, MswiftError
from mswift.handover.files import adapter_problems, file_problems
from mswift.handover.report import Report, compare
from mswift.handover.serve_script import write_serve_script
from mswift.infer.vllm_adapters import lora_options
from mswift.infer.vllm_options import vllm_python
from mswift.launchers import local
from mswift.launchers.job import Job
from mswift.tuners.merge import merge

_ROOT = Path(__file__).resolve().parents[2]
_MODULE = "mswift.handover.scoring"
_ROW_TOKENS = 256
_SHOWN_LINES = 15
_SEED = 0


def main(config: HandoverConfig) -> int:
    """Run the gate, print and write its report; 0 if the model may be handed over, else 1."""
    model, adapter = Path(config.model), None if config.adapters is None else Path(config.adapters)
    run = None if config.run is None else rundir.resolve_checkpoint(Path(config.run))
    if config.gate_tokens < 2:
        raise ConfigError(f"--gate_tokens {config.gate_tokens}: at least 2; try 4096")
    if config.gate_engines:
        check_form(model)
    report = Report(str(model), config.adapters, config.run, _versions(config.gate_engines))
    report.problems += file_problems(model, None if adapter else run, chats=config.use_chat_template)
    if adapter is not None:
        report.problems += adapter_problems(adapter, model, run)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mswift-handover-")))
        if config.gate_engines:
            _score(config, model, adapter, run, home, report)
    place = adapter or model
    (place / "serve.sh").unlink(missing_ok=True)
    if report.passed and "vllm" in config.gate_engines:
        served = None if adapter is None or any("vLLM does not serve" in note for note in report.notes) else adapter
        if adapter is None or served is not None:
            write_serve_script(place / "serve.sh", model, served)
    report.write(place)
    print("\n".join(report.lines()))
    return 0 if report.passed else 1


def check_form(model: Path) -> None:
    """ConfigError for codes of GPTQ or AWQ: the gate compares in fp32, in which vLLM does not compute from them."""
    path = model / "config.json"
    how = codes_of(read_config(model)) if path.is_file() else None
    if how is not None:
        plain = f"{model}-hf"
        raise ConfigError(
            f"{model} holds codes of {how.method}, and engines are compared in float32, in which vLLM does not compute "
            f"from them: mswift convert --model {model} --to hf --output_dir {plain}; then mswift handover {plain}"
        )


def _versions(engines: Sequence[GateEngine]) -> dict[str, str]:
    from importlib.metadata import version

    found = {"mswift": __version__}
    for name, package in (("megatron", "megatron-core"), ("transformers", "transformers")):
        if name in engines:
            found[package] = version(package)
    if "vllm" in engines:
        found["vllm"] = vllm_python()[1]
    return found


def _score(
    config: HandoverConfig, model: Path, adapter: Path | None, run: Path | None, home: Path, report: Report
) -> None:
    """Score the tokens with each engine and compare; what cannot be scored is a problem."""
    try:
        rows = _rows(config, model)
    except MswiftError as error:
        report.problems.append(str(error))
        return
    subjects: dict[str, dict[str, str | None]] = {
        "model": {"model": str(model), "trained": str(model if adapter or run is None else run), "adapter": None}
    }
    if adapter is not None:
        subjects["adapter"] = subjects["model"] | {"adapter": str(adapter)}
        try:
            merge(model, [adapter], home / "merged")
            subjects["merged"] = {"model": str(home / "merged"), "trained": str(home / "merged"), "adapter": None}
        except MswiftError as error:
            report.problems.append(f"the merged model: {error}")
    scores: dict[tuple[str, str], tuple[Any, Any]] = {}
    for engine in config.gate_engines:
        chosen = dict(subjects)
        if engine == "vllm" and adapter is not None:
            try:
                lora_options({"adapter": adapter}, read_config(model), on_cpu="cpu" in vllm_python()[1])
            except ConfigError as error:
                report.notes.append(str(error))
                del chosen["adapter"]
        job = {"engine": engine, "device": "auto" if engine == "vllm" else config.device, "rows": rows}
        try:
            found = _run(engine, job | {"subjects": chosen}, home, config.tensor_model_parallel_size)
        except MswiftError as error:
            report.problems.append(str(error))
            continue
        for name in chosen:
            scores[name, engine] = (found[f"{name} logprobs"], found[f"{name} argmax"])
    order = {name: place for place, name in enumerate(subjects)}
    report.comparisons += compare(dict(sorted(scores.items(), key=lambda item: order[item[0][0]])))


def _rows(config: HandoverConfig, model: Path) -> list[list[int]]:
    """Token ids [rows, length]: the same for every engine."""
    spec = table_for(read_config(model)).spec
    length = min(_ROW_TOKENS, spec.max_position_embeddings, config.gate_tokens)
    num_rows = -(-config.gate_tokens // length)
    if config.gate_text is None:
        rows: list[list[int]] = np.random.default_rng(_SEED).integers(0, spec.vocab_size, (num_rows, length)).tolist()
        return rows
    from mswift.data.tokenizer import encode, load_tokenizer

    try:
        text = Path(config.gate_text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--gate_text {config.gate_text}: cannot be read as text: {error}") from None
    (tokens,) = encode(load_tokenizer(model), [text])
    whole = min(len(tokens) // length, num_rows)
    if whole < 1:
        raise ConfigError(f"--gate_text {config.gate_text}: {len(tokens)} tokens, a row needs {length}")
    return [tokens[row * length : (row + 1) * length] for row in range(whole)]


def _run(engine: str, job: Mapping[str, Any], home: Path, tp: int) -> dict[str, Any]:
    """What one engine's process computed. MswiftError with the end of its output where it failed."""
    description, out = home / f"{engine}.json", home / f"{engine}.npz"
    description.write_text(json.dumps(job), encoding="utf-8")
    print(f"scoring    {engine}", file=sys.stderr, flush=True)
    said = ""
    if engine == "megatron" and tp > 1:
        status = local.run(Job(tp, _MODULE, (str(description), str(out))))
    else:
        python = vllm_python()[0] if engine == "vllm" else sys.executable
        paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [python, "-m", _MODULE, str(description), str(out)],
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        status, said = done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-_SHOWN_LINES:])
    if status:
        raise MswiftError(f"{engine} did not score the model (status {status}): {said}")
    with np.load(out) as found:
        return dict(found)
