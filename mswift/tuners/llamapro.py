"""LLaMA-Pro: a model with more blocks, of which only the new ones are trained (Wu et al. 2024, arXiv 2401.02415).

The layers are cut into groups of equal size, and behind each group stand copies of its last layer whose output
projections are zero: what they add to the residual stream is 0, so that the larger model computes bit for bit what the
smaller one does. It is a model of its architecture like any other. No torch.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from mswift.converters.decode import CodePart
from mswift.converters.layout import Region
from mswift.converters.plan import DTYPE_BYTES, ModelTable, table_for
from mswift.converters.reader import WeightReader
from mswift.converters.rule import LAYERS
from mswift.converters.spec import ModelSpec
from mswift.errors import ConfigError
from mswift.topology import divisors
from mswift.tuners.part import Part

_COUNT = "num_hidden_layers"
_OUTPUT = re.compile(r"\.(linear_proj|linear_fc2|out_proj)\.(weight|bias)$")
_KINDS = {True: "sliding_attention", False: "full_attention"}
_LETTERS = "hybrid_override_pattern"
_OF_EACH_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")


@dataclass(frozen=True)
class Expansion:
    """num_new blocks in a model of num_layers, equally many behind each of num_groups groups."""

    num_layers: int
    num_new: int
    num_groups: int

    @cached_property
    def layers(self) -> tuple[tuple[int, bool], ...]:
        """Of every layer of the larger model (the layer of the smaller one that it is, whether it is a new copy)."""
        size, copies = self.num_layers // self.num_groups, self.num_new // self.num_groups
        found: list[tuple[int, bool]] = []
        for layer in range(self.num_layers):
            found += [(layer, False), *[(layer, True)] * (copies * ((layer + 1) % size == 0))]
        return tuple(found)

    @property
    def new(self) -> tuple[int, ...]:
        """Numbers of the new layers in the larger model."""
        return tuple(number for number, (_, is_new) in enumerate(self.layers) if is_new)


def expansion(num_layers: int, num_new: int, num_groups: int | None) -> Expansion:
    """The places of the new blocks in a model of `num_layers`; one behind each group where num_groups is None.

    ConfigError for numbers that do not divide.
    """
    groups = num_groups or num_new
    if num_layers % groups:
        flag = (
            f"--llamapro_num_groups {groups}" if num_groups else f"--llamapro_num_new_blocks {num_new} (as many groups)"
        )
        fitting = [size for size in divisors(num_layers) if num_new % size == 0]
        raise ConfigError(
            f"{flag} does not divide the {num_layers} layers of --model: use --llamapro_num_groups "
            f"{' or '.join(map(str, fitting))}, or as many new blocks as divide them: "
            f"{', '.join(map(str, divisors(num_layers)))}"
        )
    if num_new % groups:
        raise ConfigError(
            f"--llamapro_num_new_blocks {num_new} is not a multiple of --llamapro_num_groups {groups}: use "
            f"--llamapro_num_new_blocks {-(-num_new // groups) * groups}"
        )
    return Expansion(num_layers, num_new, groups)


def within(num_layers: int, num_new: int, num_groups: int | None) -> Expansion:
    """The expansion whose larger model has `num_layers`."""
    return expansion(num_layers - num_new, num_new, num_groups)


def expanded_config(config: Mapping[str, Any], table: ModelTable, places: Expansion) -> dict[str, Any]:
    """config.json of the larger model: its number of layers, and the lists with an entry for each layer.

    ConfigError where a layer would not be of the kind of the one that it is a copy of.
    """
    if table.spec.mtp_layers:
        raise ConfigError(
            f"--tuner_type llamapro: --model has {len(table.spec.mtp_layers)} multi-token-prediction layers, which "
            "would be lost: use --backend megatron --tuner_type full, or --tuner_type lora"
        )
    larger = dict(config) | {_COUNT: len(places.layers)}
    for name in _OF_EACH_LAYER:
        if isinstance(config.get(name), list):
            larger[name] = [config[name][layer] for layer, _ in places.layers]
    if isinstance(letters := config.get(_LETTERS), str) and len(letters) == places.num_layers:
        larger[_LETTERS] = "".join(letters[layer] for layer, _ in places.layers)
    if not _is_expanded(_spec(larger), table.spec, places) and "layer_types" not in config:
        kinds = [_KINDS[table.spec.layer(layer).window is not None] for layer, _ in places.layers]
        larger["layer_types"] = kinds
    if not _is_expanded(_spec(larger), table.spec, places):
        raise ConfigError(
            f"--tuner_type llamapro: of model_type {table.spec.model_type!r} the number of a layer decides what it "
            "is, so that a copy would be another layer: use --tuner_type full or lora"
        )
    return larger


def _spec(config: Mapping[str, Any]) -> ModelSpec | None:
    try:
        return table_for(dict(config)).spec
    except ConfigError:
        return None


def _is_expanded(larger: ModelSpec | None, spec: ModelSpec, places: Expansion) -> bool:
    if larger is None or replace(larger, num_layers=1, layers=()) != replace(spec, num_layers=1, layers=()):
        return False
    return all(larger.layer(n) == spec.layer(layer) for n, (layer, _) in enumerate(places.layers))


class ExpandedReader(WeightReader):
    """A model with the new blocks of an expansion: copies of layers of `inner`, output projections zero."""

    def __init__(self, inner: WeightReader, num_new: int, num_groups: int | None) -> None:
        self.inner = inner
        self.places = expansion(inner.table.spec.num_layers, num_new, num_groups)
        self.config = expanded_config(inner.config, inner.table, self.places)
        self.table = table_for(self.config, inner.table.hf)
        self.dtype, self.hf_files, self.num_left_out = inner.dtype, inner.hf_files, 0

    @property
    def bytes_read(self) -> int:
        """As of the model that is expanded."""
        return self.inner.bytes_read

    def dtype_of(self, key: str) -> str:
        """That of the tensor that it is a copy of."""
        return self.inner.dtype_of(self._read_from(key))

    def side_files(self) -> dict[str, bytes]:
        """As of the model that is expanded, with the larger config.json."""
        files = self.inner.side_files()
        content = json.loads(files["config.json"])
        changed = {name: value for name, value in self.config.items() if self.inner.config.get(name) != value}
        files["config.json"] = (json.dumps(content | changed, indent=2, ensure_ascii=False) + "\n").encode()
        return files

    def read(self, key: str, region: Region, out: memoryview, part: CodePart | None = None) -> None:
        """Layer by layer from the files, and zeros."""
        assert part is None, key
        tensor, data = self.table.megatron[key], out.cast("B")
        if not tensor.rule.in_layer:
            self.inner.read(key, region, out)
            return
        if not tensor.stacked:
            self._read_layer(key, self._read_from(key), tensor.layer, region, data)
            return
        size = len(data) // max(region.sizes[0], 1)
        for place in range(region.sizes[0]):
            layer = region.offsets[0] + place
            source = Region((self.places.layers[layer][0], *region.offsets[1:]), (1, *region.sizes[1:]))
            self._read_layer(key, key, layer, source, data[place * size : (place + 1) * size])

    def _read_layer(self, key: str, source: str, layer: int | None, region: Region, out: memoryview) -> None:
        assert layer is not None
        if self.places.layers[layer][1] and _OUTPUT.search(key):
            assert len(out) == region.num_elements * DTYPE_BYTES[self.dtype_of(key)]
            out[:] = bytes(len(out))
        else:
            self.inner.read(source, region, out)

    def _read_from(self, key: str) -> str:
        """The key of the smaller model that a tensor is read from."""
        tensor = self.table.megatron[key]
        if tensor.layer is None or not tensor.rule.in_layer:
            return key
        return self.inner.table.key(
            LAYERS + key.removeprefix(f"{LAYERS}{tensor.layer}."), self.places.layers[tensor.layer][0]
        )


def prefixes(table: ModelTable, places: Expansion) -> tuple[str, ...]:
    """Beginnings of the HF names of what the new layers hold; `table`: of the larger model."""
    rule = next(tensor.rule for tensor in table.megatron.values() if tensor.rule.in_layer)
    before = rule.parts[0].hf.partition("{l}")[0]
    return tuple(f"{before}{number}." for number in places.new)


def new_blocks(table: ModelTable, num_new: int, num_groups: int | None) -> Part:
    """What of the larger model is trained."""
    return Part(freeze_regex=".", trainable=prefixes(table, within(table.spec.num_layers, num_new, num_groups)))


def trained_elements(table: ModelTable, num_new: int, num_groups: int | None) -> int:
    """Elements of the new blocks; `table`: of the larger model."""
    mine = prefixes(table, within(table.spec.num_layers, num_new, num_groups))
    return sum(prod(shape) for name, shape in table.hf.items() if name.startswith(mine))
