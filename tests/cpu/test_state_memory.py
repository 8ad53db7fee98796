"""Host memory that saving and loading need above the state itself: none that grows with the model."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.ranks import join
from tests.support.server import ENVIRON, ROOT
from tests.support.tiny import tiny_model

MIB = 1 << 20
SLACK = 24 * MIB
"""Two tensors of 4 MiB, pieces of 1 MiB, indices, modules imported on first use, and what the allocator keeps."""


def grown(action: Any) -> int:
    """Growth of this process's high-water mark of resident memory while `action` runs."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmRSS")
    action()
    return (_kib("VmHWM") - before) << 10


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def saves(payload: dict[str, str]) -> dict[str, int]:
    """Train one step and save: bytes of the state, and what a save at once and one in the background needed."""
    engine, reader, device = _engine(payload["model"])
    import torch

    from mswift.parallel.megatron.engine import Microbatch
    from mswift.train import checkpoint
    from mswift.train.save import BackgroundSave, CheckpointSave, Staging, save_now, state_shards

    engine.load_weights(reader)

    tokens = torch.arange(8)[None]
    engine.train_step([Microbatch(tokens, tokens, torch.ones(1, 8))], 1e-3)
    staging, output = Staging(), Path(payload["output"])

    def save(step: int, shards: Any) -> CheckpointSave:
        state = checkpoint.RunState(step, 0, 1, 1, checkpoint.engine_layout(engine), "", 0, {})
        return CheckpointSave(output, state, 0, shards, reader.side_files())

    def in_the_background() -> None:
        BackgroundSave(save(3, staging.copy(state_shards(engine, 0), device))).finish()

    save_now(save(1, state_shards(engine, 0)))  # imports, and what is allocated once
    result = {"save": grown(lambda: save_now(save(2, state_shards(engine, 0)))), "copy": grown(in_the_background)}
    result["state"] = sum(s.tensor.numel() * s.tensor.element_size() for s in state_shards(engine, 0))
    engine.close()
    return result


def loads(payload: dict[str, str]) -> int:
    """What a fresh process needs to prove and load a checkpoint: the state, and what is above it."""
    engine, _, _ = _engine(payload["model"])
    from mswift.train import checkpoint

    path = Path(payload["output"]) / "checkpoint-2"

    def load() -> None:
        checkpoint.check_share(path, 0, 1)
        checkpoint.load(engine, path, 0, 1)

    result = grown(load)
    engine.close()
    return result


def _engine(model: str) -> tuple[Any, Any, Any]:
    dims, device = join(1)
    from mswift.converters.reader import WeightReader
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine

    reader = WeightReader(Path(model))
    return MegatronEngine(reader.table, dims, EngineConfig(), device), reader, device


def in_a_fresh_process(function: Callable[[dict[str, str]], Any], payload: dict[str, str]) -> Any:
    """What it returns as a program: a fork's memory begins with that of its server."""
    code = (
        "import json, sys; from tests.cpu import test_state_memory as here\n"
        "result = getattr(here, sys.argv[1])(json.loads(sys.argv[2])); print(); print(json.dumps(result))"
    )
    argv = [sys.executable, "-c", code, function.__name__, json.dumps(payload)]
    env = ENVIRON | {
        "MALLOC_MMAP_THRESHOLD_": "131072"
    }  # else freed tensors stay with the allocator, or not, by chance
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_saving_and_loading_need_a_bounded_buffer(tmp_path: Path) -> None:
    """The largest tensor has 4 MiB; of the state, 100 MiB, a fresh engine's memory holds nothing yet."""
    tiny_model(tmp_path / "model", hidden_size=512, intermediate_size=1024, vocab_size=2048)
    payload = {"model": str(tmp_path / "model"), "output": str(tmp_path / "run")}
    found = in_a_fresh_process(saves, payload)
    found["load"] = in_a_fresh_process(loads, payload)
    print({name: round(size / MIB, 1) for name, size in found.items()})
    assert found["state"] > 90 * MIB
    assert found["save"] < SLACK
    assert found["load"] < found["state"] + SLACK
    assert found["state"] - SLACK < found["copy"] < found["state"] + SLACK  # the partner: the meter sees a copy
