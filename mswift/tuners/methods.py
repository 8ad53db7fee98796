"""PEFT's methods beside LoRA that are trained here: the fields of their configurations, the tensors that they make.

A row of `METHODS` is all that mswift knows of a method; its layers are PEFT's own. Names and shapes are those of PEFT's
files; a method that takes more than one linear to say (VeRA, VB-LoRA) has tensors that all linears share. No torch.

Letters: r rank, i inputs and o outputs of a linear.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mswift.errors import ConfigError

Fields = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


class Linear(Protocol):
    """What is read of a `HfLinear`."""

    @property
    def name(self) -> str: ...
    @property
    def leaf(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


def _nothing(_fields: Fields, _linears: Sequence[Linear]) -> Shapes:
    return {}


@dataclass(frozen=True)
class Method:
    """One method. fields: of PEFT's configuration that may be set -> default; flags: flag of a run -> its field.

    shapes: tensors of one linear, by what follows its name; shared: tensors of all, by their whole name; frozen: those
    that are not trained. starts_at_base: an untrained adapter leaves the model's function as it is. source: the paper.
    """

    name: str
    peft_type: str
    fields: Fields
    shapes: Callable[[Fields, Linear], Shapes]
    source: str
    flags: Mapping[str, str] = field(default_factory=dict)
    shared: Callable[[Fields, Sequence[Linear]], Shapes] = _nothing
    frozen: tuple[str, ...] = ()
    starts_at_base: bool = True


def _adalora(f: Fields, x: Linear) -> Shapes:
    r = f["init_r"]
    return {"lora_A": (r, x.in_features), "lora_B": (x.out_features, r), "lora_E": (r, 1)}


def _ia3(f: Fields, x: Linear) -> Shapes:
    return {"ia3_l": (1, x.in_features) if x.leaf in f["feedforward_modules"] else (x.out_features, 1)}


def _vera(f: Fields, x: Linear) -> Shapes:
    return {"vera_lambda_b": (x.out_features,), "vera_lambda_d": (f["r"],)}


def _vera_shared(f: Fields, linears: Sequence[Linear]) -> Shapes:
    if not f["save_projection"]:
        return {}
    widest, tallest = max(x.in_features for x in linears), max(x.out_features for x in linears)
    return {"base_model.vera_A": (f["r"], widest), "base_model.vera_B": (tallest, f["r"])}


def _blocks(f: Fields, x: Linear, size: str, count: str) -> tuple[int, int]:
    """(number of blocks, size of each): one is given, the other is 0."""
    given = size if f[size] else count
    if x.in_features % f[given]:
        raise ConfigError(
            f"--tuner_config: {given} {f[given]} does not divide the {x.in_features} inputs of {x.name}: use a divisor "
            f"of {x.in_features}, or leave {x.leaf} out of --target_modules"
        )
    other = x.in_features // f[given]
    return (other, f[given]) if given == size else (f[given], other)


def _boft(f: Fields, x: Linear) -> Shapes:
    count, size = _blocks(f, x, "boft_block_size", "boft_block_num")
    return {"boft_R": (1, count, size, size), "boft_s": (x.out_features, 1)}


def _oft(f: Fields, x: Linear) -> Shapes:
    count, size = _blocks(f, x, "oft_block_size", "r")
    return {"oft_R.weight": (1 if f["block_share"] else count, size * (size - 1) // 2)}


def _fourierft(f: Fields, x: Linear) -> Shapes:
    if f["n_frequency"] > x.in_features * x.out_features:
        raise ConfigError(
            f"--tuner_config: n_frequency {f['n_frequency']} is more than the {x.in_features * x.out_features} "
            f"elements of {x.name}"
        )
    return {"fourierft_spectrum": (f["n_frequency"],)}


def _loha(f: Fields, x: Linear) -> Shapes:
    a, b = (x.out_features, f["r"]), (f["r"], x.in_features)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}


def _factors(size: int, near: int) -> tuple[int, int]:
    """The two factors of a size that LoKr takes: `near` first if it divides; else the smaller one, at most `near`.

    -1: those nearest to each other.
    """
    if near > 0 and size % near == 0:
        return near, size // near
    limit = size if near == -1 else near
    small = max(m for m in range(1, int(size**0.5) + 1) if size % m == 0 and (m == 1 or m <= limit))
    return small, size // small


def _lokr(f: Fields, x: Linear) -> Shapes:
    r, near = f["r"], f["decompose_factor"]
    (rows, k), (columns, n) = _factors(x.out_features, near), _factors(x.in_features, near)
    small: Shapes = {"lokr_w1": (rows, columns)}
    if f["decompose_both"] and r < max(rows, columns) / 2:
        small = {"lokr_w1_a": (rows, r), "lokr_w1_b": (r, columns)}
    large: Shapes = {"lokr_w2_a": (k, r), "lokr_w2_b": (r, n)}
    return small | (large if r < max(k, n) / 2 else {"lokr_w2": (k, n)})


def _hra(f: Fields, x: Linear) -> Shapes:
    return {"hra_u": (x.in_features, f["r"])}


def _vblora(f: Fields, x: Linear) -> Shapes:
    length = f["vector_length"]
    for what, size in (("inputs", x.in_features), ("outputs", x.out_features)):
        if size % length:
            raise ConfigError(
                f"--tuner_config: vector_length {length} does not divide the {size} {what} of {x.name}: use a common "
                "divisor of all adapted linears"
            )
    banks = f["num_vectors"]
    return {
        "vblora_logits_A": (f["r"], x.in_features // length, banks),
        "vblora_logits_B": (x.out_features // length, f["r"], banks),
    }


def _vblora_shared(f: Fields, _linears: Sequence[Linear]) -> Shapes:
    return {"base_model.vblora_vector_bank": (f["num_vectors"], f["vector_length"])}


def _miss(f: Fields, x: Linear) -> Shapes:
    if f["r"] > x.in_features:
        raise ConfigError(f"--tuner_config: r {f['r']} is more than the {x.in_features} inputs of {x.name}")
    return {"miss_block": (f["r"], x.out_features)}


_ROWS = (
    Method(
        "adalora", "ADALORA",
        {"target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85,
         "orth_reg_weight": 0.5, "total_step": 0, "lora_alpha": 32.0, "lora_dropout": 0.0},
        _adalora, "Zhang et al. 2023, arXiv 2303.10512",
        {"lora_rank": "target_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
    ),
    Method("ia3", "IA3", {"feedforward_modules": ()}, _ia3, "Liu et al. 2022, arXiv 2205.05638"),
    Method(
        "vera", "VERA",
        {"r": 256, "projection_prng_key": 0, "save_projection": True, "vera_dropout": 0.0, "d_initial": 0.1},
        _vera, "Kopiczko et al. 2023, arXiv 2310.11454", {"lora_dropout": "vera_dropout"}, _vera_shared,
        ("base_model.vera_A", "base_model.vera_B"),
    ),
    Method("boft", "BOFT", {"boft_block_size": 4, "boft_block_num": 0}, _boft, "Liu et al. 2023, arXiv 2311.06243"),
    Method(
        "oft", "OFT",
        {"r": 0, "oft_block_size": 32, "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
        _oft, "Qiu et al. 2023, arXiv 2306.07280",
    ),
    Method(
        "fourierft", "FOURIERFT",
        {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777, "init_weights": False},
        _fourierft, "Gao et al. 2024, arXiv 2405.03003", starts_at_base=False,
    ),
    Method(
        "loha", "LOHA", {"r": 8, "alpha": 32.0, "init_weights": True}, _loha, "Hyeon-Woo et al. 2021, arXiv 2108.06098",
        {"lora_rank": "r", "lora_alpha": "alpha"},
    ),
    Method(
        "lokr", "LOKR",
        {"r": 8, "alpha": 32.0, "decompose_both": False, "decompose_factor": -1, "init_weights": True},
        _lokr, "Yeh et al. 2023, arXiv 2309.14859", {"lora_rank": "r", "lora_alpha": "alpha"},
    ),
    Method(
        "hra", "HRA", {"r": 8, "apply_GS": False}, _hra, "Yuan et al. 2024, arXiv 2405.17484", {"lora_rank": "r"},
    ),
    Method(
        "vblora", "VBLORA",
        {"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "vblora_dropout": 0.0,
         "init_vector_bank_bound": 0.02, "init_logits_std": 0.1},
        _vblora, "Li et al. 2024, arXiv 2405.15179", {"lora_dropout": "vblora_dropout"}, _vblora_shared,
        starts_at_base=False,
    ),
    Method(
        "miss", "MISS", {"r": 64, "miss_dropout": 0.0}, _miss, "Kang and Yin 2024, arXiv 2409.15371",
        {"lora_dropout": "miss_dropout"},
    ),
)  # fmt: skip
METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}
"""By the name in --tuner_type."""
METHOD_TYPES = frozenset(row.peft_type for row in _ROWS)
"""Their `peft_type` in adapter_config.json."""
