"""A model of GPTQ or AWQ weights for transformers, which reads those only with libraries of their own: dequantised."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mswift.converters.catalog import read_config
from mswift.converters.quantization import FIELD, codes_of
from mswift.converters.source import Source
from mswift.converters.sources import open_source
from mswift.parallel.engine import SOURCE_DTYPES

_TILE_BYTES = 1 << 20


def is_dequantised(model_dir: Path) -> bool:
    """Whether the weights of this directory are made here. ConfigError for codes that are not read."""
    return codes_of(read_config(model_dir)) is not None


def from_codes(model_dir: Path, **options: Any) -> Any:
    """What `from_pretrained(model_dir, **options)` of its class returns, of the dequantised weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    delattr(config, FIELD)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    source = open_source(model_dir)
    source.check_repeats()
    state = {name: _tensor(source, name) for name in source.table.hf}
    options = {name: value for name, value in options.items() if name not in ("local_files_only", "trust_remote_code")}
    loaded = kind.from_pretrained(None, config=config, state_dict=state, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.config._name_or_path = str(model_dir)
    if (model_dir / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(model_dir, local_files_only=True)
    return loaded


def _tensor(source: Source, name: str) -> Tensor:
    """One HF tensor, in the dtype of the source."""
    values = torch.empty(source.table.hf[name], dtype=SOURCE_DTYPES[source.dtype_of(name)])
    block = memoryview(values.view(-1).view(torch.uint8).numpy())
    source.stream(name, memoryview(bytearray(_TILE_BYTES)))(0, len(block), block)
    return values
