"""Multi-token prediction in plain PyTorch, after section 2.2 of the DeepSeek-V3 report (arXiv 2412.19437).

transformers has decoders that were trained with it and no such module, so a depth is put together here of its own
decoder layer and norm: h'_i = M [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i)] for the positions that have a token k further on
(published checkpoints have the embedding's half of M first), a decoder layer, and the model's head behind an own norm.
The loss of depth k is a sum over these positions divided by what the main loss is divided by (the report: by T).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.parity import _copy, _optimizer, model_of
from tests.support.spaces import weights_of

_QWEN3_NEXT = {
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "eh_proj": "fc",
    "shared_head.norm": "norm",
}


def published(name: str, model: Any) -> str:
    """The name that published checkpoints have for a tensor of `predicting_model`."""
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    if model.config.model_type != "qwen3_next" or not name.startswith(prefix):
        return name
    module, _, last = name.removeprefix(prefix).rpartition(".")
    return f"mtp.{_QWEN3_NEXT[module]}.{last}" if module in _QWEN3_NEXT else f"mtp.layers.0.{module}.{last}"


def predicting_model(fields: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """A transformers model with its prediction layers behind the others, where its forward pass leaves them alone.

    They are of the kind of its last layer; as many as num_nextn_predict_layers says, or one.
    """
    model: Any = model_of(fields, seed)
    config = model.config
    depths = fields.get("num_nextn_predict_layers", 1)
    if "num_nextn_predict_layers" in fields:
        config.num_nextn_predict_layers = depths
    config._attn_implementation = "eager"
    decoder, norm = type(model.model.layers[-1]), type(model.model.norm)
    for _ in range(depths):
        layer = decoder(config, config.num_hidden_layers - 1)
        layer.enorm, layer.hnorm = (norm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        layer.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        layer.shared_head = nn.Module()
        layer.shared_head.norm = norm(config.hidden_size, config.rms_norm_eps)
        with torch.no_grad():
            for tensor in (*layer.parameters(), *layer.buffers()):
                tensor.copy_(torch.randn_like(tensor) * (0.2 if tensor.dim() == 1 else 0.15) + (tensor.dim() == 1))
        model.model.layers.append(layer)
    return model  # type: ignore[no-any-return]


def _document_losses(model: Any, tokens: Tensor, labels: Tensor, weights: Tensor) -> list[Tensor]:
    """Weighted sums of the losses of whole documents [b, s]: of the model, then of every depth."""
    base, num_layers = model.model, model.config.num_hidden_layers
    states = base(input_ids=tokens).last_hidden_state
    sums = [_loss(model.lm_head(states), labels, weights)]
    for depth, layer in enumerate(base.layers[num_layers:], 1):
        length = tokens.shape[1] - depth
        if length < 1:
            sums.append(torch.zeros(()))
            continue
        ahead = layer.enorm(base.embed_tokens(tokens[:, depth:]))
        joined = layer.eh_proj(torch.cat([ahead, layer.hnorm(states[:, :length])], dim=-1))
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        places = torch.arange(length)[None]
        out = layer(
            joined,
            attention_mask=mask,
            position_ids=places,
            position_embeddings=base.rotary_emb(joined, position_ids=places),
        )
        states = layer.shared_head.norm(out[0] if isinstance(out, tuple) else out)
        sums.append(_loss(model.lm_head(states), labels[:, depth:], weights[:, depth:]))
    return sums


def _loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


def _losses(model: Any, batch: Sequence[Any]) -> Tensor:
    """Those sums of a microbatch [1 + depths], of packed rows document by document."""
    tokens, labels, weights, *documents = batch
    if not documents:
        return torch.stack(_document_losses(model, tokens, labels, weights))
    flat = [x.flatten().split(list(documents[0])) for x in (tokens, labels, weights)]
    parts = [_document_losses(model, *(x[None] for x in one)) for one in zip(*flat, strict=True)]
    return torch.stack([torch.stack(part) for part in parts]).sum(0)


@contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """Everything that the model computes is fp64 while inside, also where transformers asks for fp32 by name."""
    convert, softmax = Tensor.to, F.softmax

    def to(x: Tensor, *args: Any, **options: Any) -> Tensor:
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        options = {name: torch.float64 if value is torch.float32 else value for name, value in options.items()}
        return convert(x, *args, **options)

    def wide_softmax(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return softmax(x, *args, **options | ({"dtype": torch.float64} if "dtype" in options else {}))

    model.double()
    model.config._experts_implementation = "eager"  # type: ignore[union-attr]  # torch's grouped product has no fp64
    with (
        patch.object(Tensor, "float", lambda x: x.double()),
        patch.object(Tensor, "to", to),
        patch.object(F, "softmax", wide_softmax),
    ):
        yield


def reference(
    model: nn.Module, steps: Sequence[Sequence[Any]], settings: Mapping[str, Any], scale: float
) -> dict[str, Any]:
    """Steps of torch's optimizer on loss + scale * (mean of the depths' losses)."""
    optimizer = _optimizer(model, settings)
    result: dict[str, Any] = {"loss": [], "mtp_loss": [], "grad_norm": []}
    for step in steps:
        optimizer.zero_grad()
        total = sum(float(batch[2].sum()) for batch in step)
        sums = torch.stack([_losses(model, batch) for batch in step]).sum(0) / total
        (sums[0] + scale * sums[1:].mean()).backward()
        clip = settings.get("clip_grad", 0) or float("inf")
        result["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        result["loss"].append(sums[0].item())
        result["mtp_loss"].append(sums[1:].mean().item())
        if "gradients" not in result:
            grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
            result["gradients"] = _copy({published(n, model): grad for n, grad in grads.items()})
        optimizer.step()
    result["weights"] = _copy({published(n, model): w for n, w in weights_of(model).items()})
    return result
