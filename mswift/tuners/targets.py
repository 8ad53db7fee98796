"""What the flags of a run mean as fields of an adapter_config.json: which linears and which parameters, at what rank.

transformers 5 stacks experts in parameters, which PEFT adapts by `target_parameters`. It takes the older names of
experts and routers (gate_proj, w1, gate) to mean those, gate and up as one of twice the rank, and so does this. The
names come from the two spellings of a family's table.
"""

import re
from collections.abc import Sequence

from mswift.converters.adapters import ALL_LINEAR, SAVABLE, fused_blocks, fused_linears, refuse_recurrent
from mswift.converters.adapters import unknown_module as unknown
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import STACKED, in_spelling, parameters

_EACH = "experts_each"
_KEPT_BY_PEFT = ("qwen2_moe",)
"""Families with both spellings whose older names PEFT 0.21.2 leaves alone: they mean the shared expert."""


def chosen(
    table: ModelTable, *, rank: int, alpha: float, modules: Sequence[str], parameter_names: Sequence[str] = ()
) -> PeftSettings:
    """The adapter that --target_modules and --target_parameters mean on this model.

    Raises ConfigError for a name that the model does not have, with the nearest one, and for what takes no adapter.
    """
    refuse_recurrent(table)
    leaves, moved = linear_leaves(table), renamed(table)
    known = [ALL_LINEAR, *leaves, *moved]
    if not modules and not parameter_names:
        raise ConfigError(f"--target_modules is empty: give {ALL_LINEAR} or some of {' '.join(leaves)}")
    for name in modules:
        if name in SAVABLE:
            raise ConfigError(
                f"--target_modules {name}: no LoRA on embeddings; train it in full with --modules_to_save {name}"
            )
        if name not in known:
            raise ConfigError(unknown("--target_modules", name, known))
    every = ALL_LINEAR in modules
    fused = [name for name in moved if every or name in modules]
    own = _parameter_names(table, parameter_names) | {moved[name]: None for name in fused}
    if every and table.spec.moe is not None:
        own |= dict.fromkeys(_leaf(parameter.name) for parameter in parameters(table))
        _refuse_untrained(table, leaves)
    ranks, alphas = _patterns(moved, fused, own, rank, alpha)
    return PeftSettings(
        rank=rank,
        alpha=alpha,
        target_modules=tuple(leaf for leaf in leaves if every or leaf in modules),
        target_parameters=tuple(sorted(own)),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def linear_leaves(table: ModelTable) -> tuple[str, ...]:
    """Leaf names of the linears outside experts, in the order of the model; not those that PEFT takes for experts."""
    moved = renamed(table)
    leaves = dict.fromkeys(leaf for names in fused_linears(table).values() for leaf in names)
    return tuple(leaf for leaf in leaves if leaf not in moved)


def renamed(table: ModelTable) -> dict[str, str]:
    """Older name of the linear of an expert or a router -> end of the name of the parameter that it means to PEFT."""
    if table.spec.moe is None or _EACH not in table.family.spellings or table.spec.model_type in _KEPT_BY_PEFT:
        return {}
    each, stacked = (in_spelling(table, spelling) for spelling in (_EACH, STACKED))
    now = fused_blocks(stacked, experts=True)
    found = {
        block.leaf: now[path][0].leaf for path, blocks in fused_blocks(each, experts=True).items() for block in blocks
    }
    routers = {_leaf(parameter.name) for parameter in parameters(table) if parameter.num_experts == 1}
    return found | {name.removesuffix(".weight"): name for name in routers}


def _leaf(parameter: str) -> str:
    """The end of a parameter's name that tells it from others: `gate_up_proj`, `gate.weight`."""
    parts = parameter.split(".")
    return ".".join(parts[-2:]) if parts[-1] == "weight" else parts[-1]


def _parameter_names(table: ModelTable, names: Sequence[str]) -> dict[str, None]:
    known = [parameter.name for parameter in parameters(table)]
    for name in names:
        if not any(parameter == name or parameter.endswith(f".{name}") for parameter in known):
            if not known:
                raise ConfigError(f"--target_parameters {name}: the model has no experts; use --target_modules")
            raise ConfigError(unknown("--target_parameters", name, list(dict.fromkeys(map(_leaf, known)))))
    return dict.fromkeys(names)


def _patterns(
    moved: dict[str, str], fused: Sequence[str], own: dict[str, None], rank: int, alpha: float
) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern: what stands for several older names has the sum of their ranks."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in own:
        olds = [old for old, new in moved.items() if new == name]
        given = [old for old in olds if old in fused]
        if given and len(given) < len(olds):
            missing = " ".join(old for old in olds if old not in given)
            raise ConfigError(
                f"--target_modules {' '.join(given)}: transformers holds {' and '.join(olds)} of all experts in one "
                f"parameter, {name}: add {missing}"
            )
        if len(given) > 1:
            pattern = rf".*\.{re.escape(name)}"
            ranks[pattern], alphas[pattern] = rank * len(given), alpha * len(given)
    return ranks, alphas


def _refuse_untrained(table: ModelTable, leaves: Sequence[str]) -> None:
    """ConfigError for all-linear on experts whose rows training cannot adapt: gate and up in turn."""
    for blocks in fused_blocks(in_spelling(table, STACKED), experts=True).values():
        if not all(block.rows for block in blocks):
            raise ConfigError(
                f"--target_modules {ALL_LINEAR}: that includes experts, whose gate and up lie in turn in "
                f"{blocks[0].leaf} of model_type {table.spec.model_type!r}; no LoRA on those yet: use --target_modules "
                f"{' '.join(leaves)}"
            )
