"""A transformers model as it is trained: without memory first, its layers compiled or computed again, with our loss.

Shapes: b rows, s positions of this rank, h hidden, V vocabulary.
"""

import os
import shutil
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mswift.config.loss import LossFusion, is_fused
from mswift.converters.plan import ModelTable
from mswift.converters.spec import ModelSpec
from mswift.errors import ConfigError
from mswift.parallel import sequence
from mswift.parallel.dropout import EMBEDDING_NOISE, noise, remembered
from mswift.parallel.fused_loss import OutputLayer, fused_linear_cross_entropy, scaled_logits
from mswift.parallel.loss import vocab_parallel_cross_entropy


class _Alone:
    """A process group of this rank alone, for losses over a vocabulary that is not cut."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


_ALONE: Any = _Alone()


class TrainedModel(nn.Module):
    """transformers' causal language model `inner`; called, it gives sums of weighted losses, or logits."""

    def __init__(self, inner: nn.Module, spec: ModelSpec, fusion: LossFusion) -> None:
        super().__init__()
        self.inner, self._spec, self._fusion = inner, spec, fusion

    @property
    def decoder(self) -> nn.Module:
        """All but the output layer."""
        return self.inner.base_model  # type: ignore[no-any-return, return-value]

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        channels: Tensor | None = None,
        num_channels: int = 0,
    ) -> Tensor:
        """tokens, labels int64 [b, s], loss_weights [b, s], positions [1, s] -> [1 + channels], sums over the rows.

        Only the first carries a gradient. Without labels: logits [b, s, V].
        """
        hidden = self.decoder(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        head = self.inner.get_output_embeddings()  # type: ignore[operator]
        spec = self._spec
        if labels is None:
            return scaled_logits(head(hidden), spec.logit_divisor, spec.logit_softcap)
        assert loss_weights is not None
        if is_fused(self._fusion, labels.numel()) and getattr(head, "bias", None) is None and _is_plain(head):
            layer = OutputLayer(spec.vocab_size, 0, _ALONE, divisor=spec.logit_divisor, softcap=spec.logit_softcap)
            total, losses = fused_linear_cross_entropy(hidden, head.weight, labels, loss_weights, layer)
        else:
            logits = scaled_logits(head(hidden), spec.logit_divisor, spec.logit_softcap)
            losses = vocab_parallel_cross_entropy(logits, labels, first_row=0, vocab_size=spec.vocab_size, group=_ALONE)
            total = (losses * loss_weights).sum()
        if not num_channels:
            return torch.stack([total])  # no view, on which FSDP2 warns
        assert channels is not None
        apart = losses.detach() * loss_weights
        return torch.stack([total, *(torch.where(channels == n, apart, 0.0).sum() for n in range(num_channels))])


def _is_plain(head: nn.Module) -> bool:
    """Whether an output layer is nothing but its weight."""
    return type(head) is nn.Linear


def empty_model(table: ModelTable, dtype: torch.dtype) -> nn.Module:
    """The model of a config.json without memory for its parameters; buffers have their values.

    ConfigError for a model that transformers does not know, or that needs code of its own.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    sequence.register()
    content = dict(table.config)
    model_type = content.pop("model_type")
    for name in ("architectures", "auto_map", "quantization_config", "dtype", "torch_dtype"):
        content.pop(name, None)
    try:
        config = AutoConfig.for_model(model_type, **content)
        config.use_cache = False
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=sequence.NAME)
        model.tie_weights()
        return model.train()  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--backend fsdp: transformers cannot make a model of type {model_type!r}: {first}; use --backend megatron"
        ) from error


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a checkpoint holds, by name, made fp32."""
    found = {}
    for prefix, owner in model.named_modules():
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                owner._buffers[name] = buffer.float()
                found[f"{prefix}.{name}" if prefix else name] = owner._buffers[name]
    return {name: buffer for name, buffer in found.items() if buffer is not None}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: what is gathered, and computed again, at a time."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(
            f"--backend fsdp: {type(model).__name__} does not name its layers (_no_split_modules), by which it would "
            "be sharded: use --backend megatron"
        )
    return found


def add_noise(model: nn.Module, alpha: float) -> None:
    """Embeddings [b, s, h] of training batches get noise (`mswift.parallel.dropout.noise`)."""

    def noisy(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return noise(output.transpose(0, 1), EMBEDDING_NOISE, alpha).transpose(0, 1)

    model.get_input_embeddings().register_forward_hook(noisy)  # type: ignore[operator]


def compile_layers(layers: list[nn.Module], device: torch.device) -> None:
    """What is inside of each layer by torch.compile, for any length from the start; attention stays as it is.

    ConfigError on a CPU without a compiler.
    """
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ConfigError(f"--torch_compile needs a C++ compiler on a CPU ({', '.join(compilers)}): leave it out")
    assert torch.compile.__module__ == "torch", "torch.compile does nothing in this process (parallel.megatron.no_gpu)"
    sequence.register(compiled=True)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]


KEPT = (
    *("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_cudnn_attention",),
)
"""torch's operators (torch.ops.aten.NAME.default) whose results are kept: products of matrices, and attention."""


def recompute(layers: list[nn.Module], *, keep_products: bool = False) -> None:
    """Keep the inputs of these blocks only; what is inside is computed again in the backward pass.

    keep_products: all but what `KEPT` gives is.
    """
    operators = [getattr(torch.ops.aten, name).default for name in KEPT if hasattr(torch.ops.aten, name)]
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keep_products:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, operators)
    for layer in layers:
        plain = layer.forward

        def again(*args: Any, _plain: Any = plain, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return _plain(*args, **named)
            return checkpoint(remembered(_plain), *args, **options, **named)

        layer.forward = again  # type: ignore[method-assign]


def copy_products(model: nn.Module) -> None:
    """In training PEFT's layers get a copy of what a linear of the base gives, and may write into it.

    For `recompute` with keep_products: what a linear gave is kept, and would be kept with all that was added to it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.get_base_layer().register_forward_hook(_copied)


def _copied(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.clone() if torch.is_grad_enabled() else output


def allocate(module: nn.Module, device: torch.device) -> None:
    """Memory for the parameters of a module (and below) that have none yet; those that are one stay one."""
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None or parameter.device.type != "meta":
                continue
            if id(parameter) not in made:
                values = torch.empty_like(parameter, device=device)
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            owner._parameters[name] = made[id(parameter)]
    for owner in module.modules():
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)
