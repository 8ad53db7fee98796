"""HF -> Megatron -> HF without torch: every bit, every file, and what happens when something is wrong."""

import errno
import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.config.convert import ConvertConfig, VerifyConfig
from mswift.converters import commands
from mswift.converters.engine import convert
from mswift.converters.io.torch_dist import ShardWriter, WrittenFile, write_index
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Piece, Region
from mswift.converters.reader import WeightReader
from mswift.converters.rule import Rule
from mswift.converters.verify import verify, verify_record
from mswift.errors import CheckpointError, ConfigError, MswiftError
from tests.support.checkpoints import (
    NUMPY,
    Array,
    at,
    megatron_tensors,
    random_model,
    random_tensors,
    read_model,
    read_region,
    same,
    tiny_config,
    write_model,
)
from tests.unit.test_families import VARIANTS

SIDE_FILES = ("config.json", "tokenizer.json", "generation_config.json")
QKV, FC1 = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here looks at durability."""
    for call in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, call, lambda fd: None)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_there_and_back(family: str, changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """Bits, names, side files; in between what megatron-core's layout says, by an oracle that shares no code."""
    hf, megatron, back = (tmp_path / n for n in ("hf", "megatron", "back"))
    tensors = random_model(hf, family, dtype, shards=3, **changes)
    there = convert(hf, megatron, "megatron", num_workers=2)
    expected = megatron_tensors(tiny_config(family, **changes), tensors)
    source, reader = TorchDistSource(megatron), WeightReader(hf)
    assert source.tensors.keys() == expected.keys()
    for key, array in expected.items():
        for each in (source, reader):
            assert (read_region(each, key, Region.full(array.shape), NUMPY[dtype]) == array).all()
    returned = convert(megatron, back, "hf")
    assert same(read_model(back), tensors)
    assert there.digest == returned.digest
    for name in SIDE_FILES:
        assert (back / name).read_bytes() == (hf / name).read_bytes() == (megatron / "hf" / name).read_bytes()
    for a, b in ((hf, megatron), (megatron, back), (hf, back)):
        assert verify(a, b).equal
    assert verify_record(megatron).equal
    assert verify_record(back).equal
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "megatron"]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_rank_reads_its_bytes_and_no_others(kind: str, tp: int, tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf", "qwen2")
    path = tmp_path / "hf"
    if kind == "megatron":
        path = tmp_path / "megatron"
        convert(tmp_path / "hf", path, "megatron")
    expected = megatron_tensors(tiny_config("qwen2"), tensors)
    for rank in range(tp):
        reader, held = WeightReader(path), 0
        for key, tensor in reader.table.megatron.items():
            for layer in range(3) if tensor.stacked else (None,):
                for region in reader.table.shard(key, rank, tp, layer):
                    got = read_region(reader, key, region, NUMPY["BF16"])
                    assert (got == at(expected[key], region)).all()
                    held += got.nbytes
        assert reader.bytes_read == held


def test_resharding_and_shard_sizes(tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf", "llama")
    for number, limit in enumerate((10**9, 6000, 1)):
        out = tmp_path / f"out{number}"
        convert(tmp_path / "hf", out, "hf", max_shard_bytes=limit)
        assert same(read_model(out), tensors)
        assert verify(out, tmp_path / "hf").equal
        for shard in out.glob("*.safetensors"):
            raw = shard.read_bytes()
            data = len(raw) - 8 - int.from_bytes(raw[:8], "little")
            assert data <= max(limit, max(t.nbytes for t in tensors.values()))
    assert len(list((tmp_path / "out2").glob("*.safetensors"))) == len(tensors)
    index = json.loads((tmp_path / "out2" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()


def test_an_equal_head_of_a_tied_model_is_recorded_and_comes_back(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_model(tmp_path / "hf", config, tensors)
    manifest = convert(tmp_path / "hf", tmp_path / "m", "megatron")
    assert "equal to model.embed_tokens.weight" in manifest.dropped["lm_head.weight"].reason
    assert "output_layer.weight" not in TorchDistSource(tmp_path / "m").tensors
    convert(tmp_path / "m", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), tensors)
    assert verify_record(tmp_path / "back").equal


def test_another_head_of_a_tied_model_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][-1, -1] ^= 1
    write_model(tmp_path / "hf", config, tensors)
    with pytest.raises(CheckpointError, match="lm_head.weight .*set tie_word_embeddings to false"):
        convert(tmp_path / "hf", tmp_path / "m", "megatron")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    convert(tmp_path / "hf", tmp_path / "m", "megatron")


def test_rotary_buffers_of_old_checkpoints_are_dropped_with_a_reason(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.zeros(4, "<u2") for n in range(3)}
    write_model(tmp_path / "hf", config, tensors | extra)
    manifest = convert(tmp_path / "hf", tmp_path / "m", "megatron")
    assert manifest.dropped.keys() == extra.keys()
    assert "dropped   3" in str(manifest)
    convert(tmp_path / "m", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), tensors)


def write_checkpoint(path: Path, config: dict[str, Any], tensors: dict[str, Array], dtype: str) -> None:
    """A training checkpoint of two ranks: weights cut by rows, optimizer state and generators beside them."""
    path.mkdir(parents=True)
    writers = [ShardWriter(path, f"__{rank}_0.distcp") for rank in range(2)]
    for key, array in megatron_tensors(config, tensors).items():
        half = array.shape[0] // 2
        for writer, first, size in zip(writers, (0, half), (half, array.shape[0] - half), strict=True):
            if size:
                region = Region((first, *(0 for _ in array.shape[1:])), (size, *array.shape[1:]))
                writer.add(key, dtype, array.shape, region, np.ascontiguousarray(at(array, region)).data)
                state = np.zeros(region.sizes, np.float32)
                writer.add(f"optimizer.exp_avg.{key}", "F32", array.shape, region, state.data)
    writers[0].add("rng.0", "U8", (16,), Region((0,), (16,)), memoryview(bytes(16)))
    write_index(path, [WrittenFile.from_dict(w.close().as_dict()) for w in writers])
    (path / "hf").mkdir()
    (path / "hf" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_training_checkpoint_is_a_source(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path / "checkpoint-3", config, tensors, "BF16")
    convert(tmp_path / "checkpoint-3", tmp_path / "hf", "hf")
    assert same(read_model(tmp_path / "hf"), tensors)
    convert(tmp_path / "checkpoint-3", tmp_path / "m", "megatron")
    assert verify(tmp_path / "checkpoint-3", tmp_path / "m").equal
    assert not any(n.startswith(("optimizer.", "rng.")) for n in TorchDistSource(tmp_path / "m").tensors)


def test_an_adapter_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-1"
    path.mkdir()
    writer = ShardWriter(path, "__0_0.distcp")
    name = "adapter.model.layers.0.self_attn.q_proj.lora_A.weight"
    writer.add(name, "F32", (2, 2), Region((0, 0), (2, 2)), memoryview(bytes(16)))
    write_index(path, [writer.close()])
    (path / "hf").mkdir()
    (path / "hf" / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(CheckpointError, match="holds a LoRA adapter and no model weights"):
        WeightReader(path)


# -- planted faults in the bytes: the table is right again when the proof is made


def planted(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    right = Rule.pieces

    def wrong(self: Rule, *args: Any) -> list[Piece]:
        return change(right(self, *args)) if self.kind in ("gate_up", "qkv") else right(self, *args)

    monkeypatch.setattr(Rule, "pieces", wrong)


def swapped_gate_and_up(pieces: list[Piece]) -> list[Piece]:
    if len(pieces) != 2:
        return pieces
    gate, up = pieces
    return [replace(gate, starts=(gate.starts[0], up.starts[1])), replace(up, starts=(up.starts[0], gate.starts[1]))]


def swapped_k_and_v(pieces: list[Piece]) -> list[Piece]:
    if len(pieces) != 3:
        return pieces
    q, k, v = pieces
    return [q, replace(k, starts=(k.starts[0], v.starts[1])), replace(v, starts=(v.starts[0], k.starts[1]))]


@pytest.mark.parametrize(("change", "names"), [(swapped_gate_and_up, "gate up"), (swapped_k_and_v, "k v")])
def test_a_swap_covers_everything_and_is_found_all_the_same(change: Any, names: str, tmp_path: Path) -> None:
    """Every element moves exactly once, so coverage cannot see it. The oracle's layout does, and so does any proof
    of the written bytes by a converter whose table is right."""
    tensors = random_model(tmp_path / "hf")
    with pytest.MonkeyPatch.context() as patch:
        planted(patch, change)
        convert(tmp_path / "hf", tmp_path / "m", "megatron")
        assert verify(tmp_path / "hf", tmp_path / "m").equal  # the faulty converter believes itself
    expected = megatron_tensors(tiny_config(), tensors)
    source = TorchDistSource(tmp_path / "m")
    wrong = {k for k, a in expected.items() if (read_region(source, k, Region.full(a.shape), a.dtype) != a).any()}
    assert wrong == {FC1 if "up" in names else QKV}
    for report in (verify_record(tmp_path / "m"), verify(tmp_path / "hf", tmp_path / "m")):
        assert len(report.differences) == 6  # two tensors in each of three layers
        assert all(f".{name}_proj.weight" in str(report) for name in names.split())
    with pytest.raises(CheckpointError, match="the files were damaged, or changed"):
        convert(tmp_path / "m", tmp_path / "back", "hf")
    assert not (tmp_path / "back").exists()


def spoil(path: Path, key: str, change: Any) -> None:
    """Rewrites the stored chunks of one Megatron tensor in place."""
    source = TorchDistSource(path)
    shape = source.tensors[key].shape
    array = change(read_region(source, key, Region.full(shape), NUMPY["BF16"]))
    for chunk, _ in source.chunks(key).overlapping(Region.full(shape)):
        file, offset = source.chunk_data(key, chunk)
        with open(file, "r+b") as opened:
            opened.seek(offset)
            opened.write(np.ascontiguousarray(at(array, chunk)).tobytes())


def doubled_group(array: Array) -> Array:
    array[1, 32:] = array[1, :32]  # 2 groups of (2 + 1 + 1) * 8 rows
    return array


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "off by one row": (FC1, lambda a: np.roll(a, 1, axis=1), "mlp.gate_proj.weight"),
    "gate and up swapped": (FC1, lambda a: np.roll(a, 20, axis=1), "mlp.up_proj.weight"),
    "a KV group doubled": (QKV, doubled_group, "layers.1.self_attn.k_proj.weight"),
    "one bit": ("decoder.final_layernorm.weight", lambda a: a ^ (np.arange(24) == 7), "model.norm.weight[7]"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_bytes_fail_the_manifest_and_the_comparison(case: str, tmp_path: Path) -> None:
    key, change, name = DAMAGE[case]
    random_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    spoil(tmp_path / "m", key, change)
    report = verify(tmp_path / "hf", tmp_path / "m")
    assert not report.equal
    assert name in str(report)
    assert name.partition("[")[0] in str(verify_record(tmp_path / "m"))
    with pytest.raises(CheckpointError, match="the files were damaged"):
        convert(tmp_path / "m", tmp_path / "back", "hf")


def test_a_difference_names_key_index_and_both_values(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4], tensors[name][5, 6] = 0x3F80, 0x4000
    write_model(tmp_path / "a", config, tensors)
    tensors[name][3, 4], tensors[name][5, 6] = 0x3F81, 0xC000
    write_model(tmp_path / "b", config, tensors)
    report = verify(tmp_path / "a", tmp_path / "b")
    assert report.differences == [f"{name}[3, 4]: 1 (0x3f80) and 1.0078125 (0x3f81); 2 of 480 elements differ"]


def test_equal_weights_of_another_function_differ(tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "a")
    write_model(tmp_path / "b", tiny_config(rope_theta=5e5), tensors)
    assert "config.json: rope is" in str(verify(tmp_path / "a", tmp_path / "b"))


@pytest.mark.parametrize(
    "file", ["__0_0.distcp", ".metadata", "common.pt", "hf/tokenizer.json", "mswift_manifest.json"]
)
def test_every_flipped_byte_is_found_by_file_or_tensor(file: str, tmp_path: Path) -> None:
    random_model(tmp_path / "hf", num_hidden_layers=1, vocab_size=11)
    convert(tmp_path / "hf", tmp_path / "m", "megatron", num_workers=1)
    path = tmp_path / "m" / file
    content = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(content), 40):
        spoiled = bytearray(content)
        spoiled[position] ^= 1 << (position % 8)
        path.write_bytes(spoiled)
        try:
            found = not verify_record(tmp_path / "m", num_workers=1).equal
        except MswiftError:
            found = True
        assert found, position
    path.write_bytes(content)
    assert verify_record(tmp_path / "m").equal


# -- destinations


def test_an_existing_destination_is_refused_and_another_one_works(tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(ConfigError, match="--output_dir .*out exists already"):
        convert(tmp_path / "hf", tmp_path / "out", "megatron")
    convert(tmp_path / "hf", tmp_path / "new" / "out", "megatron")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "hf", tmp_path / "empty", "megatron")


def test_a_destination_with_glob_characters(tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    (tmp_path / ".o1.mswift-partial").mkdir()
    convert(tmp_path / "hf", tmp_path / "o[1]*", "megatron")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".o1.mswift-partial", "hf", "o[1]*"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync", "fdatasync"])
def test_a_full_disk_publishes_nothing(call: str, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    right, calls = getattr(os, call), []

    def full(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > (2 if call in ("pwrite", "fsync") else 0):
            raise OSError(number, os.strerror(number))
        return right(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match="the disk is full .*nothing was published") as caught:
            convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert "--output_dir" in str(caught.value)
    kept = [".out.mswift-partial"] if call == "fsync" else []  # everything was copied then: a rerun has little to do
    assert ("the same command continues, with --restart it begins anew" in str(caught.value)) == bool(kept)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*kept, "hf"]
    convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_too_little_space_is_said_before_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = random_model(tmp_path / "hf")
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="[0-9,]+ bytes are needed, 100 are free") as caught:
        convert(tmp_path / "hf", tmp_path / "out", "megatron")
    needed = int(str(caught.value).split("full: ")[1].split()[0].replace(",", ""))
    assert needed > sum(t.nbytes for t in tensors.values())
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_conversion_under_way_is_not_disturbed(tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    running = tmp_path / ".out.mswift-partial"
    running.mkdir()
    for name in ("lock", "part-00001.lock"):
        with open(running / name, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for restart in (False, True):
                with pytest.raises(ConfigError, match="another process is writing it now"):
                    convert(tmp_path / "hf", tmp_path / "out", "megatron", restart=restart and name == "lock")
            assert running.exists()
    convert(tmp_path / "hf", tmp_path / "out", "megatron")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_a_half_written_directory_is_no_source(tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    (tmp_path / "m" / ".metadata").rename(tmp_path / "metadata")
    with pytest.raises(CheckpointError, match="not a torch_dist checkpoint, or it is incomplete"):
        convert(tmp_path / "m", tmp_path / "back", "hf")
    (tmp_path / "metadata").rename(tmp_path / "m" / ".metadata")
    (tmp_path / "m" / "hf" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no hf/config.json"):
        convert(tmp_path / "m", tmp_path / "back", "hf")


# -- commands


def test_commands_print_the_proof_and_return_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, out, bad = str(tmp_path / "hf"), str(tmp_path / "m"), str(tmp_path / "bad")
    random_model(tmp_path / "hf")
    assert commands.convert(ConvertConfig(model=hf, to="megatron", output_dir=out, dry_run=True)) == 0
    printed = capsys.readouterr().out
    assert "gate_up" in printed
    assert "30 tensors" in printed
    assert not Path(out).exists()
    assert commands.convert(ConvertConfig(model=hf, to="megatron", output_dir=out)) == 0
    printed = capsys.readouterr().out
    for word in ("tensors   30", "elements  ", "bytes     ", "blake3    ", "seconds   "):
        assert word in printed
    assert commands.verify(VerifyConfig(a=hf, b=out)) == 0
    assert commands.verify(VerifyConfig(a=out)) == 0
    write_model(tmp_path / "bad", tiny_config(), random_tensors(tiny_config(), seed=1))
    assert commands.verify(VerifyConfig(a=hf, b=bad)) == 1
    assert "model.embed_tokens.weight[0, 0]: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no record to compare with.*mswift verify A B"):
        commands.verify(VerifyConfig(a=bad))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere"}, "--model: /nowhere is not a directory"),
        ({"max_shard_size": "5 apples"}, "--max_shard_size '5 apples' is not a size; write 5GB"),
        ({"max_shard_size": "0"}, "--max_shard_size '0' is 0 bytes"),
        ({"num_workers": 0}, "--num_workers 0: at least 1"),
    ],
)
def test_wrong_flags(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    random_model(tmp_path / "hf")
    good = ConvertConfig(model=str(tmp_path / "hf"), to="megatron", output_dir=str(tmp_path / "m"))
    with pytest.raises(ConfigError) as caught:
        commands.convert(replace(good, **changes))
    assert message in str(caught.value)
    assert commands.convert(good) == 0


def test_sizes() -> None:
    assert [commands.parse_size(s) for s in ("5GB", "1.5 KiB", "7", "2mb")] == [5 * 10**9, 1536, 7, 2 * 10**6]
