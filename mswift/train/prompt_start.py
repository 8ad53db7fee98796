"""Where virtual tokens start that are to be embeddings of real ones: of a text, or of tokens that are drawn.

As PEFT does it: a text is repeated, or cut, until there are as many tokens; its special tokens count. Shapes: n virtual
tokens, h hidden.
"""

from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from mswift.config.train import TrainConfig
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.converters.reader import WeightReader
from mswift.data.tokenizer import load_tokenizer
from mswift.errors import ConfigError
from mswift.parallel.engine import SOURCE_DTYPES
from mswift.parallel.fsdp.pieces import row_regions
from mswift.parallel.mapped import Mapped, read_rows
from mswift.tuners.other_adapters import other_config, parse_other
from mswift.tuners.peft_config import CONFIG_FILE, read_adapter_json
from mswift.tuners.prompts import EMBEDDINGS, PROMPTS, PromptConfig


class TokenStart:
    """A source of first values (`mswift.parallel.engine.AdapterSource`): what the model embeds tokens as, [n, h]."""

    def __init__(self, reader: WeightReader, ids: list[int]) -> None:
        (name,) = reader.table.hf_embeddings
        shape, pieces = reader.table.hf[name], reader.table.hf_pieces[name]
        shapes = {piece.names[1]: reader.table.megatron[piece.names[1]].shape for piece in pieces}
        mapped = Mapped(name, shape, tuple(pieces), shapes)
        self._values = torch.empty(len(ids), shape[1])
        dtype = SOURCE_DTYPES[reader.dtype_of(mapped.key)]
        for row, token in enumerate(ids):
            read_rows(mapped, row_regions(shape, token, 1), self._values[row : row + 1], reader.read, dtype=dtype)
        spec = reader.table.spec
        if spec.rounded_embedding_multiplier:  # part of transformers' embedding; other factors come behind it
            self._values = (self._values.to(dtype) * torch.tensor(spec.embedding_multiplier, dtype=dtype)).float()

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """It has exactly these tensors."""
        assert shapes == {EMBEDDINGS: tuple(self._values.shape)}, shapes

    def read(self, name: str, region: Region) -> Tensor:
        """That region of a tensor."""
        return self._values[tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))]


def token_start(config: PromptConfig, reader: WeightReader) -> TokenStart | None:
    """What `prompt_tuning_init` asks for; None: the random start that the adapter has by itself."""
    init, count = config.fields.get("prompt_tuning_init", "RANDOM"), config.num_virtual_tokens
    if init == "RANDOM":
        return None
    if init == "SAMPLE_VOCAB":
        generator = torch.Generator().manual_seed(config.seed)
        drawn = torch.randint(0, reader.table.spec.vocab_size, (count,), generator=generator)
        return TokenStart(reader, drawn.tolist())
    text = config.fields["prompt_tuning_init_text"]
    ids: list[int] = load_tokenizer(reader.hf_files)([text])["input_ids"][0]
    if not ids:
        raise ConfigError(f"--tuner_config: prompt_tuning_init_text {text!r} has no tokens")
    return TokenStart(reader, (ids * ceil(count / len(ids)))[:count])


def num_virtual_tokens(config: TrainConfig, table: ModelTable) -> int:
    """Positions that a run puts before every sequence."""
    if config.tuner_type not in PROMPTS:
        return 0
    made = other_config(config, table)
    for adapter in config.adapters:
        path = Path(adapter)
        made, _ = parse_other(read_adapter_json(path), path / CONFIG_FILE, table.spec.num_layers)
    assert isinstance(made, PromptConfig)
    return made.num_virtual_tokens
