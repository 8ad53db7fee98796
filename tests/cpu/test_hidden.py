"""Houlsby's adapters and LoReFT compute the published formulas; where pyreft is installed, what its module computes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from mswift.tuners.hidden import HiddenConfig
from mswift.tuners.hidden_modules import Bottleneck, LoReft, attach
from tests.support.adapters import difference
from tests.support.engines import make_engine
from tests.support.parity import backward, differences, random_model, random_steps
from tests.support.ranks import join, run_ranks
from tests.support.spaces import MemoryReader, assemble, gather, weights_of


def started(module: Bottleneck | LoReft) -> Bottleneck | LoReft:
    module.start(torch.Generator().manual_seed(0))
    return module


def test_an_adapter_starts_as_the_identity_and_computes_its_formula() -> None:
    torch.manual_seed(1)
    module, x = started(Bottleneck(16, 5, "gelu")), torch.randn(2, 7, 16)
    assert isinstance(module, Bottleneck)
    assert torch.equal(module(x), x)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    with torch.no_grad():
        module.up.weight.normal_()
        module.down.bias.normal_()
    inside = x @ module.down.weight.T + module.down.bias
    wanted = x + (inside * 0.5 * (1 + torch.erf(inside / 2**0.5))) @ module.up.weight.T + module.up.bias
    assert difference(module(x), wanted) < 1e-6


def test_loreft_computes_its_formula_with_an_orthonormal_frame_that_stays_one() -> None:
    torch.manual_seed(1)
    module, x = started(LoReft(16, 3)), torch.randn(2, 7, 16)
    assert isinstance(module, LoReft)
    assert all(parameter.is_contiguous() for parameter in module.parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(3):
        frame = module.rotate.weight.detach()
        torch.testing.assert_close(frame.T @ frame, torch.eye(3), rtol=0, atol=1e-5)
        wanted = x + (x @ module.source.weight.T + module.source.bias - x @ frame) @ frame.T
        torch.testing.assert_close(module(x), wanted, rtol=0, atol=2e-6)
        loss = (module(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (module.rotate.weight - frame).abs().max() > 1e-4


def test_loreft_equals_pyreft() -> None:
    pyreft = pytest.importorskip("pyreft", reason="pip install pyreft pyvene, in an environment of their own")
    module, x = started(LoReft(16, 3)), torch.randn(2, 7, 16)
    theirs = pyreft.LoreftIntervention(embed_dim=16, low_rank_dimension=3, dtype=torch.float32)
    assert isinstance(module, LoReft)
    with torch.no_grad():
        theirs.learned_source.load_state_dict(module.source.state_dict())
        theirs.rotate_layer.weight = module.rotate.weight.detach()
    torch.testing.assert_close(module(x), theirs(x), rtol=0, atol=2e-6)


SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
NAME = "llama-4-groups"
CONFIGS = {"adapter": HiddenConfig("adapter", 6, (0, 1, 2, 3), "tanh"), "reft": HiddenConfig("reft", 3, (0, 2))}


def by_hand(kind: str) -> dict[str, Any]:
    """transformers' model with the published formulas behind its modules, trained by torch."""
    config, model = CONFIGS[kind], random_model(NAME)
    model.requires_grad_(False)
    tensors = {name: p.detach().clone().requires_grad_() for name, p in start_of(config).items()}

    def changed(prefix: str) -> Any:
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            x = output if isinstance(output, torch.Tensor) else output[0]
            if kind == "adapter":
                inside = torch.tanh(x @ own["down.weight"].T + own["down.bias"])
                y = x + inside @ own["up.weight"].T + own["up.bias"]
            else:
                packed = own["rotate.parametrizations.weight.original"]
                frame = torch.linalg.householder_product(packed.tril(-1), taus(packed)) * packed.diagonal().sign()
                y = x + (x @ own["source.weight"].T + own["source.bias"] - x @ frame) @ frame.T
            return y if isinstance(output, torch.Tensor) else (y, *output[1:])

        return hook

    for number in config.layers:
        layer = model.get_submodule(f"model.layers.{number}")
        if kind == "reft":
            layer.register_forward_hook(changed(f"model.layers.{number}.reft."))
        for place in ("self_attn", "mlp") if kind == "adapter" else ():
            prefix = f"model.layers.{number}.{place}.adapter."
            layer.get_submodule(place).register_forward_hook(changed(prefix))
    decays = {name: t.dim() > 1 and not name.endswith("original") for name, t in tensors.items()}
    groups = [
        {"params": [t for n, t in tensors.items() if decays[n] == on], "weight_decay": 0.1 * on} for on in (True, False)
    ]
    optimizer = torch.optim.SGD(groups, lr=SGD["lr"], momentum=0.9)
    result: dict[str, Any] = {
        "loss": [],
        "grad_norm": [],
        "logits": model(random_steps()[0][0][0]).logits.detach().numpy(),
    }
    for step in random_steps():
        optimizer.zero_grad()
        result["loss"].append(backward(model, step))
        result["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(list(tensors.values()), 1.0)))
        optimizer.step()
    return result | {"weights": {name: tensor.detach().numpy() for name, tensor in tensors.items()}}


def taus(packed: torch.Tensor) -> torch.Tensor:
    """Of Householder reflections: 2 / |v|^2, v being 1 followed by what stands below the diagonal."""
    return 2 / (1 + packed.tril(-1).square().sum(0))


def start_of(config: HiddenConfig) -> dict[str, torch.nn.Parameter]:
    return attach(random_model(NAME), "model.layers.", config, 64)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("world_size", "settings"), [(1, {}), (2, {"shard_size": 2, "recompute_blocks": 4})])
def test_training_equals_the_formulas_on_transformers_model(
    kind: str, world_size: int, settings: dict[str, Any]
) -> None:
    payload = {"kind": kind, "world_size": world_size, "settings": settings}
    found, wanted = run_ranks(world_size, "tests/cpu/test_hidden.py:on_rank", payload), by_hand(kind)
    weights = assemble([rank.pop("weights") for rank in found])
    worst = differences(found[0] | {"weights": weights}, wanted, ("logits", "loss", "grad_norm", "weights"))
    assert {name: value for name, value in worst.items() if not value <= 1e-5} == {}
    if kind == "adapter":
        assert np.array_equal(found[0]["logits"], found[0]["plain"])


def on_rank(payload: Mapping[str, Any]) -> dict[str, Any]:
    """One rank: three steps; tensors by their names without `adapter.`."""
    from mswift.parallel.batch import Microbatch

    dims, device = join(payload["world_size"])
    model = random_model(NAME)
    reader: Any = MemoryReader(model.config.to_dict(), weights_of(model))
    tokens, result = random_steps()[0][0][0], {}
    for key, method in (("plain", None), ("logits", CONFIGS[payload["kind"]])):
        own = SGD | {"backend": "fsdp", "method": method} | payload["settings"]
        engine = make_engine(reader.table, dims, own, device)
        engine.load_weights(reader)
        result[key] = engine.logits(tokens).numpy()
        if method is not None:
            assert engine.trainable_parameters == sum(p.numel() for p in start_of(method).values())
            mine = [[Microbatch(*b) for b in step][engine.coordinate.dp :: dims.dp] for step in random_steps()]
            steps = [engine.train_step(step, SGD["lr"]) for step in mine]
            result |= {"loss": [s.loss for s in steps], "grad_norm": [s.grad_norm for s in steps]}
            shards = gather(engine.model_shards())
            result["weights"] = {name.removeprefix("adapter."): shard for name, shard in shards.items()}
        engine.close()
    return result
