"""The proof of a layout: the same small job on one rank and on the layout's ranks, compared tensor by tensor, in fp32.

Three steps of SGD from random weights: loss and gradient norm of every step, every gradient of the first step, the
weights after the third. What is compared, and how: `mswift.train.proof`.
Import after `mswift.parallel.device.prepare`.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mswift.converters.arrays import Arrays, to_hf
from mswift.converters.plan import ModelTable, table_for
from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine, Microbatch
from mswift.topology import ParallelDims
from mswift.train.collective import ended_by, gather_on_first
from mswift.train.proof import ProofJob, dims_from
from mswift.train.proof_tensors import Gathered, RandomAdapter, RandomWeights, assemble, gather
from mswift.train.scaled_model import scaled_table
from mswift.tuners.lora import LoraConfig

LR = 0.05
NUM_STEPS = 3


def run(job: ProofJob, dims: ParallelDims, device: torch.device) -> Arrays:
    """Train on the ranks of this job; what they computed, by name, on rank 0 ({} on the others).

    LayoutError where the ranks do not hold every element of every tensor exactly once between them.
    """
    config = dict(job.config)
    scaled = None if job.scaled_for is None else dims_from(job.scaled_for)
    table = table_for(config) if scaled is None else scaled_table(config, scaled)
    if job.target_modules or not job.predicts:
        table = table.without_mtp()
    engine = MegatronEngine(table, dims, _engine_config(job, table), device)
    with ended_by(engine.close, dims), OtherOrder() if job.other_order else nullcontext():
        engine.load_weights(RandomWeights(table, job.seed))  # type: ignore[arg-type]
        if job.target_modules:
            engine.load_adapter(RandomAdapter(job.seed))
        results, gradients = [], None
        for step in _steps(job, table.spec.vocab_size):
            results.append(engine.train_step(step[engine.coordinate.dp :: dims.dp], LR))
            gradients = gradients or gather(engine.gradients())
        parts = gather_on_first((gradients, gather(engine.model_shards())))
    if not parts:
        return {}
    out: Arrays = {"loss": np.array([r.loss for r in results]), "grad_norm": np.array([r.grad_norm for r in results])}
    if table.spec.mtp_layers:
        out["mtp_loss"] = np.array([r.mtp_loss for r in results])
    out |= _named("gradient", [gathered for gathered, _ in parts], table)
    return out | _named("weight", [gathered for _, gathered in parts], table)


def _engine_config(job: ProofJob, table: ModelTable) -> EngineConfig:
    lora = None
    if job.target_modules:
        lora = LoraConfig.for_table(table, rank=4, alpha=8, target_modules=job.target_modules, seed=job.seed)
    return EngineConfig(
        micro_batch_size=job.batch,
        optimizer="sgd",
        lr=LR,
        lora=lora,
        seed=job.seed,
        loss_fusion=job.loss_fusion,
        cp_comm_type=job.cp_comm_type,
        mtp_num_layers=len(table.spec.mtp_layers),
    )


def _steps(job: ProofJob, vocab_size: int) -> Iterator[Sequence[Microbatch]]:
    """Random microbatches whose loss weights are uneven, a third of them zero."""
    generator = torch.Generator().manual_seed(job.seed)
    first = job.length // 3
    documents = (first, job.length - first) * job.batch if job.packed else None
    for _ in range(NUM_STEPS):
        shape = (job.num_microbatches, job.batch, job.length)
        tokens = torch.randint(0, vocab_size, (*shape[:2], job.length + 1), generator=generator)
        weights = torch.rand(shape, generator=generator)
        weights[weights < 0.3] = 0
        weights[0] *= 3
        yield [
            Microbatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), w, documents)
            for t, w in zip(tokens, weights, strict=True)
        ]


def _named(kind: str, ranks: Sequence[Gathered], table: ModelTable) -> Arrays:
    """Whole tensors in HF space, "gradient model.norm.weight"."""
    arrays = {key.removeprefix("gradient."): array for key, array in assemble(ranks).items()}
    adapters = {key.removeprefix("adapter."): array for key, array in arrays.items() if key.startswith("adapter.")}
    model = {key: array for key, array in arrays.items() if not key.startswith("adapter.")}
    whole = adapters | (to_hf(model, table) if model else {})
    return {f"{kind} {name}": array for name, array in whole.items()}


class OtherOrder(TorchDispatchMode):
    """Inside it, every matrix product is the sum of the products of two halves: as exact, rounded otherwise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Split the inner dimension of the products that the model and its gradients are made of."""
        aten, name = torch.ops.aten, func._schema.name
        if func in (aten.mm.default, aten.bmm.default):
            a, b = args
            half = a.shape[-1] // 2
            return func(a[..., :half], b[..., :half, :]) + func(a[..., half:], b[..., half:, :])
        if func is aten.addmm.default and not kwargs:
            bias, a, b = args
            return bias + self.__torch_dispatch__(aten.mm.default, types, (a, b))
        if name == "mkldnn::_linear_pointwise":
            x, weight = args[:2]
            flat = self.__torch_dispatch__(aten.mm.default, types, (x.reshape(-1, x.shape[-1]), weight.t()))
            return flat.view(*x.shape[:-1], weight.shape[0])
        return func(*args, **(kwargs or {}))
