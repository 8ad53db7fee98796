"""What megatron-core needs where there is no Transformer Engine or no GPU. Applied by mswift.parallel.device.prepare.

Each group is pinned to the megatron-core versions it was tested with; others are refused. Nothing in
megatron-core's files is changed.
"""

import sys
import warnings
from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version

from mswift.errors import ConfigError
from mswift.parallel import dropout
from mswift.parallel.megatron import cpu_linear, no_gpu, no_te

TESTED = ("0.16.1", "0.17")  # from (included) to (excluded)
HIDDEN = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
HIDDEN_ON_CPU = ("fused_weight_gradient_mlp_cuda",)  # --gradient_accumulation_fusion on a GPU

_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    (r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning),  # megatron-core 0.16 calls the older names
    (r"Apex is not installed", UserWarning),
    (r"full scope is deprecated", UserWarning),  # about CUDA graphs, which are off
    (r"When using (sequence parallelism|async grad allreduce) it is recommended", UserWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),  # its optimizer's shards are views
)


@dataclass
class _State:
    applied_for: str | None = None


_state = _State()


def apply(*, on_gpu: bool) -> None:
    """Check the version and apply the groups for this kind of device; the second call for it does nothing.

    Raises ConfigError for a version outside TESTED, and when this process was prepared for the other device.
    """
    wanted = "cuda" if on_gpu else "cpu"
    if _state.applied_for == wanted:
        return
    if _state.applied_for is not None:
        raise ConfigError(
            f"--device {wanted}: this process already runs megatron-core on {_state.applied_for}; start another process"
        )
    check_version(installed_version())
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before mswift.parallel.device.prepare()")
    hide_fused_kernels(on_gpu=on_gpu)
    if not on_gpu:
        no_gpu.replace_cuda_calls()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # five "X is not installed" at import; it is hidden on purpose
        import megatron.core.tensor_parallel.layers
        import megatron.core.tensor_parallel.mappings
        import megatron.core.tensor_parallel.random
        import megatron.core.transformer.moe.token_dispatcher
    no_te.name_missing_kernels(megatron.core.transformer.moe.moe_utils)
    dropout.remember_places(megatron.core.tensor_parallel)
    no_te.recompute_without_fp8(megatron.core.tensor_parallel.random)
    cpu_linear.replace_linears(megatron.core.tensor_parallel.layers, on_gpu=on_gpu)
    if not on_gpu:
        no_gpu.replace_rng_access(megatron.core.tensor_parallel.random)
        no_gpu.replace_uneven_collectives(megatron.core.tensor_parallel.mappings)
        no_gpu.replace_split_counts(megatron.core.transformer.moe.token_dispatcher)
    for message, category in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    _state.applied_for = wanted


def installed_version() -> str:
    """Version of the installed megatron-core. Raises ConfigError when there is none."""
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError as error:
        raise ConfigError("megatron-core is not installed: pip install 'megatron-core>=0.16.1,<0.17'") from error


def check_version(version: str) -> None:
    """ConfigError unless the mends were tested with this megatron-core."""
    first, after = TESTED
    try:
        known = Version(first) <= Version(version) < Version(after)
    except InvalidVersion:
        known = False
    if not known:
        raise ConfigError(
            f"megatron-core {version} is installed, but the mends of mswift are tested with {first} up to, "
            f"not including, {after}: pip install 'megatron-core>={first},<{after}'"
        )


def hide_fused_kernels(*, on_gpu: bool) -> None:
    """Make `import transformer_engine` and `import apex` fail in this process, as if they were not installed."""
    for name in (*HIDDEN, *(() if on_gpu else HIDDEN_ON_CPU)):
        sys.modules[name] = None  # type: ignore[assignment]
