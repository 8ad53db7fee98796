"""What Megatron-LM puts around the tensors of a checkpoint: iteration directories, its arguments, prefixes, state."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mswift.converters.io.safe_pickle import Record, brief, load_arguments
from mswift.converters.io.side_files import check_link
from mswift.converters.io.torch_bin import read_pickle
from mswift.converters.io.torch_dist import COMMON
from mswift.converters.spec import ModelSpec
from mswift.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
_STATE = re.compile(r"((chained|distrib_optim)_\d+\.)?(optimizer|optim|opt_param_scheduler|rng|rng_state)\b.*")
_RANK = re.compile(r"mp_rank_\d\d(_\d\d\d)*")
_Info = TypeVar("_Info")


def resolve(path: Path) -> Path:
    """The directory of the newest iteration if `path` is Megatron-LM's --save directory, else `path`.

    CheckpointError if it holds the format from before dist checkpointing (mp_rank_XX).
    """
    tracker = path / TRACKER
    if tracker.is_file() and not (path / "config.json").exists():
        try:
            text = tracker.read_text("ascii").strip()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{tracker}: cannot be read ({error})") from None
        if text != "release" and not (text.isdecimal() and len(text) < 10):
            raise CheckpointError(f"{tracker}: holds {text!r:.80}, neither an iteration nor 'release'")
        path = path / (text if text == "release" else f"iter_{int(text):07d}")
        if not path.is_dir():
            raise CheckpointError(f"{tracker}: names iteration {text}, but {path} is not a directory")
    legacy = [child.name for child in path.iterdir() if _RANK.fullmatch(child.name)] if path.is_dir() else []
    if legacy:
        raise CheckpointError(
            f"{path}: holds {sorted(legacy)[0]}/ (Megatron-LM's --ckpt-format torch), which depends on its "
            "parallel layout; load it with Megatron-LM and save it with --ckpt-format torch_dist "
            "(--ckpt-convert-format torch_dist)"
        )
    return path


def strip_prefix(
    tensors: Mapping[str, _Info], expected: Mapping[str, Any]
) -> tuple[dict[str, _Info], str, Sequence[str]]:
    """(weights under the names of the table, the prefix they have in the files, names of training state)."""
    state = [name for name in tensors if _STATE.fullmatch(name)]
    weights = {name: info for name, info in tensors.items() if not _STATE.fullmatch(name)}
    first = next(iter(expected), "")
    prefixes = {name[: -len(first)] for name in weights if name.endswith("." + first) or name == first}
    prefix = next(iter(prefixes)) if len(prefixes) == 1 else ""
    if not all(name.startswith(prefix) for name in weights):
        prefix = ""
    return {name.removeprefix(prefix): info for name, info in weights.items()}, prefix, state


def check_args(path: Path, spec: ModelSpec) -> None:
    """CheckpointError if the arguments that Megatron-LM stored contradict the config: shapes do not tell them all."""
    common = path / COMMON
    if not common.is_file():
        return
    check_link(common)
    value, _ = read_pickle(common, load_arguments)
    args = value.get("args") if isinstance(value, dict) else None
    if not isinstance(args, Record) or not isinstance(args.state, dict):
        return
    for name, ours in _numbers(spec).items():
        theirs = args.state.get(name)
        if theirs is not None and theirs != ours:
            raise CheckpointError(
                f"{common}: the checkpoint was written with {name} {brief(theirs)}, config.json means {ours!r}; give "
                "the config.json of this model"
            )


def _numbers(spec: ModelSpec) -> dict[str, Any]:
    """Megatron-LM's arguments that the spec determines."""
    tied = spec.tied_embeddings
    numbers: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "untie_embeddings_and_output_weights": not tied,
        "normalization": {"rms": "RMSNorm", "layer": "LayerNorm"}[spec.norm],
        "norm_epsilon": spec.norm_eps,
        "layernorm_epsilon": spec.norm_eps,
        "apply_layernorm_1p": spec.zero_centered_norm,
        "add_qkv_bias": spec.qkv_bias or None,
    }
    if not any(layer.mixer != "attention" for layer in spec.layers):
        numbers["rotary_base"] = spec.rope.theta
    if spec.mla is None:
        numbers["kv_channels"] = spec.head_dim
    if spec.moe is not None:
        numbers |= {"num_experts": spec.moe.num_experts, "moe_router_topk": spec.moe.top_k}
    return {name: value for name, value in numbers.items() if value is not None}
