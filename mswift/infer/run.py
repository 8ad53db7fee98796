"""The command `mswift infer`: a chat, prompts, or a data set to a file."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from mswift.agent.formats import FORMATS
from mswift.config.infer import InferConfig
from mswift.data.chat_template import read_chat_template
from mswift.errors import ConfigError
from mswift.infer.backends import EngineConfig, named_adapters, open_engine
from mswift.infer.chat import Chat, show
from mswift.infer.engine_args import engine_args
from mswift.infer.model_dir import check_model_dir
from mswift.infer.request import Engine, Message, Request, Sampling
from mswift.infer.results import answer_rows, fingerprint
from mswift.infer.rows import Row, plain_text, read_dataset, stream_seed, to_request, user_turn
from mswift.infer.sampling import chosen_sampling
from mswift.tuners.peft_config import base_note, check_adapter_dir


def main(config: InferConfig) -> int:
    """Run `mswift infer`; returns the exit status. What needs no model is refused before loading."""
    _check(config)
    agent = FORMATS[config.agent_template] if config.agent_template else None
    rows = read_dataset(config.val_dataset, config.system, agent) if config.val_dataset else []
    sampling = chosen_sampling(config)
    with contextlib.closing(_load(config)) as engine:
        for adapter in named_adapters(config.adapters).values():
            if (note := base_note(adapter, Path(config.model))) is not None:
                print(note, file=sys.stderr)
        return _answer(config, engine, sampling, rows)


def _answer(config: InferConfig, engine: Engine, sampling: Sampling, rows: Sequence[Row]) -> int:
    template = config.use_chat_template and bool(engine.tokenizer.chat_template)
    if not template:
        _explain_plain_text(config)
    if config.val_dataset:
        return _dataset(config, engine, sampling, rows, template)
    if config.prompt:
        return _prompts(config, engine, sampling, template)
    return _chat(config, engine, sampling, template)


def _check(config: InferConfig) -> None:
    check_model_dir(Path(config.model))
    if len(config.adapters) > 1:
        raise ConfigError(
            f"--adapters {' '.join(config.adapters)}: one adapter at a time; `mswift deploy --adapters a=DIR b=DIR` "
            "answers with several side by side, `mswift merge` folds several LoRAs into one model, in order"
        )
    adapters = named_adapters(config.adapters)
    for adapter in adapters.values():
        check_adapter_dir(adapter)
    if config.prompt and config.val_dataset:
        raise ConfigError("--prompt and --val_dataset: give one of them")
    if bool(config.val_dataset) != (config.result_path is not None):
        given, other = ("val_dataset", "result_path") if config.val_dataset else ("result_path", "val_dataset")
        raise ConfigError(
            f"--{given} needs --{other}; for instance --val_dataset test.jsonl --result_path results.jsonl"
        )
    if config.result_path is not None and Path(config.result_path).is_dir():
        raise ConfigError(
            f"--result_path {config.result_path} is a folder; name a file: "
            f"--result_path {Path(config.result_path) / 'results.jsonl'}"
        )
    if config.chat_template is not None and not config.use_chat_template:
        raise ConfigError(
            f"--chat_template {config.chat_template} with --use_chat_template false, which does without: leave one out"
        )
    read_chat_template(config.chat_template)
    engine_args(config.infer_backend, config.engine_args)
    if config.agent_template is not None and not (config.val_dataset and config.use_chat_template):
        raise ConfigError(
            f"--agent_template {config.agent_template} is for the tools of rows that a chat template writes: it needs "
            "--val_dataset, and does not go with --use_chat_template false"
        )
    if config.max_batch_size < 1:
        raise ConfigError(f"--max_batch_size {config.max_batch_size}: at least 1; try 8")


def _load(config: InferConfig) -> Engine:
    return open_engine(
        config.infer_backend,
        EngineConfig(
            model=Path(config.model),
            adapters=named_adapters(config.adapters),
            torch_dtype=config.torch_dtype,
            device=config.device,
            chat_template=config.chat_template,
            max_num_seqs=config.max_batch_size,
            options=engine_args(config.infer_backend, config.engine_args),
        ),
    )


def _explain_plain_text(config: InferConfig) -> None:
    if config.system is not None:
        raise ConfigError(
            f"--system needs a chat template, and none is in use ({config.model}); write it in the prompt instead"
        )
    if config.use_chat_template:
        print(f"{config.model} has no chat template: text is continued as it stands", file=sys.stderr)


def _prompts(config: InferConfig, engine: Engine, sampling: Sampling, template: bool) -> int:
    """Answer each prompt alone, streamed."""
    for index, prompt in enumerate(config.prompt):
        if len(config.prompt) > 1:
            print(f"> {prompt}")
        row = Row(f"--prompt {prompt!r}", user_turn(prompt, config.system), None, None, None)
        if show(engine, to_request(row, sampling, index, template))[1] is None:
            raise KeyboardInterrupt
    return 0


def _dataset(config: InferConfig, engine: Engine, sampling: Sampling, rows: Sequence[Row], template: bool) -> int:
    from tqdm import tqdm

    requests = [to_request(row, sampling, index, template) for index, row in enumerate(rows)]
    path = Path(config.result_path or "")
    model = fingerprint((Path(config.model), *named_adapters(config.adapters).values()))
    if config.chat_template is not None:
        model = f"{model} {engine.tokenizer.chat_template}"
    with tqdm(total=len(rows), unit="row", disable=None) as bar:  # None: quiet where stderr is no terminal
        kept, new = answer_rows(rows, requests, engine.generate, path, model, config.max_batch_size, bar.update)
    print(f"{path}: {len(rows)} rows" + (f" ({kept} were there, {new} answered now)" if kept else ""))
    return 0


def _chat(config: InferConfig, engine: Engine, sampling: Sampling, template: bool) -> int:
    turns = 0

    def make_request(messages: Sequence[Message]) -> Request:
        nonlocal turns
        turns += 1
        own = Sampling(**{**vars(sampling), "seed": stream_seed(sampling.seed, turns)})
        if template:
            return Request(messages=tuple(messages), sampling=own)
        return Request(prompt=plain_text(messages[-1:], "chat"), sampling=own)

    first: tuple[Message, ...] = ({"role": "system", "content": config.system},) if config.system is not None else ()
    return Chat(engine, make_request, first, markdown=config.markdown).run()
