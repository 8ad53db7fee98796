"""Liger's Triton kernels in one transformers model: norms, rotation, gated activations; never its loss.

The package changes modules of transformers for every model of the process. Here its changes are put into the instance
and taken back from the modules: another model of the same kind computes as before.
"""

import inspect
import os
import sys
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from mswift.errors import ConfigError

_INTERPRETED = "TRITON_INTERPRET"  # triton's own variable: kernels as Python, on any device


def check_liger(device: torch.device) -> None:
    """ConfigError where Liger's kernels cannot run."""
    if device.type != "cuda" and os.environ.get(_INTERPRETED) != "1":
        raise ConfigError(
            "--use_liger_kernel: Liger's kernels are Triton programs for a GPU, and this rank computes on "
            f"{device.type}: leave it out (output layer and loss are fused without it: --cross_entropy_loss_fusion)"
        )


def use_liger(model: nn.Module, model_type: str) -> None:
    """Let Liger compute what it has kernels for; ConfigError where it has none for this kind of model."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ConfigError(
            f"--use_liger_kernel needs liger-kernel ({error}): pip install 'mswift[liger]', or leave it out"
        ) from None
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    loss = {"cross_entropy", "fused_linear_cross_entropy"} & inspect.signature(apply).parameters.keys()
    modeling = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    try:
        apply(model=model, **dict.fromkeys(loss, False))
        functions = {
            name: value
            for name, value in vars(modeling).items()
            if isinstance(value, FunctionType) and value is not before.get(name)
        }
    finally:
        _restore(modeling, before)
    for module in model.modules():
        _call_instead(module, functions)


def _restore(modeling: ModuleType, before: dict[str, Any]) -> None:
    for name in vars(modeling).keys() - before.keys():
        delattr(modeling, name)
    for name, value in before.items():
        if vars(modeling)[name] is not value:
            setattr(modeling, name, value)


def _call_instead(module: nn.Module, functions: dict[str, Any]) -> None:
    """Let the forward pass of a module call these functions, where it calls some of their names."""
    plain = type(module).forward
    if "forward" in vars(module) or not isinstance(plain, FunctionType):
        return
    if functions.keys().isdisjoint(plain.__code__.co_names):
        return
    own = FunctionType(
        plain.__code__, {**plain.__globals__, **functions}, plain.__name__, plain.__defaults__, plain.__closure__
    )
    own.__kwdefaults__ = plain.__kwdefaults__
    module.forward = MethodType(own, module)  # type: ignore[method-assign]
