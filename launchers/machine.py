"""What this machine has, by its own tools and files: GPUs, networks, a free port, a disk's speed. No torch."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_SECONDS = 30
_WRITTEN_BYTES = 64 << 20


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi tells of it."""

    name: str
    memory: str
    driver: str
    ecc_errors: int
    """Uncorrected since it was started; 0 where they are not counted."""


def gpus() -> list[Gpu]:
    """The GPUs of this machine by nvidia-smi; [] where there is none, or it does not answer."""
    fields = "name,memory.total,driver_version,ecc.errors.uncorrected.volatile.total"
    argv = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(text: str) -> list[Gpu]:
    """Rows of nvidia-smi: name, memory, driver, errors ("[N/A]" where they are not counted)."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 3]
    return [Gpu(name, memory, driver, int(ecc) if ecc.isdecimal() else 0) for name, memory, driver, ecc in rows]


def networks(root: Path = Path("/sys/class")) -> Iterator[str]:
    """Networks that are up, as NCCL_SOCKET_IFNAME names them, and ports of InfiniBand or RoCE, as NCCL_IB_HCA does."""
    for path in sorted((root / "net").glob("*")):
        if path.name != "lo" and _line(path / "operstate") in ("up", "unknown"):
            speed = _line(path / "speed")
            yield path.name + (f" {int(speed) / 1000:g} Gb/s" if speed.isdecimal() else "")
    for path in sorted((root / "infiniband").glob("*/ports/*")):
        state, rate = _line(path / "state").rpartition(" ")[2].lower(), _line(path / "rate").partition(" (")[0]
        yield f"{path.parents[1].name}:{path.name} {_line(path / 'link_layer')} {rate} {state}"


def port_refusal(port: int) -> str | None:
    """Why rank 0 could not listen at `port` of this machine, or None. Listens as torch's store does, for an instant."""
    trouble = ""
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((address, port))
                listener.listen()
                return None
        except OSError as error:
            trouble = str(error.strerror)
    return (
        f"port {port}, where the ranks were to meet, cannot be listened at ({trouble}): start again (under SLURM the "
        "port follows from job and restart), or name another in MASTER_PORT or --master_port"
    )


def bytes_per_second_written(folder: Path) -> float:
    """How fast 64 MiB reach the disk of `folder` (written and synced; the file is removed)."""
    path = folder / f".write-{os.getpid()}"
    block = os.urandom(1 << 20)
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(_WRITTEN_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return _WRITTEN_BYTES / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def _line(path: Path) -> str:
    """The one line of a file in /sys; "" where it does not say."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
