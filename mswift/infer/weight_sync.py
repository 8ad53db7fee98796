"""New weights for a live vLLM, from whatever yields (name, tensor) as the Hugging Face checkpoint has them.

In process, or to a server over a spool directory in memory. The tensors come from a trainer
(`mswift.train.weight_stream`), in its order; every one is hashed on its way, none may be missing or extra. Of an
adapter run the adapter alone is sent, and the base is not touched. The prefix cache is emptied after each update.

A reload that fails half-way leaves vLLM with weights of both models, or with none (HALF_RELOADED): the error says so,
and the engine is given up, the server stopped.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import save
from torch import Tensor

from mswift.errors import CheckpointError, MswiftError
from mswift.infer.vllm_engine import VllmEngine
from mswift.infer.vllm_server import VllmServer
from mswift.infer.vllm_worker import END

Named = tuple[str, Tensor]
BUCKET_BYTES = 256 << 20
_AHEAD = 2
_MEMORY = Path("/dev/shm")


@dataclass
class SyncReport:
    """What was sent; `hashes`: name -> BLAKE3 of the tensor's bytes, as mswift's manifests have them."""

    num_bytes: int = 0
    num_buckets: int = 0
    seconds: float = 0.0
    hashes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{len(self.hashes)} tensors, {self.num_bytes:,} bytes sent in {self.seconds:.2f} s"


def update_engine(engine: VllmEngine, tensors: Iterable[Named], expected: Mapping[str, tuple[int, ...]]) -> SyncReport:
    """Replace the weights of an engine of this process; expected: name -> shape of every tensor of the model.

    Raises CheckpointError for a tensor that is missing, extra or of another shape, after giving the engine up.
    """
    report = SyncReport()
    started = time.monotonic()
    counted = _Counted(tensors, expected, report)
    try:
        engine.llm.collective_rpc("take_weights", args=(counted,))
        _require_all(counted)
    except Exception as error:
        engine.give_up(f"an update of its weights failed half-way ({error})")
        raise _half_way(error) from error
    engine.reset_prefix_cache()
    report.num_buckets, report.seconds = 1, time.monotonic() - started
    return report


def update_adapter(engine: VllmEngine, name: str, path: Path) -> None:
    """Answer with the adapter of that PEFT directory from now on, under this name; the base stays."""
    engine.load_adapter(name, path)
    engine.reset_prefix_cache()  # it is keyed by the adapter's name


def update_server(
    server: VllmServer,
    tensors: Iterable[Named],
    expected: Mapping[str, tuple[int, ...]],
    *,
    bucket_bytes: int = BUCKET_BYTES,
    num_workers: int = 1,
    spool: Path | None = None,
) -> SyncReport:
    """Replace the weights of a server that was started with `weight_updates`; requests wait meanwhile.

    num_workers: its tensor-parallel ranks, all on this machine. spool: a directory for the buckets, at most two at a
    time; default: memory. Raises CheckpointError as `update_engine`, after stopping the server.
    """
    report = SyncReport()
    started = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="mswift-weights-", dir=spool or (_MEMORY if _MEMORY.is_dir() else None)))
    try:
        server.post("/pause", query="?mode=wait")
        call = _Call(lambda: server.post("/collective_rpc", {"method": "receive_weights", "args": [str(home)]}))
        _send(home, _Counted(tensors, expected, report), bucket_bytes, num_workers, call, report)
        _check_answer(call.result(), report)
    except Exception as error:
        server.stop()
        raise _half_way(error) from error
    finally:
        shutil.rmtree(home, ignore_errors=True)
    server.post("/reset_prefix_cache")
    server.post("/resume")
    report.seconds = time.monotonic() - started
    return report


def update_server_adapter(server: VllmServer, name: str, path: Path) -> None:
    """As `update_adapter`, for a server that was started with `weight_updates` and with an adapter."""
    server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path.resolve()), "load_inplace": True})
    server.post("/reset_prefix_cache")


def _send(
    home: Path, tensors: Iterator[Named], bucket_bytes: int, num_workers: int, call: "_Call", report: SyncReport
) -> None:
    """Write bucket after bucket, at most _AHEAD of them untaken; stop as soon as the server has failed."""
    for bucket in _buckets(tensors, bucket_bytes):
        number = report.num_buckets
        _await_taken(home, number - _AHEAD, num_workers, call)
        data = save(bucket)
        partial = home / "partial"
        partial.write_bytes(data)
        partial.rename(home / f"bucket-{number}-{blake3(data).hexdigest()}.safetensors")
        report.num_buckets += 1
    _require_all(tensors)
    (home / "partial").write_text(str(report.num_buckets))
    (home / "partial").rename(home / END)


def _await_taken(home: Path, number: int, num_workers: int, call: "_Call") -> None:
    while number >= 0 and len(list(home.glob(f"taken-{number}-*"))) < num_workers:
        call.raise_if_failed()
        time.sleep(0.002)
    for path in home.glob(f"bucket-{number}-*"):
        path.unlink()


def _buckets(tensors: Iterator[Named], bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Tensors together, up to that size (or one of them)."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket


class _Counted(Iterator[Named]):
    """The tensors, hashed and compared with what is expected; `missing` is what did not come yet."""

    def __init__(self, tensors: Iterable[Named], expected: Mapping[str, tuple[int, ...]], report: SyncReport) -> None:
        self._tensors = iter(tensors)
        self.missing = dict(expected)
        self._report = report

    def __next__(self) -> Named:
        name, tensor = next(self._tensors)
        shape = self.missing.pop(name, None)
        if shape is None:
            raise CheckpointError(f"{name} {list(tensor.shape)} is no tensor of the model, or came twice")
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name} has shape {list(tensor.shape)}, the model needs {list(shape)}")
        whole = tensor.detach().cpu().contiguous()
        self._report.hashes[name] = blake3(memoryview(whole.view(-1).view(torch.uint8).numpy())).hexdigest()
        self._report.num_bytes += whole.nbytes
        return name, whole


def _require_all(tensors: Any) -> None:
    if tensors.missing:
        some = ", ".join(list(tensors.missing)[:3])
        raise CheckpointError(f"{len(tensors.missing)} tensors of the model did not come ({some})")


def _check_answer(answer: Any, report: SyncReport) -> None:
    """Every worker tells how many tensors it took."""
    counts = (answer or {}).get("results") or []
    if not counts or any(int(count) != len(report.hashes) for count in counts):
        raise MswiftError(f"{len(report.hashes)} tensors were sent, vLLM's workers took {counts}")


def _half_way(error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the update of vLLM's weights failed half-way: {error}. It holds weights of both models now and is given up; "
        "start it again"
    )


class _Call:
    """A call that runs beside this thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="weight update", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._value = work()
        except Exception as error:  # raised where it is waited for
            self._error = error

    def raise_if_failed(self) -> None:
        """Raise its error; MswiftError when it has ended too early."""
        if not self._thread.is_alive():
            if self._error is not None:
                raise self._error
            raise MswiftError("vLLM's workers stopped before all weights had come")

    def result(self) -> Any:
        """Wait for its end; its value, or its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value
