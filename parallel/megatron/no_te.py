"""Mends of megatron-core's faults where Transformer Engine is absent, on any device."""

from types import ModuleType
from typing import Any


def name_missing_kernels(moe_utils: ModuleType) -> None:
    """`te_general_gemm` is compared with None, but without Transformer Engine the name does not exist (0.16)."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def recompute_without_fp8(random: ModuleType) -> None:
    """Recomputation that drops an output (of norms) takes "fp8 or not" for "fp8" (0.16: `fp8 is not None`).

    It then asks Transformer Engine for the state of fp8.
    """
    original = random.CheckpointWithoutOutput.__init__

    def init(self: Any, fp8: object = False) -> None:
        original(self, fp8)
        self.fp8 = False

    random.CheckpointWithoutOutput.__init__ = init  # type: ignore[attr-defined]
