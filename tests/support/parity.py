"""One training job twice: transformers in one process, Megatron on some ranks; the differences by tensor.

Difference: max|a - b| / max|b|. Batches are microbatches (tokens, labels, loss weights); data-parallel rank d of n
takes every n-th microbatch of a step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tests.support.engines import is_megatron, make_engine
from tests.support.ranks import join, load, run_ranks
from tests.support.spaces import Arrays, MemoryReader, assemble, gather, to_hf, weights_of

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
VOCAB = 1003
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
    "tie_word_embeddings": False, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-4-groups": {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "head_dim": 24, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 9, "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2"},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": 9},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
}


def random_model(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A tiny fp32 transformers model; vectors (norms, biases, a router's correction) are random as well."""
    return model_of(BASE | MODELS[name] | changes, seed)


def model_of(fields: Mapping[str, Any], seed: int = 0) -> torch.nn.Module:
    """The same for any config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        saved = model.state_dict()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in saved and tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
    return model


def random_steps(num_steps: int = 3, num_microbatches: int = 2, batch: int = 2, length: int = 24) -> list[list[Batch]]:
    """Microbatches with uneven loss weights, some of them zero."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for _ in range(num_steps):
        tokens = torch.randint(0, VOCAB, (num_microbatches, batch, length + 1), generator=generator)
        weights = torch.rand(num_microbatches, batch, length, generator=generator)
        weights[weights < 0.3] = 0
        weights[0] *= 3
        steps.append([(t[:, :-1].contiguous(), t[:, 1:].contiguous(), w) for t, w in zip(tokens, weights, strict=True)])
    return steps


def reference(model: torch.nn.Module, steps: Sequence[Sequence[Batch]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train a transformers model with torch's optimizer: what the Megatron run must equal."""
    optimizer = _optimizer(model, settings)
    result: dict[str, Any] = {"start": _copy(weights_of(model)), "loss": [], "grad_norm": []}
    with torch.no_grad():
        result["logits"] = model(steps[0][0][0]).logits.numpy()
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, step)
        clip = settings.get("clip_grad", 0) or float("inf")
        result["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        result["loss"].append(loss)
        if "gradients" not in result:
            result["gradients"] = _copy({n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    result["weights"] = _copy(weights_of(model))
    for state in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        result[state] = {
            n: optimizer.state[p][state].numpy() for n, p in model.named_parameters() if state in optimizer.state[p]
        }
    return result


def backward(model: torch.nn.Module, step: Sequence[Batch]) -> float:
    """Loss of a step by transformers' own model, the weighted mean over its tokens; gradients are added up."""
    total = sum(float(weights.sum()) for _, _, weights in step)
    loss_sum = 0.0
    for tokens, labels, weights in step:
        losses = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / total
        loss.backward()
        loss_sum += loss.item()
    return loss_sum


def megatron_run(
    model_config: Mapping[str, Any],
    weights: Arrays,
    steps: Sequence[Sequence[Batch]],
    settings: Mapping[str, Any],
    world_size: int,
    layout: Mapping[str, Any],
    broken: str | None = None,
) -> dict[str, Any]:
    """The same job on `world_size` ranks; tensors in HF space. `broken`: a rule or collective left out (BREAKS)."""
    reader = MemoryReader(dict(model_config), weights)
    payload = {
        "config": dict(model_config), "weights": weights, "steps": steps, "settings": dict(settings),
        "world_size": world_size, "layout": dict(layout), "broken": broken,
    }  # fmt: skip
    ranks = run_ranks(world_size, "tests/support/parity.py:on_rank", payload)
    result = {name: ranks[0][name] for name in ("logits", "loss", "mtp_loss", "grad_norm", "evaluated")}
    assert all(np.array_equal(rank["loss"], ranks[0]["loss"]) for rank in ranks)
    in_full = settings.get("part") is None and settings.get("lisa") is None
    result["states"] = [rank["optimizer"] for rank in ranks]
    if in_full:  # else some tensors have gradients in a part of them
        result["gradients"] = _hf([rank["gradients"] for rank in ranks], "gradient.", reader)
    result["weights"] = _hf([rank["weights"] for rank in ranks], "", reader)
    for state in ("exp_avg", "exp_avg_sq", "momentum_buffer") if in_full else ():
        result[state] = _hf([rank["optimizer"] for rank in ranks], f"optimizer.{state}.", reader)
    result["copies"] = [rank["copies"] for rank in ranks]
    return result


def on_rank(payload: Mapping[str, Any]) -> dict[str, Any]:
    """One rank of `megatron_run`."""
    dims, device = join(payload["world_size"], **payload["layout"])
    from mswift.parallel.batch import Microbatch

    steps = [[Microbatch(*batch) for batch in step] for step in payload["steps"]]
    reader = MemoryReader(payload["config"], payload["weights"])
    with broken_rule(payload["broken"]):
        engine = make_engine(reader.table, dims, payload["settings"], device)
        engine.load_weights(reader)  # type: ignore[arg-type]
        if payload["broken"] is not None:
            _break_model(engine, payload["broken"])
        d, n = engine.coordinate.dp, dims.dp
        result: dict[str, Any] = {"logits": engine.logits(payload["steps"][0][0][0]).float().numpy()}
        result["evaluated"], _ = engine.evaluate(steps[0][d::n])
        lr = payload["settings"]["lr"]
        results = []
        for step in steps:
            results.append(engine.train_step(step[d::n], lr))
            if "gradients" not in result:
                result["gradients"] = gather(engine.gradients())
        result["loss"] = [r.loss for r in results]
        result["grad_norm"] = [r.grad_norm for r in results]
        result["mtp_loss"] = [r.mtp_loss for r in results]
        result["weights"] = gather(engine.model_shards())
        result["optimizer"] = gather(engine.optimizer_shards())
        result["copies"] = {
            p.key: p.parameter.detach().float().numpy().copy() for p in _megatron(engine) if p.key.startswith("emb")
        }
        engine.close()
    return result


def _megatron(engine: Any) -> Any:
    """The parameters of a Megatron engine."""
    return engine._base if is_megatron(engine) else []


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """max|a - b| / max|b|."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], what: Sequence[str]) -> dict[str, float]:
    """Difference by tensor; names like "gradients model.norm.weight"."""
    out = {}
    for name in what:
        if isinstance(expected[name], Mapping):
            assert found[name].keys() == expected[name].keys(), name
            out |= {f"{name} {n}": difference(found[name][n], expected[name][n]) for n in expected[name]}
        else:
            out[name] = difference(np.asarray(found[name]), np.asarray(expected[name]))
    return out


@contextmanager
def broken_rule(name: str | None) -> Iterator[None]:
    """Leave out one collective or rule on this rank: one of those below, or "file:function", a context manager."""
    from importlib import import_module
    from unittest.mock import patch

    if name is not None and ":" in name:
        with load(name)():
            yield
        return

    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.tensor_parallel import layers

    from mswift.parallel import activations, norms
    from mswift.parallel.megatron import engine, self_attention, width_norm

    finalize = import_module("megatron.core.distributed.finalize_model_grads")  # a function hides the module
    places: dict[str, tuple[Any, str, Any]] = {
        "tp reduce": (layers, "reduce_from_tensor_model_parallel_region", lambda x, group=None: x),
        "tied embedding reduce": (finalize, "_allreduce_word_embedding_grads", lambda *_, **__: None),
        "dp reduce": (DistributedDataParallel, "finish_grad_sync", lambda *_, **__: None),
        "sp norm reduce": (finalize, "_allreduce_non_tensor_model_parallel_grads", lambda *_, **__: None),
        "sp norm reduce of biases": (finalize, "_allreduce_non_tensor_model_parallel_grads", lambda *_, **__: None),
        "width norm's sum": (width_norm, "_summed", lambda x, _group: x.clone()),
        "width norm's gradient sum": (
            width_norm._SumOverRanks,
            "backward",
            staticmethod(lambda _ctx, gradient: (gradient, None)),
        ),
        "1 + w": (norms.ZeroCenteredRMSNorm, "forward", norms.RMSNorm.forward),
        "neighbours": (self_attention, "rotate", _rotate_halves),
        "tanh": (activations.GeluTanh, "approximate", "none"),
        "token weights": (engine.schedule, "_weighted_loss", _unweighted),
    }
    if name not in places:
        yield
        return
    with patch.object(*places[name]):
        yield


def _unweighted(losses: torch.Tensor, _weights: torch.Tensor) -> Any:
    total = losses.sum()
    return total, torch.zeros((), dtype=torch.int), total.detach()


def _rotate_halves(x: Any, cos: Any, sin: Any, **_interleaved: bool) -> Any:
    from mswift.parallel.rotary import rotate

    return rotate(x, cos, sin)


@torch.no_grad()
def _break_model(engine: Any, name: str | None) -> None:
    model = engine._chunks[0].module
    if name == "vocabulary mask":
        model.num_real_rows = 10**9
    elif name == "kv group":
        weight = model.decoder.layers[0].self_attention.linear_qkv.weight
        weight.copy_(weight.roll(weight.shape[0] // 2, 0))
    elif name == "tp mark":
        for group in engine._optimizer._chained.param_groups:
            for parameter in group["params"]:
                parameter.tensor_model_parallel = False


def _optimizer(model: torch.nn.Module, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    decay, ratio = settings.get("weight_decay", 0.1), settings.get("lora_b_lr_ratio", 1.0)
    groups = []
    for name, parameter in model.named_parameters():
        is_matrix, is_b = parameter.dim() > 1 and not name.endswith("bias"), "lora_B" in name or "magnitude" in name
        lr = settings["lr"] * (ratio if is_b else 1)
        groups.append({"params": [parameter], "weight_decay": decay if is_matrix else 0.0, "lr": lr})
    if settings.get("optimizer") == "sgd":
        return torch.optim.SGD(groups, lr=settings["lr"], momentum=settings.get("sgd_momentum", 0.9))
    return torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.95), eps=settings.get("adam_eps", 1e-8))


def _copy(arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    return {name: array.copy() for name, array in arrays.items()}


def _hf(ranks: Sequence[Mapping[str, Any]], prefix: str, reader: MemoryReader) -> Arrays:
    """Tensors with that prefix, assembled from all ranks, in HF space; {} if there are none."""
    found = [{k: v for k, v in rank.items() if k.startswith(prefix)} for rank in ranks]
    arrays = {key.removeprefix(prefix): array for key, array in assemble(found).items()}
    return to_hf(arrays, reader.table) if arrays else {}
