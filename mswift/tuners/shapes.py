"""Names and shapes of everything that an adapter holds, as its adapter_config.json promises them for a model."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mswift.converters.adapters import NORM, SAVABLE, HfLinear, all_linears, saved_shapes
from mswift.converters.plan import ModelTable
from mswift.converters.rule import size_of
from mswift.errors import ConfigError
from mswift.tuners.settings import PeftSettings

STACKED = "experts_stacked"
_ROUTER = "mlp.router.weight"


@dataclass(frozen=True)
class HfParameter:
    """A parameter of the HF model that PEFT adapts by itself (`target_parameters`), e.g. the stacked experts.

    module: that holds it; shape: [expert if there are several] out, in (or in, out where `transposed`).
    A is [rank * experts, in], experts apart; B is [out, rank * experts], experts next to each other.
    """

    name: str
    module: str
    num_experts: int
    in_features: int
    out_features: int
    transposed: bool = False

    def lora_shapes(self, prefix: str, rank: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of A and B, whose names begin with `prefix`."""
        rows = rank * self.num_experts
        return {
            f"{prefix}.lora_A.weight": (rows, self.in_features),
            f"{prefix}.lora_B.weight": (self.out_features, rows),
        }


def parameters(table: ModelTable) -> Iterator[HfParameter]:
    """The stacked experts and routers of a mixture of experts as transformers 5 has them, layer after layer."""
    if table.spec.moe is not None:
        yield from _parameters(in_spelling(table, STACKED))


def router_names(table: ModelTable) -> list[str]:
    """The weights of the routers, layer after layer."""
    return [] if table.spec.moe is None else [router.name for router in _parameters(table, routers_alone=True)]


def in_spelling(table: ModelTable, spelling: str) -> ModelTable:
    """The same model's table in another spelling of its family, where there is such a one."""
    if spelling not in table.family.spellings or table.spelling == spelling:
        return table
    return ModelTable(table.config, table.family, table.spec, spelling)


def _parameters(table: ModelTable, *, routers_alone: bool = False) -> Iterator[HfParameter]:
    found: dict[str, tuple[int, HfParameter]] = {}
    for tensor in table.megatron.values():
        rule, router = tensor.rule, tensor.rule.megatron.endswith(_ROUTER)
        stacked = rule.experts == "stacked" and not routers_alone
        if not (rule.in_layer and len(rule.width) == 1 and (stacked or router)):
            continue
        experts = size_of("experts", table.sizes) if rule.experts else 1
        for layer in range(table.spec.num_layers) if tensor.layer is None else (tensor.layer,):
            for part in rule.parts:
                name = part.hf.format(l=layer)
                a, b = rule.hf_shape(part, table.sizes)[-2:]
                into, out = (a, b) if rule.transposed else (b, a)
                parameter = HfParameter(name, name.rpartition(".")[0], experts, into, out, rule.transposed)
                found.setdefault(name, (layer, parameter))
    for _, parameter in sorted(found.values(), key=lambda entry: entry[0]):
        yield parameter


def adapter_table(table: ModelTable, names: Collection[str]) -> ModelTable:
    """The table in the spelling of experts that an adapter's names speak of: one linear each, else stacked."""
    if table.spec.moe is None or STACKED not in table.family.spellings:
        return table
    for spelling in table.family.spellings:
        own = in_spelling(table, spelling)
        if any(linear.expert is not None and linear.lora_names()[0] in names for linear in all_linears(own)):
            return own
    return in_spelling(table, STACKED)


def adapted_linears(table: ModelTable, settings: PeftSettings) -> list[HfLinear]:
    """The linears that get an A and a B of their own."""
    return [linear for linear in all_linears(table) if settings.selects(linear.name)]


def adapted_parameters(table: ModelTable, settings: PeftSettings) -> dict[str, HfParameter]:
    """Prefix of the names of A and B -> the parameter.

    PEFT wraps a module once for each of its parameters: the last one is outermost, the others lie in `base_layer`s.
    A router that is named as a module was a linear, in transformers 4.
    """
    modules: dict[str, list[HfParameter]] = {}
    for parameter in parameters(table):
        if settings.selects_parameter(parameter.name):
            modules.setdefault(parameter.module, []).append(parameter)
    for router in _parameters(table, routers_alone=True):
        if settings.selects(router.module):
            modules.setdefault(router.module, [router])
    return {
        module + ".base_layer" * depth: parameter
        for module, adapted in modules.items()
        for depth, parameter in enumerate(reversed(adapted))
    }


def promised_shapes(table: ModelTable, settings: PeftSettings) -> dict[str, tuple[int, ...]]:
    """What a configuration promises on this model: LoRA of what it selects, and modules_to_save.

    Raises ConfigError when it selects nothing of the model.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in adapted_linears(table, settings):
        shapes |= linear.lora_shapes(settings.rank_of(linear.name))
        if settings.lora_bias:
            shapes[f"{linear.name}.lora_B.bias"] = (linear.out_features,)
        if settings.dora:
            shapes[f"{linear.name}.lora_magnitude_vector"] = (linear.out_features,)
    for prefix, parameter in adapted_parameters(table, settings).items():
        _refuse_on_parameters(settings, parameter)
        shapes |= parameter.lora_shapes(prefix, settings.rank_of(parameter.name))
    if not shapes:
        raise ConfigError(f"{settings.path}: target_modules={settings.target_modules!r} match no linear of the model")
    saved = tuple(name for name in (*SAVABLE, NORM) if name in settings.modules_to_save)
    if len(saved) != len(set(settings.modules_to_save)):
        raise ConfigError(
            f"{settings.path}: modules_to_save={settings.modules_to_save!r}; known: {' '.join((*SAVABLE, NORM))}"
        )
    return shapes | saved_shapes(table, saved)


def _refuse_on_parameters(settings: PeftSettings, parameter: HfParameter) -> None:
    for name, on in (("use_dora", settings.dora), ("lora_bias", settings.lora_bias)):
        if on:
            raise ConfigError(
                f"{settings.path}: {name} with target_parameters ({parameter.name}): PEFT has no such adapter"
            )
