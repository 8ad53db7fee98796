"""Files are streamed: the peak memory of reading one is far below its size; a reader that keeps the rows fails."""

import subprocess
import sys
from pathlib import Path

import pytest

# Writes a file of 16 MB of text row by row, then reads it; prints size and peak of what Python held, in bytes.
_PROGRAM = """
import gzip, json, sys, tracemalloc
import zstandard
from mswift.data.formats import count_rows, read_file
from pathlib import Path

name, keep = sys.argv[1], sys.argv[2] == "keep"
document = ".txt" in name
path = Path(name)
rows = [{"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "x" * 4000}]}
        for i in range(100)]
if path.suffix == ".parquet":
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist(rows * 40), path, use_dictionary=False, compression="none")
    pa.set_memory_pool(pa.system_memory_pool())  # counts from 0
else:
    opener = {".gz": lambda p: gzip.open(p, "wb", 1), ".zst": lambda p: zstandard.open(p, "wb")}.get(
        path.suffix, lambda p: open(p, "wb"))
    table = ".csv" in name
    with opener(path) as stream:
        stream.write(b"query,response\\n" if table else b"[" if ".json" in path.suffixes else b"")
        for i in range(40):
            for j, row in enumerate(rows):
                text = f'{i},{"x" * 4000}' if table else json.dumps(row)
                comma = "," if ".json" in path.suffixes and (i, j) != (39, 99) else ""
                text = f"{i} " + "x" * 4000 if document else text
                stream.write((text + comma + "\\n").encode())
        stream.write(b"]" if ".json" in path.suffixes else b"")
tracemalloc.start()
kept = []
number = characters = 0
for record in read_file(path):
    assert record.error is None, record.error
    number += 1
    characters += sum(map(len, record.row["text"].pieces())) if document else 0
    if keep:
        kept.append(record)
assert number == count_rows(path) == (1 if document else 4000), number
assert not document or characters > 16_000_000
arrow = sys.modules["pyarrow"].default_memory_pool().max_memory() if path.suffix == ".parquet" else 0
print(tracemalloc.get_traced_memory()[1] + arrow)
"""
_LIMIT_BYTES = 6 << 20


def _peak(path: Path, *, keep: bool = False) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(path), "keep" if keep else "stream"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    path.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.json.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.parquet"]
)
def test_the_peak_is_a_buffer(tmp_path: Path, name: str) -> None:
    assert _peak(tmp_path / name) < _LIMIT_BYTES


def test_partner_a_reader_that_keeps_the_rows_is_found(tmp_path: Path) -> None:
    assert _peak(tmp_path / "a.jsonl", keep=True) > 2 * _LIMIT_BYTES
