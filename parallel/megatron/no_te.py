"""Mends of megatron-core's faults where Transformer Engine is absent, on any device."""

from types import ModuleType


def name_missing_kernels(moe_utils: ModuleType) -> None:
    """`te_general_gemm` is compared with None, but without Transformer Engine the name does not exist (0.16)."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]
