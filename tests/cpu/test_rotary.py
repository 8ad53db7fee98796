"""Rotary frequencies, cos and sin have the bits of transformers' own; linear and Llama 3.1 scaling included."""

from typing import Any

import pytest
import torch

from mswift.converters.spec import RopeSpec
from mswift.parallel.rotary import RotaryTable, inverse_frequencies, rotate
from tests.support.parity import differences, megatron_run, random_model, random_steps, reference
from tests.support.spaces import weights_of

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR: dict[str, Any] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000000.0}
KINDS = {
    "default": (DEFAULT, RopeSpec(1000000.0)),
    "linear": (LINEAR, RopeSpec(10000.0, "linear", 4.0)),
    "llama3": (LLAMA3, RopeSpec(500000.0, "llama3", 8.0, 1.0, 4.0, 64)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_bits_equal_transformers(kind: str, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields, rope = KINDS[kind]
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=512,
        rope_parameters=fields,
    )  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)
    assert torch.equal(inverse_frequencies(rope, head_dim), theirs.inv_freq)
    cos, sin = theirs(torch.zeros(1, 1), torch.arange(300)[None])
    ours = RotaryTable(rope, head_dim, torch.device("cpu"))(300, torch.float32)
    for mine, full in zip(ours, (cos, sin), strict=True):
        assert torch.equal(mine[:, 0, 0], full[0, :, : head_dim // 2])


def test_rotation_and_its_gradient() -> None:
    """Against the textbook form x * cos + rotate_half(x) * sin; the wrong half is far off."""
    x = torch.randn(7, 2, 3, 16, dtype=torch.float64, requires_grad=True)
    cos, sin = RotaryTable(RopeSpec(10000.0), 16, torch.device("cpu"))(7, torch.float64)

    def textbook(turn: float) -> torch.Tensor:
        halves = torch.cat((-turn * x[..., 8:], turn * x[..., :8]), dim=-1)
        return x * torch.cat((cos, cos), -1) + halves * torch.cat((sin, sin), -1)

    assert torch.allclose(rotate(x, cos, sin), textbook(1.0), atol=1e-12)
    assert not torch.allclose(rotate(x, cos, sin), textbook(-1.0), atol=1e-2)
    assert torch.autograd.gradcheck(lambda t: rotate(t, cos, sin), (x,))


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_models_train_alike(kind: str) -> None:
    """Sequences longer than the llama3 wavelengths' bounds; another factor is seen."""
    model = random_model("llama", rope_parameters=KINDS[kind][0])
    config = {k: v for k, v in model.config.to_dict().items() if v is not None}
    start = {n: w.copy() for n, w in weights_of(model).items()}
    settings = {"optimizer": "sgd", "lr": 0.05, "clip_grad": 1.0}
    steps = random_steps(num_steps=1, length=96)
    truth = reference(model, steps, settings)
    found = megatron_run(config, start, steps, settings, 2, {"tp": 2})
    what = ("logits", "loss", "gradients", "weights")
    assert max(differences(found, truth, what).values()) <= 1e-5
    config["rope_parameters"] = {**config["rope_parameters"], "factor": 2.0}
    found = megatron_run(config, start, steps, settings, 2, {"tp": 2})
    assert max(differences(found, truth, ("logits",)).values()) > 1e-3
