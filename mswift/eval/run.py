"""The command `mswift eval`."""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mswift.config.eval import EvalConfig
from mswift.config.loader import to_dict
from mswift.errors import ConfigError
from mswift.eval import native, results
from mswift.eval.catalog import Chosen, choose
from mswift.eval.compare import compare
from mswift.eval.model import EvalModel
from mswift.eval.results import TaskResult
from mswift.eval.task import Settings
from mswift.infer.request import Engine, Sampling

_OTHERS = {
    "lm_eval": "mswift.eval.lm_eval_backend",
    "evalscope": "mswift.eval.evalscope_backend",
    "opencompass": "mswift.eval.opencompass_backend",
}


def main(config: EvalConfig) -> int:
    """Run `mswift eval`; returns the exit status. What needs no model is refused before loading."""
    output = Path(config.eval_output_dir)
    if config.compare:
        return _compare(config, output)
    _check(config, output)
    settings = _settings(config)
    if config.eval_backend == "native":
        found, about = _native(config, settings)
    else:
        found, about = import_module(_OTHERS[config.eval_backend]).evaluate(config, settings)
    about = {"backend": config.eval_backend, **about, "config": to_dict(config)}
    print(results.write(output, found, about, config.seed), end="")
    print(f"\n{output / results.RESULTS}, {output / results.TABLE}, {output / results.CHART}")
    return 0


def _compare(config: EvalConfig, output: Path) -> int:
    if len(config.compare) != 2:
        raise ConfigError(f"--compare takes two directories of results, {len(config.compare)} given")
    if config.eval_dataset or config.model or config.eval_url:
        raise ConfigError("--compare evaluates nothing: leave out --model, --eval_url and --eval_dataset")
    first, second = map(Path, config.compare)
    print(compare(first, second, output, config.seed), end="")
    return 0


def _check(config: EvalConfig, output: Path) -> None:
    if not config.eval_dataset:
        raise ConfigError("--eval_dataset is required, for instance --eval_dataset arc=arc_challenge.jsonl")
    if config.model is None and config.eval_url is None:
        raise ConfigError("--model or --eval_url is required: a Hugging Face directory, or the address of a server")
    if config.eval_url is not None and config.adapters:
        raise ConfigError("--adapters with --eval_url: the server chooses; name the adapter by --served_model_name")
    if config.eval_url is None and config.served_model_name is not None:
        raise ConfigError("--served_model_name needs --eval_url")
    if config.eval_backend == "native" and config.eval_args:
        raise ConfigError("--eval_args are for the other backends; leave them out of --eval_backend native")
    if config.max_batch_size < 1:
        raise ConfigError(f"--max_batch_size {config.max_batch_size}: at least 1; try 8")
    if (output / results.RESULTS).exists():
        raise ConfigError(f"--eval_output_dir {output} holds results already; give another one, or delete it")


def _settings(config: EvalConfig) -> Settings:
    return Settings(
        use_chat_template=config.use_chat_template,
        sampling=Sampling(temperature=config.temperature, top_p=config.top_p, seed=config.seed, n=config.num_samples),
        max_new_tokens=config.max_new_tokens,
        sandbox=config.sandbox,
        pass_k=config.pass_k,
        agent_template=config.agent_template,
    )


def _native(config: EvalConfig, settings: Settings) -> tuple[list[TaskResult], dict[str, Any]]:
    from tqdm import tqdm

    chosen = choose(config.eval_dataset, config.fewshot_dataset, config.num_fewshot, config.eval_limit)
    if config.num_samples > 1 and (other := [one.task.name for one in chosen if one.task.name != "humaneval"]):
        raise ConfigError(f"--num_samples {config.num_samples} is for humaneval; {other[0]} scores one answer")
    native.check(chosen, settings)
    with opened(config) as (model, about):
        total = native.num_questions(chosen, settings)
        with tqdm(total=total, unit="question", disable=None) as bar:
            return [_evaluate(one, model, settings, bar) for one in chosen], about


def _evaluate(chosen: Chosen, model: EvalModel, settings: Settings, bar: Any) -> TaskResult:
    bar.set_description(chosen.task.name)
    return native.evaluate(chosen, model, settings, bar.update)


@contextlib.contextmanager
def opened(config: EvalConfig) -> Iterator[tuple[EvalModel, dict[str, Any]]]:
    """The engine or server, and what the results say of it."""
    if config.eval_url is not None:
        engine, about = _server(config)
        limit = _limit(Path(config.model)) if config.model is not None else None
    else:
        engine, about = _engine(config)
        limit = _limit(Path(str(config.model)))
    try:
        yield EvalModel(engine, limit, config.max_batch_size), about
    finally:
        engine.close()


def _server(config: EvalConfig) -> tuple[Engine, dict[str, Any]]:
    from mswift.infer.url_engine import UrlEngine

    tokenizer = None
    if config.model is not None:
        from mswift.infer.loading import load_tokenizer

        tokenizer = load_tokenizer(Path(config.model))
    engine = UrlEngine(config.eval_url or "", config.served_model_name, tokenizer, config.max_batch_size)
    return engine, {"model": engine.model, "engine": f"server {engine.url}", **checkpoint(config)}


def _engine(config: EvalConfig) -> tuple[Engine, dict[str, Any]]:
    from mswift.infer.backends import EngineConfig, named_adapters, open_engine
    from mswift.infer.engine_args import engine_args

    adapters = named_adapters(config.adapters)
    if len(adapters) > 1:
        raise ConfigError(f"--adapters {' '.join(config.adapters)}: one adapter is scored at a time")
    opening = EngineConfig(
        model=Path(str(config.model)),
        adapters=adapters,
        torch_dtype=config.torch_dtype,
        device=config.device,
        max_num_seqs=config.max_batch_size,
        options=engine_args(config.infer_backend, config.engine_args),
    )
    engine = open_engine(config.infer_backend, opening)
    name = " + ".join([str(config.model), *map(str, adapters.values())])
    return engine, {"model": name, "engine": config.infer_backend, **checkpoint(config)}


def checkpoint(config: EvalConfig) -> dict[str, Any]:
    """The hash of the files that answer; with a server they are whatever --model says they are."""
    if config.model is None:
        return {}
    from mswift.infer.backends import named_adapters

    directories = [Path(config.model), *named_adapters(config.adapters).values()]
    return {"checkpoint_blake3": results.checkpoint_hash(directories)}


def _limit(model: Path) -> int | None:
    """Tokens of the model's longest input, by config.json."""
    import json

    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("text_config", config).get("max_position_embeddings")
    return int(found) if found else None
