"""The command `mswift sample`: several answers to each row, scored; the best as training data; pass@k."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mswift.config.sample import SampleConfig
from mswift.data.chat_template import read_chat_template
from mswift.errors import ConfigError
from mswift.eval.answers import pass_at_k
from mswift.eval.rewards import Reward, find_reward, reward_identity
from mswift.infer.backends import EngineConfig, named_adapters, open_engine
from mswift.infer.engine_args import engine_args
from mswift.infer.model_dir import check_model_dir
from mswift.infer.request import Completion, Request, Sampling
from mswift.infer.results import answered, fingerprint, request_hash
from mswift.infer.rows import Row, read_dataset, to_request
from mswift.infer.sampling import chosen_sampling, default_sampling


def main(config: SampleConfig) -> int:
    """Run `mswift sample`; returns the exit status."""
    reward, adapters, sampling = _check(config)
    rows = read_dataset(config.val_dataset, config.system)
    engine = open_engine(
        config.infer_backend,
        EngineConfig(
            model=Path(config.model),
            adapters=adapters,
            torch_dtype=config.torch_dtype,
            device=config.device,
            chat_template=config.chat_template,
            max_num_seqs=config.max_batch_size * config.num_samples,
            options=engine_args(config.infer_backend, config.engine_args),
        ),
    )
    template = bool(engine.tokenizer.chat_template)
    requests = [to_request(row, sampling, index, template) for index, row in enumerate(rows)]
    model = f"{fingerprint((Path(config.model), *adapters.values()))} {reward_identity(config)}"
    if config.chat_template is not None:
        model = f"{model} {engine.tokenizer.chat_template}"
    hashes = [request_hash(request, model) for request in requests]
    path = Path(config.result_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = answered(path, hashes, "model, sampling and reward")
    try:
        _answer(config, engine.generate, reward, rows, requests, hashes, kept)
    finally:
        engine.close()
    _report(config, path, kept)
    return 0


def _check(config: SampleConfig) -> tuple[Reward, dict[str, Path], Sampling]:
    check_model_dir(Path(config.model))
    if len(adapters := named_adapters(config.adapters)) > 1:
        raise ConfigError(f"--adapters {' '.join(config.adapters)}: one adapter at a time")
    read_chat_template(config.chat_template)
    for name in ("num_samples", "max_batch_size"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name} {getattr(config, name)}: at least 1")
    if wrong := [k for k in config.pass_at if not 1 <= k <= config.num_samples]:
        raise ConfigError(f"--pass_at {wrong[0]}: from 1 to --num_samples {config.num_samples}")
    if config.temperature is None and default_sampling(Path(config.model)).temperature == 0:
        config = replace(config, temperature=1.0)
    sampling = replace(chosen_sampling(config), n=config.num_samples)
    if sampling.temperature == 0 and config.num_samples > 1:
        raise ConfigError(f"--temperature 0 gives {config.num_samples} times the same answer; try --temperature 1")
    return find_reward(config), adapters, sampling


def _answer(
    config: SampleConfig,
    generate: Any,
    reward: Reward,
    rows: Sequence[Row],
    requests: Sequence[Request],
    hashes: Sequence[str],
    kept: int,
) -> None:
    from tqdm import tqdm

    with (
        Path(config.result_path).open("a", encoding="utf-8") as file,
        tqdm(total=len(rows), initial=kept, unit="row", disable=None) as bar,
    ):
        for start in range(kept, len(rows), config.max_batch_size):
            part = range(start, min(start + config.max_batch_size, len(rows)))
            completions: list[Completion] = generate([requests[index] for index in part])
            for place, index in enumerate(part):
                own = completions[place * config.num_samples : (place + 1) * config.num_samples]
                file.write(_line(rows[index], own, reward, hashes[index]))
            file.flush()
            bar.update(len(part))


def _line(row: Row, completions: Sequence[Completion], reward: Reward, row_hash: str) -> str:
    question: dict[str, Any] = {"prompt": row.prompt} if row.messages is None else {"messages": list(row.messages)}
    asked = row.prompt if row.messages is None else str(row.messages[-1]["content"])
    texts = [completion.text for completion in completions]
    scores = reward(asked or "", texts, row.label)
    samples = [
        {
            "response": one.text,
            "score": score,
            "finish_reason": one.finish_reason,
            "completion_tokens": one.completion_tokens,
        }
        for one, score in zip(completions, scores, strict=True)
    ]
    label = {} if row.label is None else {"label": row.label}
    return json.dumps({**question, **label, "samples": samples, "hash": row_hash}, ensure_ascii=False) + "\n"


def _report(config: SampleConfig, path: Path, kept: int) -> None:
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]  # text would also end lines at U+2028
    passed = [sum(sample["score"] >= config.min_score for sample in line["samples"]) for line in lines]
    scores = [sample["score"] for line in lines for sample in line["samples"]]
    were_there = f" ({kept} were there)" if kept else ""
    print(f"{path}: {len(lines)} rows{were_there}, {len(scores)} answers, mean score {sum(scores) / len(scores):.4f}")
    for k in sorted(set(config.pass_at or (1, config.num_samples))):
        estimate = sum(pass_at_k(config.num_samples, count, k) for count in passed) / len(passed)
        print(f"pass@{k} {estimate:.4f}")
    if config.best_path is not None:
        best = list(_best(lines, config.min_score))
        target = Path(config.best_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        written = target.with_name(target.name + ".tmp")
        written.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in best), encoding="utf-8")
        os.replace(written, target)
        print(f"{target}: the best answers of {len(best)} rows")


def _best(lines: Iterable[dict[str, Any]], min_score: float) -> Iterable[dict[str, Any]]:
    for line in lines:
        sample = max(line["samples"], key=lambda one: one["score"])  # of equal ones the first
        if sample["score"] >= min_score:
            question = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
            answer = {"role": "assistant", "content": sample["response"]}
            yield {"messages": [*question, answer], "score": sample["score"]}
