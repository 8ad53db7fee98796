"""What a machine says of itself: by files as Linux has them, a real socket, and nvidia-smi's rows."""

import socket
from pathlib import Path

from mswift.launchers.machine import Gpu, bytes_per_second_written, networks, parse_gpus, port_refusal


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refusal = port_refusal(port)
        assert refusal is not None
        assert f"port {port}, where the ranks were to meet, cannot be listened at (Address already in use)" in refusal
    assert port_refusal(port) is None


def test_rows_of_nvidia_smi() -> None:
    """As driver 570 prints them; GPUs without ECC say [N/A]."""
    text = "NVIDIA H100 80GB HBM3, 81559 MiB, 570.86.15, 2\nNVIDIA L40S, 46068 MiB, 570.86.15, [N/A]\nNo devices\n"
    assert parse_gpus(text) == [
        Gpu("NVIDIA H100 80GB HBM3", "81559 MiB", "570.86.15", 2), Gpu("NVIDIA L40S", "46068 MiB", "570.86.15", 0)
    ]  # fmt: skip


def files(root: Path, **contents: str) -> None:
    root.mkdir(parents=True)
    for name, text in contents.items():
        (root / name).write_text(text + "\n")


def test_networks_by_the_names_that_nccl_takes(tmp_path: Path) -> None:
    files(tmp_path / "net" / "lo", operstate="unknown")
    files(tmp_path / "net" / "eth0", operstate="up", speed="25000")
    files(tmp_path / "net" / "eth1", operstate="down", speed="-1")
    files(tmp_path / "net" / "ib0", operstate="up")
    rate = "400 Gb/sec (4X NDR)"
    files(tmp_path / "infiniband" / "mlx5_0" / "ports" / "1", state="4: ACTIVE", rate=rate, link_layer="InfiniBand")
    files(tmp_path / "infiniband" / "mlx5_1" / "ports" / "1", state="1: DOWN", rate=rate, link_layer="InfiniBand")
    assert list(networks(tmp_path)) == [
        "eth0 25 Gb/s", "ib0", "mlx5_0:1 InfiniBand 400 Gb/sec active", "mlx5_1:1 InfiniBand 400 Gb/sec down"
    ]  # fmt: skip


def test_a_disk_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    assert bytes_per_second_written(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []
