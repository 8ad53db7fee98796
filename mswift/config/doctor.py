"""What a check of a machine and layout is: the frozen dataclass behind `mswift doctor`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mswift.config.train import SftConfig


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(SftConfig):
    """Prove that a layout computes the same model as one rank, before it trains; or look at this machine.

    doctor layout trains a small model with the structure of --model (random weights, fp32, three steps) on one rank
    and on the ranks of the layout, here, and compares loss, every gradient and every weight. It takes the flags of
    `mswift sft`; those of model, tuner, layout and device matter.

    doctor machine prints versions, cores, GPUs and disk, and lets --nproc_per_node ranks meet and sum.
    """

    check: Annotated[Literal["layout", "machine"], tyro.conf.Positional]
    """What to check."""
    model: str = ""
    """layout: Hugging Face directory, or a directory made by `mswift convert`, or a checkpoint-N of a run."""
