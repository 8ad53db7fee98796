"""YaRN, LongRoPE, dynamic, partial and interleaved rotary embeddings have the bits of transformers' own."""

from typing import Any

import pytest
import torch

from mswift.converters.fields import Fields
from mswift.converters.spec import RopeSpec
from mswift.errors import ConfigError
from mswift.parallel.rotary import RotaryTable, inverse_frequencies, rotate

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG: dict[str, Any] = {
    "rope_type": "longrope", "short_factor": [1.0 + 0.03 * i for i in range(16)],
    "long_factor": [1.5 + 0.7 * i for i in range(16)], "original_max_position_embeddings": 64,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "yarn": YARN,
    "yarn as Qwen2.5 has it": YARN | {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn mscale": YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1},
    "yarn attention_factor": YARN | {"attention_factor": 1.37, "beta_fast": 20.0},
    "yarn not truncated": YARN | {"truncate": False, "factor": 32.0},
    "yarn short": YARN | {"original_max_position_embeddings": 5, "beta_fast": 1.5, "beta_slow": 1.4},
    "longrope": LONG,
    "longrope factor": LONG | {"factor": 32.0},
    "longrope attention_factor": LONG | {"attention_factor": 1.19},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 6.0},
}


def theirs(fields: dict[str, Any], head_dim: int, **config: Any) -> Any:
    """transformers' rotary embedding of a Llama with these rope_parameters."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=512,
            rope_parameters={"rope_theta": 1e6, **fields}, **config,
        )
    )  # fmt: skip


def read(fields: dict[str, Any], head_dim: int, **config: Any) -> RopeSpec:
    """What we read of the same config.json, in the older spelling."""
    given = {"rope_theta": 1e6, "rope_scaling": fields, "max_position_embeddings": 512, **config}
    return Fields(given).rope(head_dim, partial=config.get("partial_rotary_factor"))


@pytest.mark.parametrize("length", [40, 64, 65, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_equal_transformers(kind: str, length: int) -> None:
    rope, full = read(KINDS[kind], 32), theirs(KINDS[kind], 32)
    cos, sin = full(torch.zeros(1, 1), torch.arange(length)[None])
    assert torch.equal(inverse_frequencies(rope, 32, length), full.inv_freq)
    for mine, whole in zip(RotaryTable(rope, 32, torch.device("cpu"))(length, torch.float32), (cos, sin), strict=True):
        assert torch.equal(mine[:, 0, 0], whole[0, :, :16])


@pytest.mark.parametrize("kind", ["yarn", "longrope", "linear"])
def test_partial_bits_equal_transformers(kind: str) -> None:
    fields = {**KINDS[kind], "partial_rotary_factor": 0.75}
    if kind == "longrope":
        fields |= {name: KINDS[kind][name][:12] for name in ("short_factor", "long_factor")}
    rope = read(fields, 32, partial_rotary_factor=0.75)
    assert rope.rotary_dim == 24
    assert torch.equal(inverse_frequencies(rope, 32), theirs(fields, 32).inv_freq)


def test_longrope_changes_at_the_original_length() -> None:
    table = RotaryTable(read(LONG, 32), 32, torch.device("cpu"))
    assert not torch.equal(table(65, torch.float32)[0][:64], table(64, torch.float32)[0])


def test_dynamic_refuses_lengths_that_would_change_it() -> None:
    table = RotaryTable(read(KINDS["dynamic"], 32), 32, torch.device("cpu"))
    table(512, torch.float32)
    with pytest.raises(ConfigError, match="'dynamic' with sequences of 513 tokens: beyond 512 .*--max_length"):
        table(513, torch.float32)


def test_numbers_of_factors_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"long_factor' has 15 numbers; 16 are needed"):
        read(LONG | {"long_factor": LONG["long_factor"][:15]}, 32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_and_its_gradient(interleaved: bool) -> None:
    """Against transformers' Phi-3 (halves) and GLM-4 (neighbours)."""
    from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as neighbours
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as halves

    x = torch.randn(7, 2, 3, 16, dtype=torch.float64, requires_grad=True)
    rope = RopeSpec(10000.0, rotary_dim=12, interleaved=interleaved)
    cos, sin = RotaryTable(rope, 16, torch.device("cpu"))(7, torch.float64)
    full = [torch.cat((t, t), -1)[:, 0, 0][None] for t in (cos, sin)]
    expected, _ = (neighbours if interleaved else halves)(x.permute(1, 2, 0, 3), x.permute(1, 2, 0, 3), *full)
    rotated = rotate(x, cos, sin, interleaved=interleaved)
    assert torch.allclose(rotated, expected.permute(2, 0, 1, 3), atol=1e-14)
    assert not torch.allclose(rotate(x, cos, sin, interleaved=not interleaved), rotated, atol=1e-2)
    assert torch.autograd.gradcheck(lambda t: rotate(t, cos, sin, interleaved=interleaved), (x,))
