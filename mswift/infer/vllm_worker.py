"""Inside vLLM's workers: take new weights, of the same process or from a spool directory. Imports nothing of mswift.

A sender (`mswift.infer.weight_sync`) writes `bucket-<number>-<BLAKE3>.safetensors` one after the other and `end`, which
holds their number; a worker that has taken a bucket writes `taken-<number>-<rank>`. `reload_weights` pulls the buckets
one at a time, so that two of them are the memory that an update needs.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 600.0
"""How long the next bucket may take."""
END = "end"


class WeightReceiver:
    """What `worker_extension_cls` adds to vLLM's workers."""

    def receive_weights(self, home: str, patience_seconds: float = PATIENCE_SECONDS) -> int:
        """Replace the weights by those of the spool directory; how many tensors there were."""
        counted = [0]
        self.take_weights(_tensors(Path(home), getattr(self, "rank"), patience_seconds, counted))  # noqa: B009
        return counted[0]

    def take_weights(self, tensors: Iterable[tuple[str, Any]]) -> None:
        """Replace the weights by these (name, tensor), all of the model."""
        own: Any = self
        own.model_runner.reload_weights(weights_iterator=tensors)  # RELOAD
        for module in own.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)  # TIED_HEAD


def _tensors(home: Path, rank: int, patience_seconds: float, counted: list[int]) -> Iterator[tuple[str, Any]]:
    from blake3 import blake3
    from safetensors.torch import load

    number = 0
    while (path := _next(home, number, patience_seconds)) is not None:
        data = path.read_bytes()
        said, found = path.stem.rpartition("-")[2], blake3(data).hexdigest()
        if said != found:
            raise ValueError(f"{path.name}: BLAKE3 {found} of what arrived: it is not what was sent")
        for name, tensor in load(data).items():
            counted[0] += 1
            yield name, tensor
        (home / f"taken-{number}-{rank}").touch()
        number += 1


def _next(home: Path, number: int, patience_seconds: float) -> Path | None:
    """The bucket of that number; None when there are no more."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        for path in home.glob(f"bucket-{number}-*.safetensors"):
            return path
        end = home / END
        if end.exists() and int(end.read_text()) == number:
            return None
        time.sleep(0.002)
    raise TimeoutError(f"{home}: bucket {number} did not come within {patience_seconds:.0f} seconds")
