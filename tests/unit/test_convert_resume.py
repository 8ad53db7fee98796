"""A conversion that stopped continues; parts add up to the whole; what does not fit is refused. In this process."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.config.convert import ConvertConfig
from mswift.converters import commands, journal, work
from mswift.converters.engine import convert, convert_part, finish_parts
from mswift.converters.io.partial import Partial
from mswift.converters.io.side_files import MANIFEST
from mswift.converters.journal import Done, Record, Recorder, read_journal
from mswift.converters.verify import verify, verify_record
from mswift.errors import CheckpointError, ConfigError
from tests.support.checkpoints import random_model

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1003}
Call = Any


@pytest.fixture(autouse=True)
def fine_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans, batches and files small enough for a model of 5 MB."""
    for call in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, call, lambda fd: None)
    monkeypatch.setattr(work, "SMALLEST_SPAN_BYTES", 1 << 15)
    monkeypatch.setattr(journal, "_LEAST_UNRECORDED_BYTES", 1 << 16)
    monkeypatch.setattr("mswift.converters.destinations._SMALL_FILE_BYTES", 1 << 19)


def contents(path: Path) -> dict[str, Any]:
    """Every file of a directory; of the manifest, what does not depend on the clock."""
    found: dict[str, Any] = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        found[file.relative_to(path).as_posix()] = file.read_bytes()
    manifest = json.loads(found[MANIFEST])
    found[MANIFEST] = {n: v for n, v in manifest.items() if n not in ("seconds", "manifest_blake3")}
    return found


class Disk:
    """Counts bytes that reach files, and fails with `error` once `limit` of them have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int, error: BaseException) -> None:
        self.written, self.limit, self.error = 0, limit, error
        for name in ("pwrite", "pwritev", "copy_file_range"):
            monkeypatch.setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, right: Call) -> Call:
        def call(*args: Any) -> int:
            if self.written >= self.limit:
                raise self.error
            count: int = right(*args)
            self.written += count
            return count

        return call


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("hash_source", [True, False])
@pytest.mark.parametrize("to", ["megatron", "hf"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_rerun_copies_the_rest_and_the_bytes_are_the_same(
    to: Any, hash_source: bool, share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = sum(t.nbytes for t in random_model(tmp_path / "hf", shards=2, **WIDE).values())
    flags: dict[str, Any] = {"max_shard_bytes": 1_500_000, "hash_source": hash_source}
    source = tmp_path / "hf"
    if to == "hf":
        convert(source, tmp_path / "m", "megatron")
        source = tmp_path / "m"
    convert(source, tmp_path / "whole", to, num_workers=3, **flags)
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, int(share * total), FULL)
        with pytest.raises(CheckpointError, match="the disk is full .*the same command continues, with --restart"):
            convert(source, tmp_path / "out", to, num_workers=2, **flags)
    kept = Partial(tmp_path / "out")
    recorded = read_journal(kept.journal(1, 1)).num_bytes
    assert 0 < recorded <= share * total + 3 * (1 << 20)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, 1 << 40, FULL)
        convert(source, tmp_path / "out", to, num_workers=1, **flags)
    assert total - recorded <= disk.written < total - recorded + 200_000  # and what lies between tensors
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not kept.path.exists()
    assert verify(tmp_path / "hf", tmp_path / "out").equal


def test_ctrl_c_keeps_what_was_done_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_model(tmp_path / "hf", **WIDE)
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, 3_000_000, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert "out: stopped; nothing was published" in (said := capsys.readouterr().err)
    assert "the same command continues, with --restart it begins anew" in said
    convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert verify_record(tmp_path / "out").equal


def interrupted(tmp_path: Path, limit: int = 3_000_000) -> Partial:
    """A model and a conversion of it to `out` that stopped."""
    random_model(tmp_path / "hf", **WIDE)
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, limit, FULL)
        with pytest.raises(CheckpointError):
            convert(tmp_path / "hf", tmp_path / "out", "megatron")
    return Partial(tmp_path / "out")


@pytest.mark.parametrize("change", ["source", "config", "flag"])
def test_another_source_or_flag_begins_anew(change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(tmp_path)
    if change == "source":
        os.utime(tmp_path / "hf" / "model.safetensors", ns=(1, 1))
    if change == "config":
        (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "hf", tmp_path / "out", "megatron", hash_source=change != "flag")
    assert "was left by a conversion of another source or with other flags; it begins anew" in capsys.readouterr().err
    convert(tmp_path / "hf", tmp_path / "again", "megatron", hash_source=change != "flag")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_line_that_a_crash_cut_off_does_not_count(tmp_path: Path) -> None:
    left = interrupted(tmp_path).journal(1, 1)
    with open(left, "a") as file:
        file.write('["model.norm.weight", 0, 5')
    convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert verify_record(tmp_path / "out").equal


def test_a_damaged_partial_directory_is_named_and_can_be_cleared(tmp_path: Path) -> None:
    left = interrupted(tmp_path)
    lines = left.journal(1, 1).read_text()
    for damage, message in (
        (lambda: left.journal(1, 1).write_text("?\n" + lines), "line 1 is damaged"),
        (lambda: (left.data / "__0_0.distcp").unlink(), "is not what .*journal says was written"),
        (lambda: (left.path / "plan.json").write_text("{}"), "plan.json: is damaged"),
    ):
        interrupted_again = interrupted_copy(tmp_path, left)
        damage()
        with pytest.raises(CheckpointError, match=f"{message}.*--restart"):
            convert(tmp_path / "hf", tmp_path / "out", "megatron")
        interrupted_again()
    convert(tmp_path / "hf", tmp_path / "out", "megatron", restart=True)
    assert verify_record(tmp_path / "out").equal


def interrupted_copy(tmp_path: Path, left: Partial) -> Call:
    """Remembers a partial directory; what it returns puts it back."""
    import shutil

    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(left.path, copy)

    def restore() -> None:
        shutil.rmtree(left.path, ignore_errors=True)
        shutil.copytree(copy, left.path)

    return restore


def test_a_damaged_source_leaves_nothing(tmp_path: Path) -> None:
    random_model(tmp_path / "hf", **WIDE)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    with open(tmp_path / "m" / "__1_0.distcp", "r+b") as file:
        file.seek(300_000)
        byte = file.read(1)
        file.seek(300_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match="the files were damaged, or changed"):
        convert(tmp_path / "m", tmp_path / "back", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m"]


# -- parts


@pytest.mark.parametrize("to", ["megatron", "hf"])
@pytest.mark.parametrize("parts", [1, 2, 3, 20])
def test_parts_make_the_same_directory(to: Any, parts: int, tmp_path: Path) -> None:
    total = sum(t.nbytes for t in random_model(tmp_path / "hf", **WIDE).values())
    convert(tmp_path / "hf", tmp_path / "whole", to, max_shard_bytes=1_500_000)
    copied = 0
    for part in reversed(range(1, parts + 1)):
        copied += convert_part(tmp_path / "hf", tmp_path / "out", to, part, parts, max_shard_bytes=1_500_000)
        assert not (tmp_path / "out").exists()
    assert copied == total
    convert_part(tmp_path / "hf", tmp_path / "out", to, 1, parts, max_shard_bytes=1_500_000)  # nothing is left to do
    finish_parts(tmp_path / "hf", tmp_path / "out", to, max_shard_bytes=1_500_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out", "whole"]


def test_finish_names_the_parts_that_are_missing_or_incomplete(tmp_path: Path) -> None:
    source, out = tmp_path / "hf", tmp_path / "out"
    random_model(source, **WIDE)
    with pytest.raises(ConfigError, match="there is nothing to finish"):
        finish_parts(source, out, "megatron")
    convert_part(source, out, "megatron", 2, 4)
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, 200_000, FULL)
        with pytest.raises(CheckpointError, match="the disk is full"):
            convert_part(source, out, "megatron", 3, 4)
    with pytest.raises(CheckpointError, match="3 of 4 parts .* --part 1/4 --part 3/4 --part 4/4, then --finish again"):
        finish_parts(source, out, "megatron")
    for part in (1, 3, 4):
        convert_part(source, out, "megatron", part, 4)
    assert verify(out.with_name("hf"), source).equal
    finish_parts(source, out, "megatron", hash_output=True)
    assert verify(out, source).equal


def test_parts_of_another_conversion_are_not_mixed(tmp_path: Path) -> None:
    source, out = tmp_path / "hf", tmp_path / "out"
    random_model(source, **WIDE)
    convert_part(source, out, "megatron", 1, 2)
    with pytest.raises(ConfigError, match="holds a conversion of .*hf to megatron in 2 parts; go on with the flags"):
        convert(source, out, "megatron")
    with pytest.raises(ConfigError, match="in 2 parts; go on .*--restart"):
        convert_part(source, out, "megatron", 1, 3)
    with pytest.raises(ConfigError, match="in 2 parts, of another source or with other flags"):
        convert_part(source, out, "megatron", 2, 2, hash_source=False)
    with pytest.raises(ConfigError, match="of another source or with other flags"):
        finish_parts(source, out, "hf")
    convert_part(source, out, "megatron", 1, 3, restart=True)
    for part in (2, 3):
        convert_part(source, out, "megatron", part, 3)
    finish_parts(source, out, "megatron")
    assert verify(out, source).equal


def test_a_span_recorded_twice_or_by_a_stranger_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "hf", tmp_path / "out"
    random_model(source, **WIDE)
    for part in (1, 2):
        convert_part(source, out, "megatron", part, 2)
    first, second = (Partial(out).journal(part, 2) for part in (1, 2))
    right = first.read_text()
    first.write_text(right + right.splitlines(keepends=True)[-1])
    with pytest.raises(CheckpointError, match="1 of 2 parts .*is recorded twice"):
        finish_parts(source, out, "megatron")
    first.write_text(right + second.read_text().splitlines(keepends=True)[-1])
    with pytest.raises(CheckpointError, match="which is another part's"):
        finish_parts(source, out, "megatron")
    first.write_text(right)
    finish_parts(source, out, "megatron")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": "0/2"}, "--part '0/2' is not I/N"),
        ({"part": "3/2"}, "--part '3/2' is not I/N"),
        ({"part": "two"}, "--part 'two' is not I/N"),
        ({"part": "1/2", "finish": True}, "--part and --finish are two commands"),
        ({"part": "1/2", "hash_output": True}, "give it to --finish"),
        ({"restart": True, "finish": True}, "--restart removes it"),
    ],
)
def test_wrong_flags_of_parts(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    good = ConvertConfig(model=str(tmp_path / "hf"), to="megatron", output_dir=str(tmp_path / "out"))
    with pytest.raises(ConfigError) as caught:
        commands.convert(replace(good, **changes))
    assert message in str(caught.value)
    for part in ("1/2", "2/2"):
        assert commands.convert(replace(good, part=part)) == 0
    assert commands.convert(replace(good, finish=True)) == 0
    assert verify_record(tmp_path / "out").equal


# -- hashes


def test_without_hashes_only_two_checkpoints_can_be_compared(tmp_path: Path) -> None:
    random_model(tmp_path / "hf", **WIDE)
    manifest = convert(tmp_path / "hf", tmp_path / "m", "megatron", hash_source=False)
    assert manifest.digest is None
    assert "not taken (--hash_source false)" in str(manifest)
    assert verify(tmp_path / "hf", tmp_path / "m").equal
    with pytest.raises(ConfigError, match="has no hash of 30 of 30 tensors .*mswift verify A B"):
        verify_record(tmp_path / "m")
    hashed = convert(tmp_path / "hf", tmp_path / "m2", "megatron", hash_source=False, hash_output=True)
    assert hashed.digest == convert(tmp_path / "m2", tmp_path / "back", "hf", hash_source=False).digest
    assert verify_record(tmp_path / "back").equal  # the hashes of m2, carried over, are those of the bytes


def test_values_that_are_not_finite_are_carried_and_counted(tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf", **WIDE)
    expected = {n: int(np.count_nonzero((t & 0x7F80) == 0x7F80)) for n, t in tensors.items()}
    for flags in ({}, {"hash_output": True}, {"hash_source": False, "hash_output": True}):
        manifest = convert(tmp_path / "hf", tmp_path / f"m{len(flags)}", "megatron", **flags)
        assert manifest.non_finite == {n: c for n, c in expected.items() if c}
    assert convert(tmp_path / "m0", tmp_path / "back", "hf", hash_source=False).non_finite == manifest.non_finite
    assert f"not finite {sum(expected.values()):,} (in " in str(manifest)
    assert f"{sum(expected.values()):,} elements of" in str(verify_record(tmp_path / "m0"))
    assert convert(tmp_path / "hf", tmp_path / "m", "megatron", hash_source=False).non_finite is None


def test_hash_output_finds_what_the_disk_changed(tmp_path: Path) -> None:
    random_model(tmp_path / "hf", **WIDE)
    right = os.pwrite

    def faulty(fd: int, data: Any, offset: int) -> int:
        return right(fd, bytes(len(data)) if offset > 400_000 else data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", faulty)
        with pytest.raises(CheckpointError, match="tensors on the disk are not what was read"):
            convert(tmp_path / "hf", tmp_path / "back", "hf", hash_output=True)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


# -- the journal


def test_the_recorder_waits_for_the_disk_and_tells_its_errors(tmp_path: Path) -> None:
    order: list[str] = []
    recorder = Recorder(tmp_path / "j", 1 << 30, lambda files: order.extend(files))
    for n in range(200):
        recorder.done(Record("t", n << 20, (n + 1) << 20), [f"file{n}"])
        assert n + 1 - len(read_journal(tmp_path / "j").spans.get("t", ())) <= 26  # a fortieth of 1 GiB, and one
    recorder.close()
    assert sorted(order) == sorted(f"file{n}" for n in range(200))
    assert read_journal(tmp_path / "j").fault("t", 200 << 20) is None

    def broken(files: Any) -> None:
        raise OSError(errno.EIO, "broken")

    recorder = Recorder(tmp_path / "j", 1 << 30, broken)
    with pytest.raises(OSError, match="broken"):  # noqa: PT012  (one of the calls after the failure)
        for n in range(200):
            recorder.done(Record("u", n << 20, (n + 1) << 20), ["f"])
    recorder.close(failed=True)
    assert "u" not in read_journal(tmp_path / "j").spans


@pytest.mark.parametrize(
    ("spans", "fault"),
    [
        ([], "is not recorded"),
        ([(0, 4)], "bytes 4:10 are missing"),
        ([(0, 4), (6, 10)], "bytes 4:6 are missing"),
        ([(0, 6), (4, 10)], "byte 4 is recorded twice"),
        ([(0, 4), (4, 12)], "bytes 10:12 are too many"),
        ([(4, 10), (0, 4)], None),
    ],
)
def test_exactly_once(spans: list[tuple[int, int]], fault: str | None) -> None:
    done = Done()
    for low, high in spans:
        done.add(Record("t", low, high))
    assert done.fault("t", 10) == fault
