"""Hostile pickles of a few bytes that ask for hours, gigabytes or a deep stack: refused at once."""

import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mswift.converters.io import safe_pickle
from mswift.converters.io.safe_pickle import brief, load_arguments, load_pickle, load_state_dict
from mswift.converters.io.torch_dist import ShardWriter, write_index
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region
from mswift.errors import CheckpointError
from tests.support.checkpoints import read_region

START = b"\x80\x02"
READERS = (load_pickle, load_state_dict, load_arguments)


def doubled(times: int, first: bytes = b"N") -> bytes:
    """Opcodes for t = (t, t), `times` over: 2**times leaves, five bytes for each doubling."""
    return first + b"q\x00" + b"h\x00\x86q\x00" * times


HOURS = doubled(60)
"""2**60 leaves: whatever walks them does not end."""

DEEP = b"N" + b"\x85" * 200_000


class Counted:
    hashes = 0

    def __hash__(self) -> int:
        Counted.hashes += 1
        return 1


def test_the_attack_works_on_a_careless_reader() -> None:
    counted = b"c" + __name__.encode() + b"\nCounted\n)R"
    Counted.hashes = 0
    pickle.loads(START + b"}" + doubled(10, counted) + b"Ns.")  # noqa: S301
    assert Counted.hashes == 2**10


KEYS = [b"}%sNs.", b"}(%sNu.", b"\x8f(%s\x90.", b"(%s\x91."]


@pytest.mark.parametrize("form", KEYS)
@pytest.mark.parametrize("key", [HOURS, DEEP, b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"G" + bytes(8)])
def test_keys_are_names_or_small_numbers(form: bytes, key: bytes) -> None:
    for read in READERS:
        with pytest.raises(pickle.UnpicklingError, match="a key or member is "):
            read(START + form % key)


def test_keys_of_real_checkpoints_are_read() -> None:
    value = {"a": {1: b"x", None: {True}}, -3: frozenset({"b", 2})}
    for protocol in (2, 4, 5):
        plain = value if protocol > 2 else {"a": {1: 2, None: 3}, -3: [4]}
        assert load_pickle(pickle.dumps(plain, protocol)) == plain


def test_many_numbers_of_one_hash_are_no_keys() -> None:
    """A dict of n of them takes n**2 comparisons."""
    value = {n * sys.hash_info.modulus: None for n in range(3)}
    with pytest.raises(pickle.UnpicklingError, match=r"is the number 2.31e\+18"):
        load_pickle(pickle.dumps(value, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"}2.", "opcode 0x32, which torch does not write"),
        (b"\x8b\x00\x00\x00\x10.", "opcode 0x8b"),
        (b"N" + b"r\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff.", "Memo value not found"),  # C would allocate 64 GiB
        (b"X\xff\xff\xff\xffabc", "it ends before its end"),
        (b"\x8d" + b"\xff" * 7 + b"\x7fabc", "it ends before its end"),
        (b"\x95" + b"\xff" * 7 + b"\x7fN", "it ends before its end"),
        (b"](NNu.", "it sets items of a list"),
        (b"](N\x90.", "it adds items to a list"),
        (b"ccollections\nOrderedDict\n]\x85R.", "TypeError: "),
        (b"ctorch\nSize\n](" + b"K\x01" * 65 + b"e\x85R.", "are not sizes"),
        (b"ctorch\nSize\n" + HOURS + b"\x85R.", "are not sizes"),
        (HOURS + b"Q.", "ValueError"),
        (b"(" + HOURS + b"NNNNtQ.", "it refers to "),
        (b"(X\x07\x00\x00\x00storage" + HOURS + b"NNNtQ.", "it refers to a storage without name"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(" + HOURS + b"K\x00))tR.", "a tensor without storage or offset"),
    ],
)
def test_other_ways_to_ask_for_much(content: bytes, message: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=message):
        load_pickle(START + content)


@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00xK\x01s", b"N}X\x0c\x00\x00\x00__defaults__)s\x86"])
def test_a_pickle_changes_none_of_our_functions(state: bytes) -> None:
    rebuild = safe_pickle._STATE_DICT["torch._utils", "_rebuild_tensor_v2"]
    before = dict(vars(rebuild)), rebuild.__defaults__
    with pytest.raises(pickle.UnpicklingError, match="it sets the state of a function"):
        load_state_dict(START + b"ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b.")
    assert (vars(rebuild), rebuild.__defaults__) == before


def test_stand_ins_are_few() -> None:
    names = [f"cmegatron\nc{number}\n".encode() for number in range(1001)]
    assert type(load_arguments(START + b"](" + b"".join(names[:1000] * 2) + b"e.")[0]).__name__ == "type"
    with pytest.raises(pickle.UnpicklingError, match="more than 1000 classes"):
        load_arguments(START + b"](" + b"".join(names) + b"e.")


def test_values_are_cut_short_in_messages() -> None:
    for content in (HOURS, DEEP, b"ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00a" + HOURS + b"u"):
        assert len(brief(load_state_dict(START + content + b"."))) <= 100


WALKS = """
import sys
from pathlib import Path
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.errors import CheckpointError
for path in map(Path, sys.argv[1:]):
    try:
        TorchDistSource(path)
    except CheckpointError as error:
        print("refused", len(str(error)))
"""


def with_strings_in_place(content: bytes) -> bytes:
    """The same pickle, with every string written where it is used instead of once."""
    ops = [(code.name, arg, place) for code, arg, place in pickletools.genops(content)]
    ends = [place for _, _, place in ops[1:]] + [len(content)]
    out, strings, last = bytearray(), dict[int, bytes](), ("", b"")
    for (name, arg, place), end in zip(ops, ends, strict=True):
        written = content[place:end]
        if name == "BINPUT" and last[0] == "BINUNICODE":
            strings[arg] = last[1]
        else:
            out += strings.get(arg, written) if name == "BINGET" else written
        last = (name, written)
    return bytes(out)


def test_a_metadata_file_of_nested_values_is_refused_in_seconds(tmp_path: Path) -> None:
    """Every value of a good file in turn: in a process of its own, which could be stopped."""
    good = tmp_path / "good"
    good.mkdir()
    writer = ShardWriter(good, "a.distcp")
    writer.add("x", "BF16", (4, 6), Region((0, 0), (4, 6)), np.zeros((4, 6), "<u2").data)
    write_index(good, [writer.close()])
    content = with_strings_in_place((good / ".metadata").read_bytes())
    places = {
        "dtype": b"ctorch\nbfloat16\n",
        "name": b"X\x03\x00\x00\x00fqnX\x01\x00\x00\x00x",
        "file": b"X\x08\x00\x00\x00a.distcp",
        "length": b"X\x06\x00\x00\x00length",
        "sizes": b"X\x05\x00\x00\x00sizes",
        "chunks": b"X\x06\x00\x00\x00chunks",
    }
    folders = []
    for name, found in places.items():
        assert content.count(found) == 1, name
        instead = HOURS.replace(b"q\x00", b"q\xff").replace(b"h\x00", b"h\xff")
        before, _, after = content.partition(found)
        kept = found if name in ("length", "sizes", "chunks") else found[:8] if name == "name" else b""
        rest = after if not kept or name == "name" else b"X\x01\x00\x00\x00y" + after
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / ".metadata").write_bytes(before + kept + instead + rest)
    done = subprocess.run(
        [sys.executable, "-c", WALKS, *map(str, folders)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("refused") == len(places), done.stdout + done.stderr


def test_a_chunk_that_is_repeated_is_refused(tmp_path: Path) -> None:
    """A list of one chunk many times, shared by many tensors, would take their product."""
    region = Region((0,), (2,))
    writer = ShardWriter(tmp_path, "a.distcp")
    writer.add("x", "BF16", (2,), region, memoryview(bytes(4)))
    write_index(tmp_path, [writer.close()])
    assert not read_region(TorchDistSource(tmp_path), "x", region, np.dtype("<u2")).any()
    content = with_strings_in_place((tmp_path / ".metadata").read_bytes())
    chunk = b"](" + content.split(b"X\x06\x00\x00\x00chunks](", 1)[1].split(b"bub", 1)[0]
    end = chunk.index(b"ub", chunk.index(b"sizes")) + 2
    twice = chunk[:2] + chunk[2:end] + b"q\xfeh\xfe"
    (tmp_path / ".metadata").write_bytes(content.replace(chunk[:end], twice, 1))
    with pytest.raises(CheckpointError, match="twice"):
        TorchDistSource(tmp_path)
