"""Tuners that change hidden states, on the engine of transformers models: whole and fp32 on every rank."""

from torch import nn

from mswift.converters.plan import ModelTable
from mswift.parallel.fsdp.methods import MethodAdapters
from mswift.parallel.fsdp.prompts import PromptAdapters
from mswift.parallel.fsdp.xlora import XloraAdapters
from mswift.parallel.mapped import whole
from mswift.tuners.hidden import HiddenConfig, layer_prefix
from mswift.tuners.hidden_modules import attach
from mswift.tuners.other_adapters import OtherConfig
from mswift.tuners.prompts import PromptConfig
from mswift.tuners.xlora import XloraConfig

_STORED = "adapter."


class HiddenAdapters(MethodAdapters):
    """As adapters of PEFT's methods are: nothing of a layer is replaced, and nothing is kept beside what is trained."""

    def __init__(self, model: nn.Module, table: ModelTable, config: HiddenConfig) -> None:
        self.base_names = {name: name for name, _ in model.named_parameters()}
        model.requires_grad_(False)
        self.replicated = attach(model, layer_prefix(table), config, table.spec.hidden_size)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.replicated.items()}
        assert shapes == config.shapes(table)
        self.saved = {name: whole(name, _STORED + name, shape) for name, shape in shapes.items()}
        self.drops, self._constants, self._budget = False, {}, None


def adapters_in(
    model: nn.Module, table: ModelTable, config: OtherConfig, modules_to_save: tuple[str, ...]
) -> MethodAdapters:
    """Put an adapter that is no LoRA into the model, and freeze the rest."""
    if isinstance(config, HiddenConfig):
        return HiddenAdapters(model, table, config)
    if isinstance(config, PromptConfig):
        return PromptAdapters(model, table, config)
    if isinstance(config, XloraConfig):
        return XloraAdapters(model, table, config)
    return MethodAdapters(model, table, config, modules_to_save)
