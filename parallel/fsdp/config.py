"""What the engine of transformers models needs to know beside the model and the layout. No torch."""

from dataclasses import dataclass
from typing import Literal

from mswift.config.loss import LossFusion
from mswift.tuners.lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class FsdpConfig:
    """How an FsdpEngine computes and updates; names as in `mswift.config`.

    BF16 keeps fp32 weights, sharded, and computes in bf16 copies of a block at a time; gradients are summed in fp32.
    shard_size: ranks that share the parameters; each group of as many holds all of them. recompute_blocks: of how many
    of the first blocks only the input is kept.
    """

    dtype: Literal["F32", "BF16"] = "F32"
    shard_size: int = 1
    reshard_after_forward: bool = True
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-5
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    clip_grad: float = 1.0
    seed: int = 42
    timeout_seconds: float = 1800.0
    loss_fusion: LossFusion = "auto"
    lora: LoraConfig | None = None
    trainable_modules: tuple[str, ...] = ()
    lora_b_lr_ratio: float = 1.0
    recompute_blocks: int = 0
