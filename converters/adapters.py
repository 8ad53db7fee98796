"""LoRA in the space of Hugging Face modules: which linears exist, who fuses them, what an adapter holds. No torch.

A LoRA belongs to an HF linear (q_proj, gate_proj, ...): `lora_A` [r, in], `lora_B` [out, r], even where Megatron
fuses several linears into one. Names are those of a PEFT file without its `base_model.model.` prefix. Sources of the
names: the family's table, never a private list.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mswift.converters.rule import LAYERS, Rule, size_of
from mswift.converters.spec import ModelSpec
from mswift.errors import ConfigError

ALL_LINEAR = "all-linear"
EMBED, HEAD = "embed_tokens", "lm_head"
SAVABLE = {EMBED: "model.embed_tokens.weight", HEAD: "lm_head.weight"}
NORM = "norm"
"""In modules_to_save, which PEFT matches by the end of a module's name: every norm of the model."""
_GATE = "gate_weight"  # of the shared expert: a parameter, where HF has a linear
_ROUTER = "mlp.router.weight"


class Tensor(Protocol):
    """What is read of a `MegatronTensor`: its rule, its layer (None where it holds all layers)."""

    @property
    def rule(self) -> Rule: ...
    @property
    def layer(self) -> int | None: ...


class Table(Protocol):
    """What is read of a `ModelTable` (a family's table applied to one config.json)."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def hf(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def megatron(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class HfLinear:
    """One linear of the HF model, e.g. model.layers.3.self_attn.q_proj."""

    name: str
    leaf: str
    layer: int
    in_features: int
    out_features: int
    expert: int | None = None

    def lora_names(self) -> tuple[str, str]:
        return f"{self.name}.lora_A.weight", f"{self.name}.lora_B.weight"

    def lora_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        a, b = self.lora_names()
        return {a: (rank, self.in_features), b: (self.out_features, rank)}


def is_linear(rule: Rule) -> bool:
    """Whether the HF tensors of a rule are weights of linears inside layers (one an expert, where there are any).

    A router is none: transformers 5 makes it a module of its own with a parameter.
    """
    matrix = rule.in_layer and len(rule.width) == 1 and rule.experts != "stacked"
    return matrix and all(part.hf.endswith(".weight") for part in rule.parts) and not rule.megatron.endswith(_ROUTER)


def fused_linears(table: Table) -> dict[str, tuple[str, ...]]:
    """Megatron module inside a layer -> the HF leaves fused in it, in order; experts left out.

    Example: {"self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"), "mlp.linear_fc2": ("down_proj",), ...}
    """
    return {
        path: tuple(dict.fromkeys(part.hf.split(".")[-2] for part in rule.parts))
        for path, rule in _fusing_rules(table).items()
    }


def linears(table: Table) -> tuple[HfLinear, ...]:
    """Every HF linear inside the layers but those of experts, in the order of layers, then of the Megatron model."""
    return tuple(linear for linear in all_linears(table) if linear.expert is None)


def all_linears(table: Table) -> tuple[HfLinear, ...]:
    """`linears` and those of experts, where the table spells experts as one linear each (as transformers 4 does)."""
    found: dict[str, HfLinear] = {}
    for tensor in table.megatron.values():
        rule = tensor.rule
        if not is_linear(rule):
            continue
        experts = range(table.spec.moe.num_experts) if rule.experts and table.spec.moe else (None,)
        for layer in range(table.spec.num_layers) if tensor.layer is None else (tensor.layer,):
            for expert in experts:
                for part in rule.parts:
                    weight = part.hf.format(l=layer, e=expert)
                    name = weight.removesuffix(".weight")
                    out_features, in_features = table.hf[weight]
                    leaf = name.rpartition(".")[2]
                    found.setdefault(name, HfLinear(name, leaf, layer, in_features, out_features, expert))
    return tuple(sorted(found.values(), key=lambda linear: linear.layer))


def refuse_recurrent(table: Table) -> None:
    """ConfigError for a model with recurrent mixers, on which training has no adapters."""
    if table.spec.mamba is not None or table.spec.delta is not None:
        raise ConfigError(
            f"--tuner_type lora: a model of model_type {table.spec.model_type!r} has mixers that take no adapter yet; "
            "use --tuner_type full"
        )


def expand_modules_to_save(table: Table, names: Sequence[str]) -> tuple[str, ...]:
    """--modules_to_save, checked; in a tied model the two names are one matrix, so either means both."""
    for name in names:
        if name not in (*SAVABLE, NORM):
            raise ConfigError(unknown_module("--modules_to_save", name, [*SAVABLE, NORM]))
    ends = tuple(name for name in SAVABLE if name in names)
    if ends and table.spec.tied_embeddings:
        ends = (EMBED, HEAD)
    return ends + ((NORM,) if NORM in names else ())


def saved_shapes(table: Table, modules_to_save: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a PEFT file holds for modules_to_save (a tied matrix under both names).

    ConfigError for a model that names its embedding otherwise.
    """
    norms = {name: shape for name, shape in table.hf.items() if NORM in modules_to_save and is_of_norm(name)}
    ends = [name for name in modules_to_save if name in SAVABLE]
    if not ends:
        return norms
    if SAVABLE[EMBED] not in table.hf:
        raise ConfigError(
            f"modules_to_save {' '.join(modules_to_save)}: the tensors of model_type {table.spec.model_type!r} have "
            f"other names than {' and '.join(SAVABLE.values())}; leave it out"
        )
    embedding = table.hf[SAVABLE[EMBED]]
    return {SAVABLE[name]: table.hf.get(SAVABLE[name], embedding) for name in ends} | norms


def is_of_norm(name: str) -> bool:
    """Whether an HF tensor (model.layers.0.input_layernorm.weight) belongs to a norm."""
    return name.rpartition(".")[0].endswith(NORM)


def trained_name(table: Table, name: str) -> str:
    """The name under which training holds a tensor: a tied lm_head.weight is model.embed_tokens.weight."""
    return SAVABLE[EMBED] if table.spec.tied_embeddings and name == SAVABLE[HEAD] else name


@dataclass(frozen=True)
class Block:
    """Rows `start` .. of an HF linear (`{l}` in its name is the layer) which follow each other in a fused weight.

    The fused weight repeats [some rows of each block] once per KV group where it holds q, k and v, else once.
    """

    hf: str
    start: int
    rows: int

    @property
    def leaf(self) -> str:
        return self.hf.rpartition(".")[2]


def fused_blocks(table: Table, *, experts: bool = False) -> dict[str, tuple[Block, ...]]:
    """Megatron module inside a layer -> what it is made of, in its order; experts left out, or those alone.

    HF fuses linears as well (qkv_proj, gate_up_proj), in another order: such a one has several blocks. Of experts:
    the names have `{e}` where HF has one linear each; where HF stacks them, they are names of parameters.
    """
    found = {}
    for path, rule in _fusing_rules(table, experts=experts).items():
        units = size_of(rule.units, table.sizes)
        found[path] = tuple(
            Block(
                part.hf.removesuffix(".weight"),
                size_of(part.start, table.sizes),
                units * size_of(part.rows, table.sizes) if part.step == 1 else 0,  # alternating rows are no block
            )
            for part in rule.parts
        )
    return found


def check_blocks(name: str, out_features: int, blocks: Sequence[Block]) -> None:
    """ConfigError unless these blocks, all of one fused weight, are the whole of a linear or parameter."""
    if sum(block.rows for block in blocks) != out_features:
        raise ConfigError(
            f"--target_modules {name.rpartition('.')[2]}: the rows of {name} lie in several Megatron tensors or in "
            "turns, and LoRA on such a one is not computed yet; leave it out"
        )


def kv_groups(table: Table, path: str) -> int:
    """How many times a fused weight repeats [rows of its blocks]: once per KV group for q, k, v, else once."""
    return size_of(_fusing_rules(table)[path].units, table.sizes)


def _fusing_rules(table: Table, *, experts: bool = False) -> dict[str, Rule]:
    rules = (tensor.rule for tensor in table.megatron.values())
    return {_module(rule): rule for rule in rules if bool(rule.experts) == experts and _is_matrix(rule)}


def _is_matrix(rule: Rule) -> bool:
    stacked = rule.experts == "stacked" and rule.in_layer and len(rule.width) == 1
    return is_linear(rule) or (stacked and rule.megatron.endswith(".weight"))


def _module(rule: Rule) -> str:
    return rule.megatron.removeprefix(LAYERS).removesuffix(".weight")


def unknown_module(flag: str, name: str, known: Sequence[str]) -> str:
    """The message for a name that the model does not have, with the nearest one, or several names taken apart."""
    if "," in name:
        return f"{flag} {name}: names stand apart by spaces: {flag} {' '.join(name.replace(',', ' ').split())}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"{flag} {name}: the model has no such module; nearest: {near} (known: {' '.join(known)})"
