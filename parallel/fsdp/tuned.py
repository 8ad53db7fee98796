"""A transformers model as a run trains it, on no device yet: tuner, what is frozen, and where each parameter lies.

An engine makes it, gives its parameters memory, and cuts them over ranks in its own way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from mswift.converters.plan import ModelTable
from mswift.parallel.engine import DTYPES
from mswift.parallel.fsdp.adapters import add_lora, base_name, map_adapters, unwrapped
from mswift.parallel.fsdp.config import HfSettings
from mswift.parallel.fsdp.hidden import adapters_in
from mswift.parallel.fsdp.liger import check_liger, use_liger
from mswift.parallel.fsdp.methods import MethodAdapters
from mswift.parallel.fsdp.model import (
    TrainedModel,
    add_noise,
    blocks,
    compile_layers,
    copy_products,
    empty_model,
    recompute,
    saved_buffers,
)
from mswift.parallel.fsdp.pieces import map_parameters, name_in_files
from mswift.parallel.fsdp.sampled import layers_of
from mswift.parallel.mapped import Mapped, whole
from mswift.tuners.part import Part

_INNER = "inner."


@dataclass(frozen=True)
class TunedModel:
    """`model` and what its parameters are, by their names in transformers' model with its tuner.

    base: those of the checkpoint's model; saved: what a checkpoint of the run holds; trained: of these what learns;
    state_of: where the optimizer state of the trained ones lies. buffers: what a checkpoint of full weights holds
    beside parameters, by the names before a tuner changed the model. layer_of: number of the layer, where LISA trains.
    """

    model: TrainedModel
    base: Mapping[str, Mapped]
    saved: Mapping[str, Mapped]
    trained: Mapping[str, Mapped]
    state_of: Mapping[str, Mapped]
    buffers: Mapping[str, Mapped]
    layer_of: Mapping[str, int]
    method: MethodAdapters | None

    def parameters(self) -> dict[str, nn.Parameter]:
        """As they are now, by name."""
        return {name.removeprefix(_INNER): parameter for name, parameter in self.model.named_parameters()}

    def sources(self) -> dict[Tensor, frozenset[str]]:
        """The tensors of files that make each parameter of the checkpoint's model."""
        own = self.parameters()
        return {own[name]: frozenset(piece.names[0] for piece in mapped.maps) for name, mapped in self.base.items()}

    def drops(self, config: HfSettings) -> bool:
        """Whether adapters have dropout."""
        lora = config.lora
        return self.method.drops if self.method is not None else lora is not None and bool(lora.settings.dropout)

    def kept_buffers(self) -> dict[str, Tensor]:
        """Those of `buffers`, as they are now."""
        now = {unwrapped(name.removeprefix(_INNER)): buffer for name, buffer in self.model.named_buffers()}
        return {name: now[name] for name in self.buffers}


def tuned_model(table: ModelTable, config: HfSettings, device: torch.device) -> TunedModel:
    """The model without memory for its parameters, with its tuner in it; `device`: where it will compute.

    ConfigError for a model that transformers does not compute, or whose parameters the table does not know.
    """
    torch.manual_seed(config.seed)
    dtype = DTYPES[config.dtype] if config.trains_adapter else torch.float32
    if config.liger_kernels:
        check_liger(device)
    inner = empty_model(table, dtype)
    if config.liger_kernels:
        use_liger(inner, table.spec.model_type)
    kept = saved_buffers(inner)
    places = map_parameters({name: tuple(t.shape) for name, t in (*inner.named_parameters(), *kept.items())}, table)
    if config.lora is not None:
        add_lora(inner, table, config.lora, config.trainable_modules)
    method: MethodAdapters | None = None
    if config.method is not None:
        method = adapters_in(inner, table, config.method, config.trainable_modules)
    if config.trains_adapter:
        for parameter in inner.parameters():
            if parameter.requires_grad:  # fp32 masters; computed in the dtype of the run
                parameter.data = parameter.data.float()
    before = base_name if method is None else method.base_names.get
    base = {name: places[found] for name, _ in inner.named_parameters() if (found := before(name))}
    if config.part is not None:
        _freeze(inner, config.part, base, table, DTYPES[config.dtype])
    saved = base if config.lora is None else map_adapters(inner, table, config.lora)
    if method is not None:
        saved = method.saved
    learning = {name for name, parameter in inner.named_parameters() if parameter.requires_grad}
    trained = {name: mapped for name, mapped in saved.items() if name in learning}
    state_of = trained
    if config.part is not None or config.lisa is not None:
        # a global tensor may be trained in a part of it: state goes by HF names
        state_of = {n: whole(m.name, f"of.{name_in_files(m.name, table)}", m.shape) for n, m in trained.items()}
    layer_of = layers_of(inner) if config.lisa is not None else {}
    _change_passes(inner, config, device)
    if config.recompute_keeps_products and method is not None and method.adds_in_place:
        copy_products(inner)
    model = TrainedModel(inner, table.spec, config.loss_fusion)
    buffers = {name: places[name] for name in kept}
    return TunedModel(model, base, saved, trained, state_of, buffers, layer_of, method)


def _freeze(inner: nn.Module, part: Part, base: Mapping[str, Mapped], table: ModelTable, dtype: torch.dtype) -> None:
    """Frozen parameters are kept in the dtype of the run."""
    frozen = part.frozen({name_in_files(name, table): prod(mapped.shape) for name, mapped in base.items()})
    for name, parameter in inner.named_parameters():
        if name_in_files(name, table) in frozen:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)


def _change_passes(inner: nn.Module, config: HfSettings, device: torch.device) -> None:
    """Compiled layers, layers that are computed again, noise: whatever the run asks for."""
    if config.compile_layers:
        compile_layers(blocks(inner), device)
    recompute(blocks(inner)[: config.recompute_blocks], keep_products=config.recompute_keeps_products)
    if config.neftune_alpha:
        add_noise(inner, config.neftune_alpha)
