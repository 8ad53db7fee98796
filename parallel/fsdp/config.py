"""What an engine of transformers models needs to know beside the model and the layout."""

from dataclasses import dataclass
from typing import Literal

from mswift.parallel.engine import EngineSettings
from mswift.parallel.four_bit import Kind
from mswift.parallel.held_codes import HeldCodes
from mswift.tuners.lisa import LayerSampling


@dataclass(frozen=True, kw_only=True)
class HfSettings(EngineSettings):
    """How a transformers model is computed, tuned and updated, whoever lays it out over ranks.

    recompute_blocks: of how many of the first blocks only the input is kept; recompute_keeps_products: and the results
    of `model.KEPT`. lisa: which of its layers are trained at a time (None: all). shifted_attention: training attends
    within groups (`mswift.parallel.shifted`). galore_scale None: the library's. four_bit_base: how bitsandbytes keeps
    the linears of the layers, or which keep the codes of their checkpoint; cut or whole as the rest.
    """

    recompute_blocks: int = 0
    recompute_keeps_products: bool = False
    compile_layers: bool = False
    liger_kernels: bool = False
    four_bit_base: Kind | HeldCodes | None = None
    lisa: LayerSampling | None = None
    shifted_attention: bool = False
    muon_momentum: float = 0.95
    galore_rank: int = 128
    galore_update_proj_gap: int = 200
    galore_scale: float | None = None
    galore_quantization: bool = False
    galore_proj_quant: bool = True
    galore_proj_bits: Literal[4, 8] = 4
    galore_proj_group_size: int = 256
    galore_cos_threshold: float = 0.4
    galore_gamma_proj: int = 2
    galore_queue_size: int = 5


@dataclass(frozen=True, kw_only=True)
class FsdpConfig(HfSettings):
    """BF16 keeps fp32 weights, sharded, and computes in bf16 copies of a block at a time.

    shard_size: ranks that share the parameters; each group of as many holds all of them. cpu_offload: parameters,
    gradients and optimizer state lie in host memory.
    """

    shard_size: int = 1
    reshard_after_forward: bool = True
    cpu_offload: bool = False
