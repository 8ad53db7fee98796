"""What models with Mamba-2 layers share: the rules of such a layer, its config fields, what is around the layers.

megatron-core stores the input projection in its parts z, x, B, C, dt and the convolution in x, B, C
(`MambaMixer.sharded_state_dict`), so that each can be cut; Hugging Face has each as one tensor in that order.
"""

from mswift.converters.fields import Fields
from mswift.converters.rule import LAYERS, Cut, Drop, Rule
from mswift.converters.rules import columns, drop, rows, rows_of, same
from mswift.converters.spec import MambaSpec

EMBEDDING = "backbone.embeddings.weight"
M = LAYERS
H = "backbone.layers.{l}."
MIXER = H + "mixer."

_STATE = "mamba_groups*mamba_state"
_CONV = f"mamba_inner+2*{_STATE}"
_HEADS, _GROUPS = rows("mamba_heads"), rows("mamba_groups")
_X, _B, _C = (("x", "mamba_inner", _HEADS), ("B", _STATE, _GROUPS), ("C", _STATE, _GROUPS))


def _slices(
    megatron: str, hf: str, width: tuple[str, ...], slices: tuple[tuple[str, str, Cut], ...]
) -> tuple[Rule, ...]:
    """One HF tensor, row after row, as Megatron tensors `megatron`.z, `megatron`.x, ..."""
    sizes = [size for _, size, _ in slices]
    starts = ["+".join(sizes[:n]) or "0" for n in range(len(sizes))]
    return tuple(
        rows_of(f"{megatron}.{name}", hf, (size, *width), start=start, of="+".join(sizes), cut=cut, when="mamba")
        for (name, size, cut), start in zip(slices, starts, strict=True)
    )


def _per_head(name: str) -> Rule:
    """A vector with one element a head, in fp32 in many checkpoints of other dtypes."""
    return same(M + f"mixer.{name}", MIXER + name, ("mamba_heads",), cut=_HEADS, when="mamba", own_dtype=True)


MAMBA_LAYER: tuple[Rule, ...] = (
    same(M + "mixer.in_proj.layer_norm_weight", H + "norm.weight", ("hidden",), when="mamba"),
    *_slices(
        M + "mixer.in_proj.weight",
        MIXER + "in_proj.weight",
        ("hidden",),
        (("z", "mamba_inner", _HEADS), _X, _B, _C, ("dt", "mamba_heads", _HEADS)),
    ),
    *_slices(M + "mixer.conv1d.weight", MIXER + "conv1d.weight", ("one", "mamba_conv"), (_X, _B, _C)),
    *_slices(M + "mixer.conv1d.bias", MIXER + "conv1d.bias", (), (_X, _B, _C)),
    *(_per_head(name) for name in ("A_log", "D", "dt_bias")),
    same(M + "mixer.norm.weight", MIXER + "norm.weight", ("mamba_inner",), cut=_HEADS, when="mamba"),
    same(
        M + "mixer.out_proj.weight",
        MIXER + "out_proj.weight",
        ("hidden", "mamba_inner"),
        cut=columns("mamba_heads"),
        when="mamba",
    ),
)
"""The norm before the mixer and the mixer."""

_VOCAB = rows("vocab", uneven=True)
AROUND: tuple[tuple[Rule, ...], tuple[Rule | Drop, ...]] = (
    (same("embedding.word_embeddings.weight", EMBEDDING, ("vocab", "hidden"), cut=_VOCAB),),
    (
        same("decoder.final_norm.weight", "backbone.norm_f.weight", ("hidden",)),
        same("output_layer.weight", "lm_head.weight", ("vocab", "hidden"), cut=_VOCAB, when="untied"),
        drop("lm_head.weight", f"equal to {EMBEDDING} (tie_word_embeddings)", same_as=EMBEDDING, when="tied"),
    ),
)
"""What a model has before its layers and behind them."""


def mamba_spec(
    config: Fields,
    *,
    heads: str,
    head_dim: str,
    state: str,
    activation: str,
    defaults: tuple[int, int, int],
    grouped_norm: bool,
    time_step_limit: tuple[float, float],
) -> MambaSpec:
    """Reads the fields of the mixer; names of those that differ, and `defaults` of (heads, groups, chunk size)."""
    config.require(activation, "silu")
    config.require("use_bias", False)
    config.require("use_conv_bias", True)
    for name in ("time_step_rank", "time_step_max", "time_step_floor", "rescale_prenorm_residual"):
        config.take(name)  # initialisation
    num_heads, groups = config.integer(heads, defaults[0]), config.integer("n_groups", defaults[1])
    config.check("n_groups", groups, [n for n in range(1, num_heads + 1) if num_heads % n == 0])
    return MambaSpec(
        num_heads=num_heads,
        head_dim=config.integer(head_dim, 64),
        state_size=config.integer(state, 128),
        num_groups=groups,
        norm_groups=groups if grouped_norm else 1,
        conv_kernel=config.integer("conv_kernel", 4),
        chunk_size=config.integer("chunk_size", defaults[2]),
        time_step_limit=time_step_limit,
    )
