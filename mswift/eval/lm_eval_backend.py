"""lm-evaluation-harness as a library: its tasks and metrics on local files, for an engine, a server, or itself."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mswift.config.eval import EvalConfig
from mswift.errors import ConfigError
from mswift.eval import documents, ifeval, results
from mswift.eval.model import EvalModel, encode
from mswift.eval.results import TaskResult, prompt_sha256
from mswift.eval.server import arguments_of
from mswift.eval.statistics import Metric
from mswift.eval.task import Settings

_READERS: tuple[tuple[str, Callable[[Path], list[documents.Doc]]], ...] = (
    ("arc", documents.arc), ("mmlu", documents.mmlu), ("gsm8k", documents.gsm8k), ("bbh", documents.bbh),
    ("humaneval", documents.humaneval), ("ifeval", documents.ifeval),
)  # fmt: skip
"""How files become rows as lm-eval's tasks take them, by the beginning of the task's name; others stay as they are."""


def evaluate(config: EvalConfig, settings: Settings) -> tuple[list[TaskResult], dict[str, Any]]:
    """Results of lm-eval's evaluator, sample by sample. Raises ConfigError."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--eval_backend lm_eval needs the package {error.name}: pip install 'mswift[eval]' (lm-eval 0.4.13)"
        ) from None
    manager = TaskManager()
    folder = Path(config.eval_output_dir) / "lm_eval"
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(_dataset(given) for given in config.eval_dataset)
    for name, file in files.items():
        if name.startswith("ifeval"):
            ifeval.check([] if file is None else documents.ifeval(file)[: config.eval_limit])
    examples = dict(_dataset(given) for given in config.fewshot_dataset)
    specs = [_spec(name, file, examples.get(name), manager, folder) for name, file in files.items()]
    arguments = arguments_of(config)
    with _opened(config, arguments) as (model, about):
        found = _run(lm_eval.simple_evaluate, config, arguments, model, specs, manager)
    task_results = [
        _task_result(name, files.get(name), found["samples"][name], found["n-shot"].get(name, 0))
        for name in found["samples"]
    ]
    return task_results, {**about, "reported_by_lm_eval": found["results"]}


def _run(
    simple_evaluate: Callable[..., Any],
    config: EvalConfig,
    arguments: dict[str, Any],
    model: dict[str, Any],
    specs: Sequence[str],
    manager: Any,
) -> dict[str, Any]:
    generation = {"temperature": config.temperature, "do_sample": config.temperature > 0, "top_p": config.top_p}
    changed = generation if config.temperature > 0 else {}
    if config.max_new_tokens is not None:
        changed = {**changed, "max_gen_toks": config.max_new_tokens}
    try:
        found = simple_evaluate(
            **model,
            tasks=list(specs),
            num_fewshot=config.num_fewshot,
            limit=config.eval_limit,
            apply_chat_template=config.use_chat_template,
            gen_kwargs=changed or None,
            task_manager=manager,
            bootstrap_iters=0,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
            log_samples=True,
            **arguments,
        )
    except (KeyError, ValueError, AssertionError, NotImplementedError, OSError) as error:
        raise ConfigError(f"--eval_backend lm_eval: {' '.join(str(error).split())[:600]}") from error
    return dict(found)


def _dataset(given: str) -> tuple[str, Path | None]:
    name, equals, file = given.partition("=")
    if equals and not Path(file).exists():
        raise ConfigError(f"--eval_dataset {given}: no such file")
    return name, Path(file) if equals else None


def _spec(name: str, file: Path | None, examples: Path | None, manager: Any, folder: Path) -> str:
    """A task of lm-eval as it is, or with its rows from a file: a YAML file that includes lm-eval's own."""
    entry = manager.task_index.get(name)
    if entry is None or (file is not None and entry.yaml_path is None):
        raise ConfigError(f"--eval_dataset {name}: lm-eval has no such task; `lm_eval ls tasks` lists them")
    if file is None:
        return name
    rows = {"test": _rows(name, file, folder / f"{name}.jsonl")}
    if examples is not None:
        rows["fewshot"] = _rows(name, examples, folder / f"{name}-fewshot.jsonl")
    task = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": rows, "cache_dir": str((folder / "cache").absolute())},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "fewshot" if examples is not None else None,
        "fewshot_config": {"sampler": "first_n"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task, indent=2), encoding="utf-8")  # JSON is YAML
    return str(path.absolute())


def _rows(name: str, file: Path, written: Path) -> str:
    reader = next((reader for start, reader in _READERS if name.startswith(start)), None)
    docs = reader(file) if reader else [doc for _, doc in documents.json_lines(file)]
    written.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    return str(written.absolute())


class _opened:
    """lm-eval's `model` and `model_args`, and what the results say of them."""

    def __init__(self, config: EvalConfig, arguments: dict[str, Any]) -> None:
        self._config, self._arguments = config, arguments
        self._context: Any = None

    def __enter__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from mswift.eval.run import checkpoint, opened

        config = self._config
        if name := self._arguments.pop("model", None):
            if config.model is None:
                raise ConfigError(f"--eval_args model={name} needs --model")
            own = {"pretrained": config.model, **({"dtype": config.torch_dtype} if config.torch_dtype else {})}
            if config.adapters:
                own["peft"] = config.adapters[0]
            device = {} if config.device == "auto" else {"device": config.device}
            about = {"model": config.model, "engine": f"lm-eval's {name}", **checkpoint(config)}
            model = {"model": name, "model_args": {**own, **self._arguments.pop("model_args", {})}, **device}
            return {"batch_size": config.max_batch_size, **model}, about
        self._context = opened(config)
        model, about = self._context.__enter__()
        if config.eval_url is not None:
            return _server(config, model), {**about, "engine": f"{about['engine']}, by lm-eval's client"}
        return {"model": _engine_model(model, config.use_chat_template, config.seed)}, about

    def __exit__(self, *error: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*error)


def _server(config: EvalConfig, model: EvalModel) -> dict[str, Any]:
    """lm-eval's own client of OpenAI's protocol."""
    engine: Any = model.engine
    arguments = {"model": engine.model, "num_concurrent": config.max_batch_size, "max_retries": 1}
    if engine.tokenizer is None:
        url = f"{engine.url}/chat/completions"
        return {"model": "local-chat-completions", "model_args": {**arguments, "base_url": url}}
    start = engine.tokenizer.bos_token_id
    arguments |= {
        "base_url": f"{engine.url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": config.model,
        "add_bos_token": start is not None and encode(engine.tokenizer, "a")[:1] == [start],
        **({"max_length": model.max_length} if model.max_length else {}),
    }
    return {"model": "local-completions", "model_args": arguments}


def _engine_model(model: EvalModel, chat: bool, seed: int) -> Any:
    """An engine of mswift as a model of lm-eval; seed: of all its draws."""
    from lm_eval.api.model import LM
    from lm_eval.models.utils import handle_stop_sequences

    from mswift.infer.request import Request, Sampling
    from mswift.infer.rows import stream_seed

    class EngineModel(LM):  # type: ignore[misc]
        """Likelihoods and answers of the engine; tokens, cuts and stops are EvalModel's."""

        tokenizer_name = "mswift"

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            scores = model.score([request.args for request in requests], lambda count: None)
            return [(score.log_probability, score.is_greedy) for score in scores]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError("perplexity tasks: give --eval_args model=hf")

        def generate_until(self, requests: list[Any]) -> list[str]:
            asked = [
                Request(prompt=context, sampling=_sampling(more, stream_seed(seed, index)))
                for index, (context, more) in enumerate(request.args for request in requests)
            ]  # a task may ask the same several times: each has a stream of its own
            answers, _ = model.generate(asked, lambda count: None)
            return [given[0].text for given in answers]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                model.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        def chat_template(self, chat_template: bool | str = False) -> str:
            return str(model.tokenizer.chat_template) if chat else ""

    def _sampling(given: dict[str, Any], own_seed: int) -> Sampling:
        stops = handle_stop_sequences(given.get("until"), eos=model.tokenizer.eos_token)
        sample = bool(given.get("do_sample", False))
        return Sampling(
            max_new_tokens=int(given.get("max_gen_toks", 256)),
            temperature=float(given.get("temperature", 1.0)) if sample else 0.0,
            top_p=float(given.get("top_p", 1.0)),
            seed=own_seed,
            stop=tuple(stop for stop in stops if stop),
        )

    return EngineModel()


def _task_result(name: str, file: Path | None, samples: Sequence[dict[str, Any]], num_fewshot: int) -> TaskResult:
    """lm-eval's samples, one for each row and filter, as rows with the values of all filters."""
    rows: dict[int, dict[str, Any]] = {}
    names: list[str] = []
    for sample in samples:
        row = rows.setdefault(
            sample["doc_id"],
            {
                "id": str(sample["doc_id"]),
                "prompt_sha256": sample["prompt_hash"],
                "answers": sample["resps"],
                "values": {},
            },
        )
        for metric in sample["metrics"]:
            if not isinstance(sample[metric], bool | int | float):
                continue  # adds up in a way of its own: reported_by_lm_eval has the sum
            full = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            names += [] if full in names else [full]
            row["values"][full] = float(sample[metric])
    ordered = [rows[index] for index in sorted(rows)]
    binary = {n: all(row["values"].get(n) in (0.0, 1.0) for row in ordered) for n in names}
    return TaskResult(
        name=name,
        file=str(file) if file else f"lm-eval's {name}",
        file_sha256=results.file_sha256(file) if file else "",
        num_fewshot=num_fewshot,
        prompts_sha256=prompt_sha256([row["prompt_sha256"] for row in ordered]),
        num_cut=0,
        metrics=tuple(Metric(n, binary=binary[n]) for n in names),
        samples=ordered,
    )
