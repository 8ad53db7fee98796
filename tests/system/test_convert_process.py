"""The converter as a process: kill -9 and the same command again, parts side by side, bounded memory, full disks."""

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.conversion.processes import command, run_until
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.plan import table_for
from mswift.converters.verify import verify, verify_record
from tests.support.checkpoints import hf_shapes, random_model, tiny_config, write_model

BIG: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "head_dim": 256, "vocab_size": 16000}


def weights(path: Path) -> dict[str, bytes]:
    """Every file of a directory but the manifest, which has the time that the conversion took."""
    files = (p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_killed_at_random_moments_it_continues(to: str, tmp_path: Path) -> None:
    total = sum(t.nbytes for t in random_model(tmp_path / "hf", shards=3, **BIG).values())
    flags = ["--max_shard_size", "30MB"]
    assert run_until(command(tmp_path / "hf", tmp_path / "whole", to, *flags), None)[0] is False
    generator = random.Random(to)
    killed = []
    for number in range(3):
        limit = generator.randrange(total)
        killed.append(run_until(command(tmp_path / "hf", tmp_path / "out", to, *flags), limit)[0])
        flags = ["--max_shard_size", "30MB", "--num_workers", str(number + 1)]
        assert not (tmp_path / "out").exists() or not killed[-1]
        if not killed[-1]:
            break
    if killed[-1]:
        run_until(command(tmp_path / "hf", tmp_path / "out", to, *flags), None)
    assert any(killed)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert verify_record(tmp_path / "out").equal
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out", "whole"]


def test_parts_run_side_by_side_and_one_is_killed(tmp_path: Path) -> None:
    total = sum(t.nbytes for t in random_model(tmp_path / "hf", **BIG).values())
    parts = [command(tmp_path / "hf", tmp_path / "out", "megatron", "--part", f"{n}/3") for n in (1, 2, 3)]
    others = [subprocess.Popen(part, stdout=subprocess.PIPE, text=True) for part in parts[1:]]
    run_until(parts[0], total // 8)
    for other in others:
        assert "part" in other.communicate()[0]
        assert other.returncode == 0
    finish = command(tmp_path / "hf", tmp_path / "out", "megatron", "--finish")
    early = subprocess.run(finish, capture_output=True, text=True)
    if early.returncode:  # unless the kill came too late
        assert "--part 1/3, then --finish again" in early.stderr
        run_until(parts[0], None)
        subprocess.run(finish, check=True, capture_output=True)
    assert verify_record(tmp_path / "out").equal
    assert verify(tmp_path / "out", tmp_path / "hf").equal


# -- memory

MEASURE = """
import sys
from pathlib import Path
from mswift.converters import execute, proof, verify, workers
from mswift.converters.engine import convert
if sys.argv[5] == "whole":  # the fault that the limit must find
    workers.PIECE_BYTES = execute.PIECE_BYTES = 1 << 28
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], num_workers=4, hash_source=sys.argv[4] == "hash")
heavy = {"torch", "transformers", "megatron"} & set(sys.modules)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]), *heavy)
"""
LIMIT_KIB = 96 << 10


def sparse_model(path: Path, vocab_size: int) -> int:
    """A model in one file that takes no room on the disk; returns its bytes."""
    import json
    from math import prod

    config = tiny_config(hidden_size=2048, intermediate_size=8192, head_dim=512, num_hidden_layers=1)
    config["vocab_size"] = vocab_size
    write_model(path, config, {})
    header, position = {}, 0
    for name, shape in hf_shapes(config).items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + 2 * prod(shape)]}
        position += 2 * prod(shape)
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return position


def peak(*arguments: str) -> tuple[int, list[str]]:
    """(KiB of resident memory at most, heavy modules imported) of a conversion in a process of its own."""
    argv = [sys.executable, "-c", MEASURE, *arguments]
    kib, *heavy = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    return int(kib), heavy


def test_memory_is_bounded_and_torch_is_not_imported(tmp_path: Path) -> None:
    """Tensors of 123 MB (holes in a sparse file) move in less than 96 MiB, both ways; a whole one would not fit."""
    assert sparse_model(tmp_path / "hf", 30_000) > 3 * 10**8
    for source, destination, to, mode in (("hf", "m", "megatron", "hash"), ("m", "back", "hf", "none")):
        kib, heavy = peak(str(tmp_path / source), str(tmp_path / destination), to, mode, "pieces")
        assert kib < LIMIT_KIB
        assert not heavy
    shutil.rmtree(tmp_path / "back")
    assert peak(str(tmp_path / "m"), str(tmp_path / "back"), "hf", "hash", "whole")[0] > LIMIT_KIB


# -- destinations


def convert_in_words(source: Path, destination: Path, *flags: str, **popen: Any) -> str:
    """What a conversion that must fail says: one message, no traceback, nothing published."""
    result = subprocess.run(command(source, destination, "megatron", *flags), capture_output=True, text=True, **popen)
    assert result.returncode in (1, 2), result
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("mswift convert: --output_dir ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_destinations_that_cannot_be_written(tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("file", "exists already"),
        ("link", "exists already"),
        ("hf", "exists already"),
        ("file/out", "file"),
        ("/proc/out", "cannot create"),
    ):
        assert message in convert_in_words(tmp_path / "hf", tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "hf", "link"]


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE fails in the middle of the copying, as a quota does."""
    random_model(tmp_path / "hf", **BIG)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30 << 20, 30 << 20))

    said = convert_in_words(tmp_path / "hf", tmp_path / "out", "--hash_source", "false", preexec_fn=limit)
    assert f"the disk is full ({os.strerror(errno.EFBIG)}" in said
    assert not (tmp_path / "out").exists()
    subprocess.run(command(tmp_path / "hf", tmp_path / "out", "megatron"), check=True, capture_output=True)
    assert verify_record(tmp_path / "out").equal


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(argv, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_meanwhile(small_disk: Path, tmp_path: Path) -> None:
    random_model(tmp_path / "hf", **BIG)
    said = convert_in_words(tmp_path / "hf", small_disk / "out")
    assert "bytes are needed" in said
    assert not list(small_disk.iterdir())
    # Space that the check sees and that is gone when it is needed: a hidden reservation.
    code = "import shutil, sys; shutil.disk_usage = lambda p: type('U', (), {'free': 1 << 40})\n"
    code += "from mswift.cli.main import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, *command(tmp_path / "hf", small_disk / "out", "megatron")[3:]]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"the disk is full ({os.strerror(errno.ENOSPC)}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (small_disk / "out").exists()


def test_a_read_only_disk(small_disk: Path, tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in convert_in_words(tmp_path / "hf", small_disk / "out")


def test_a_source_of_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """600 shards and at most 400 descriptors: there, verified, and back."""
    random_model(tmp_path / "hf", num_hidden_layers=66, shards=590)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 500

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))

    there = command(tmp_path / "hf", tmp_path / "m", "megatron")
    back = command(tmp_path / "m", tmp_path / "back", "hf", "--max_shard_size", "1KB")
    same = [*there[: there.index("convert")], "verify", str(tmp_path / "hf"), str(tmp_path / "back")]
    for each in (there, back, same):
        done = subprocess.run(each, preexec_fn=few, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_transposed_experts_take_few_writes(tmp_path: Path) -> None:
    """gpt-oss stores [experts, in, out], Megatron [experts, out, in]: not a write for every few elements."""
    from tests.support.family_configs import family_config

    config = family_config("gpt_oss", hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    random_bits = np.random.default_rng(0)
    tensors = {n: random_bits.integers(0, 1 << 15, s, np.uint16) for n, s in table_for(config).hf.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_model(tmp_path / "hf", config, tensors, "BF16")
    for source, target, to in (("hf", "m", "megatron"), ("m", "back", "hf")):
        done = subprocess.run(
            [sys.executable, "-c", COUNTING, *command(tmp_path / source, tmp_path / target, to)[3:]],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        calls = int(done.stdout.rsplit("calls ", 1)[1])
        assert calls < 200 + 20 * size // (1 << 20), (calls, size)
    assert verify(tmp_path / "hf", tmp_path / "back").equal


COUNTING = """
import os, sys
calls = 0
def counted(function):
    def call(*args):
        global calls
        calls += 1
        return function(*args)
    return call
for name in ("pread", "preadv", "pwrite", "pwritev"):
    setattr(os, name, counted(getattr(os, name)))
from mswift.cli.main import main
status = main(sys.argv[1:])
print("calls", calls)
sys.exit(status)
"""
