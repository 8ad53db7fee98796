"""One engine of the gate, as a process: `python -m mswift.handover.scoring JOB.json OUT.npz`.

JOB: engine, device, rows of token ids [rows, length], and subjects: name -> model directory, adapter or null, and the
checkpoint that the training engine reads. OUT: `<subject> logprobs` float32 and `<subject> argmax` int64, both
[rows, length - 1]. All in float32, teacher-forced.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mswift.launchers.environment import RankInfo, current

Arrays = dict[str, Any]


def main(job: Mapping[str, Any], out: Path) -> None:
    """Score all subjects; rank 0 writes."""
    found = _megatron(job) if job["engine"] == "megatron" else _engine(job)
    info = current()
    if info is None or info.rank == 0:
        np.savez(out, allow_pickle=False, **found)


def _engine(job: Mapping[str, Any]) -> Arrays:
    """transformers or vLLM: by the engine that answers requests."""
    from mswift.infer.backends import EngineConfig, open_engine
    from mswift.infer.request import BASE_MODEL

    out: Arrays = {}
    rows: Sequence[Sequence[int]] = job["rows"]
    pairs = [(row[:1], row[1:]) for row in rows]
    for name, subject in job["subjects"].items():
        adapters = {"adapter": Path(subject["adapter"])} if subject["adapter"] else {}
        config = EngineConfig(Path(subject["model"]), adapters, torch_dtype="float32", device=job["device"])
        engine = open_engine(job["engine"], config, in_process=True)
        scores = engine.score(pairs, "adapter" if adapters else BASE_MODEL)
        out[f"{name} logprobs"] = np.array([[t.logprob for t in score.tokens] for score in scores], np.float32)
        out[f"{name} argmax"] = np.array([[t.top[0][0] for t in score.tokens] for score in scores], np.int64)
        engine.close()
        del engine
    return out


def _megatron(job: Mapping[str, Any]) -> Arrays:
    from mswift.parallel import device, groups
    from mswift.topology import ParallelDims

    chosen = device.prepare(job["device"])  # before the first import of megatron.core
    info = current() or RankInfo.single()
    dims = ParallelDims(world_size=info.world_size, tp=info.world_size)
    groups.init(dims, chosen, info)
    out: Arrays = {}
    for name, subject in job["subjects"].items():
        logprobs, argmax = _train_engine(subject, job["rows"], dims, chosen)
        out |= {f"{name} logprobs": logprobs, f"{name} argmax": argmax}
    groups.destroy()
    return out


def _train_engine(subject: Mapping[str, Any], rows: Sequence[Sequence[int]], dims: Any, device: Any) -> tuple[Any, Any]:
    """(log-probabilities, argmax) of the training engine, row by row."""
    import torch

    from mswift.converters.reader import WeightReader
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine
    from mswift.tuners.adapter import PeftAdapter

    reader = WeightReader(Path(subject["trained"]))
    reader.leave_out_mtp()
    start = PeftAdapter(Path(subject["adapter"])) if subject["adapter"] else None
    lora, modules = (None, ()) if start is None else start.lora_config(reader.table, 0)
    engine = MegatronEngine(reader.table, dims, EngineConfig(lora=lora, trainable_modules=modules), device)
    engine.load_weights(reader)
    if start is not None:
        engine.load_adapter(start)
    logprobs, argmax = [], []
    for row in rows:
        tokens = torch.tensor([row])
        logits = engine.logits(tokens)[0, :-1].float().cpu()
        logprobs.append(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].numpy())
        argmax.append(logits.argmax(-1).numpy())
    engine.close()
    return np.stack(logprobs), np.stack(argmax)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
