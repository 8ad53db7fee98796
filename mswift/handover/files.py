"""What can be said of a model directory without computing: names, shapes, dtypes, fields, files, bits. Torch-free."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mswift import rundir
from mswift.converters.catalog import read_config
from mswift.converters.export_config import missing_for_vllm
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.sources import open_source
from mswift.converters.verify import verify, verify_record
from mswift.converters.without_effect import WITHOUT_EFFECT
from mswift.data.chat_template import own_template
from mswift.data.tokenizer import check_tokenizer_files
from mswift.errors import CheckpointError, ConfigError
from mswift.infer.vllm_options import other_model_in_vllm
from mswift.tuners.verify import verify_adapters

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def file_problems(model: Path, run: Path | None, *, chats: bool) -> list[str]:
    """What is wrong with a model directory, in words; [] if nothing. run: the checkpoint that it was exported from."""
    return [*_fields(model, run), *_weights(model, run), *_beside(model, chats)]


def adapter_problems(adapter: Path, model: Path, run: Path | None) -> list[str]:
    """The same of an adapter on that base."""
    try:
        return verify_adapters(adapter, run, str(model)).differences if run is not None else []
    except (CheckpointError, ConfigError) as error:
        return [str(error)]


def _fields(model: Path, run: Path | None) -> Iterator[str]:
    try:
        config = read_config(model)
    except (CheckpointError, ConfigError) as error:
        yield str(error)
        return
    for name, value in missing_for_vllm(config).items():
        yield f"config.json lacks {name}, which vLLM reads and would take otherwise: it must be {json.dumps(value)}"
    yield from other_model_in_vllm(config)
    if run is None or not (run / rundir.HF_FILES / "config.json").is_file():
        return
    trained: Mapping[str, Any] = read_config(run / rundir.HF_FILES)
    added = missing_for_vllm(trained)
    for name in sorted((config.keys() | trained.keys()) - WITHOUT_EFFECT):
        mine, theirs = config.get(name), trained.get(name, added.get(name))
        if mine != theirs:
            yield f"config.json: {name} is {json.dumps(mine)}, it was trained with {json.dumps(theirs)}"


def _weights(model: Path, run: Path | None) -> Iterator[str]:
    try:
        source = open_source(model)  # names and shapes, all of them and no others
        source.check_repeats()  # tied weights
        config, stored = source.config, {source.dtype_of(name) for name in source.table.hf_order}
        source.close()
        said = config.get("dtype", config.get("torch_dtype"))
        if said is not None and _NAMES.get(str(said)) not in stored:
            yield f"config.json: dtype is {said}, the tensors are {', '.join(sorted(stored))}"
        if (model / MANIFEST).is_file():
            yield from verify_record(model).differences
        if run is not None:
            yield from verify(run, model).differences
    except (CheckpointError, ConfigError) as error:
        yield str(error)


def _beside(model: Path, chats: bool) -> Iterator[str]:
    try:
        check_tokenizer_files(model)
    except ConfigError as error:
        yield str(error)
    if not (model / "generation_config.json").is_file():
        yield "generation_config.json is missing: engines would not know how answers end"
    small = {path.name: path.read_bytes() for path in model.iterdir() if path.suffix in (".json", ".jinja")}
    if chats and own_template(small) is None:
        yield (
            "there is no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); of a model "
            "that is none to chat with, say --use_chat_template false"
        )
