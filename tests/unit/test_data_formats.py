"""Files -> rows: every format, and messages for files and rows that cannot be read (the remedy is then run)."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mswift.data.formats import count_rows, required_row
from mswift.data.json_stream import json_values
from mswift.data.selection import Selection, selected_parts
from mswift.data.sources import parse_source
from mswift.errors import ConfigError, DataError

ROWS = [{"query": f"q{i}", "response": f"é,\n\"{i}"} for i in range(5)]  # fmt: skip
CSV = "query,response\r\n" + "".join(f'q{i},"é,\n""{i}"\r\n' for i in range(5))


TSV = CSV.replace(",", "\t").replace("é\t", "é,")


def records(spec):
    return [record for _, _, found in selected_parts(parse_source(str(spec)), 0, Selection()) for record in found]


def read(spec):
    return [required_row(record) for record in records(spec)]


def _write(path, text):
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(text.encode()))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("lines.json", "\n" + "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("array.jsonl", json.dumps(ROWS)),
        ("bom.jsonl", "\ufeff" + "\n".join(json.dumps(row) for row in ROWS)),
        ("a.csv", CSV),
        ("bom.csv", "\ufeff" + CSV),
        ("A.CSV", CSV),
        ("a.tsv", TSV),
        ("objects.json", "\n\n".join(json.dumps(row, indent=1) for row in ROWS)),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, text, suffix):
    path = _write(tmp_path / (name + suffix), text)
    assert read(path) == ROWS
    assert read(f"{path}#2") == ROWS[:2]
    assert read(f"{path}#99") == ROWS
    assert count_rows(path) == len(ROWS)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_arrow_formats_give_the_same_rows(tmp_path, name):
    nested = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]}]
    for number, rows in enumerate((ROWS, nested)):
        table, path = pa.Table.from_pylist(rows), tmp_path / f"{number}-{name}"
        if name.endswith("parquet"):
            pq.write_table(table, path, row_group_size=2)
        else:
            writer = pa.ipc.new_file if name == "a.arrow" else pa.ipc.new_stream
            with pa.OSFile(str(path), "wb") as sink, writer(sink, table.schema) as stream:
                stream.write_table(table, max_chunksize=2)
        assert read(path) == rows
        assert read(f"{path}#2") == rows[:2]
        assert count_rows(path) == len(rows)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_arrow_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such thing" * 99)
    with pytest.raises(DataError, match=rf"{name}: damaged \.{name[2:]} file"):
        read(tmp_path / name)


def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"a\.parquet needs pyarrow \(.*\): pip install 'mswift\[data\]'"):
        read(_write(tmp_path / "a.parquet", "x"))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(), _JSON, max_size=4), max_size=5),
    st.lists(st.integers(1, 40), min_size=1),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_a_streamed_array_is_what_json_reads(rows, sizes, indent, ascii_only):
    """The oracle is json.loads of the whole text, however the text is cut in pieces."""
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    pieces, at, turn = [], 0, 0
    while at < len(text):
        pieces.append(text[at : at + sizes[turn % len(sizes)]])
        at, turn = at + len(pieces[-1]), turn + 1
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert [v for v in json_values(iter(pieces), "f") if not isinstance(v, DataError)] == [
        row for row in json.loads(text) if _can_be_written(row)
    ]


def _can_be_written(row):
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@pytest.mark.parametrize(
    "text", ['[{"a": 1}', '[{"a": 1},\n{"b": 2}\n{}]', '[{"a": 1}]\n x', '[{"a": "x\ny"}]', '[{"a": "x', "[{}, {]"]
)
def test_bad_arrays_name_the_line_and_column_that_json_names(tmp_path, text):
    with pytest.raises(json.JSONDecodeError) as oracle:
        json.loads(text)
    with pytest.raises(DataError, match=f"line {oracle.value.lineno}, column {oracle.value.colno}: bad JSON"):
        read(_write(tmp_path / "a.json", text))


def test_a_bad_row_is_a_record_and_reading_goes_on(tmp_path):
    good = {"query": "q"}
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"query": "q"}\n{"query": }\n{"query": "caf\xe9"}\n7\n{"query": "\\ud800"}\n\n{"query": "q"}\n')
    found = records(path)
    assert [record.row for record in found] == [good, None, None, None, None, good]
    assert [record.number for record in found] == [1, 2, 3, 4, 5, 6]
    assert ["bad JSON" in str(found[1].error), "not UTF-8" in str(found[2].error)] == [True, True]
    assert "surrogates not allowed" in str(found[4].error)
    array = _write(tmp_path / "a.json", '[{"query": "q"}, 7, {"query": "\\ud800"}, {"query": "q"}]')
    assert [record.row for record in records(array)] == [good, None, None, good]
    table = _write(tmp_path / "a.csv", "query,response\nq,a\nq,a,b\nq,a\n")
    assert [record.row is None for record in records(table)] == [False, True, False]
    for bad in (path, array, table):
        assert count_rows(bad) == len(records(bad))


def test_a_text_file_is_one_document(tmp_path):
    text = "First line\n\nsecond, after an empty one\r\n"
    path = _write(tmp_path / "a.txt", text)
    assert read(path) == [{"text": text}]
    (record,) = records(path)
    assert "".join(record.row["text"].pieces()) == text


def test_an_empty_csv_cell_is_an_absent_field(tmp_path):
    path = _write(tmp_path / "a.csv", "system,query,response\n,q,r\n\n")
    assert read(path) == [{"query": "q", "response": "r"}]


def test_a_literal_path_wins(tmp_path):
    _write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    literal = _write(tmp_path / "a.jsonl#1.jsonl", json.dumps(ROWS[1]))
    assert read(literal) == [ROWS[1]]
    odd = tmp_path / "odd#3"
    odd.mkdir()
    assert read(_write(odd / "b.jsonl", json.dumps(ROWS[2]))) == [ROWS[2]]
    assert read(odd) == [ROWS[2]]
    colon = tmp_path / "data:train"
    (tmp_path / "data" / "train").mkdir(parents=True)
    _write(tmp_path / "data" / "train" / "a.jsonl", json.dumps(ROWS[3]))
    assert read(colon) == [ROWS[3]]
    colon.mkdir()
    _write(colon / "a.jsonl", json.dumps(ROWS[4]))
    assert read(colon) == read(f"{colon}#1") == [ROWS[4]]


def test_a_folder_is_all_its_files_and_a_subset_some(tmp_path):
    for name, row in zip(("b/train.jsonl", "a.json.gz", "train-00000-of-00001.csv", "test.tsv"), ROWS, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = json.dumps(row) if "json" in name else "query{0}response\n{query}{0}\"é,\n\"\"{n}\"\n".format(
            "\t" if name.endswith("tsv") else ",", query=row["query"], n=row["query"][1]
        )  # fmt: skip
        _write(tmp_path / name, text)
    (tmp_path / "README.md").write_text("read me")
    (tmp_path / ".cache").mkdir()
    _write(tmp_path / ".cache" / "c.jsonl", "{}")
    assert read(tmp_path) == [ROWS[1], ROWS[0], ROWS[3], ROWS[2]]
    assert read(f"{tmp_path}#3") == [ROWS[1], ROWS[0], ROWS[3]]
    assert read(f"{tmp_path}:train") == [ROWS[0], ROWS[2]]
    assert read(f"{tmp_path}:b") == [ROWS[0]]
    with pytest.raises(
        ConfigError, match=r"--dataset .*:valid: the folder holds no file that is read; accepted: \.jsonl"
    ):
        read(f"{tmp_path}:valid")
    with pytest.raises(ConfigError, match=r"a\.json\.gz:b: a file has no subsets; leave :b out"):
        read(f"{tmp_path}/a.json.gz:b")


def test_long_cells_are_read(tmp_path):
    path = _write(tmp_path / "a.csv", f"query,response\nq,{'x' * 200_000}\n")
    assert len(read(path)[0]["response"]) == 200_000


def test_a_missing_file_names_the_nearest(tmp_path):
    _write(tmp_path / "train.jsonl", json.dumps(ROWS[0]))
    with pytest.raises(ConfigError, match="--dataset .*trian.jsonl: there is no file.*did you mean (.*)\\?") as caught:
        read(tmp_path / "trian.jsonl")
    remedy = str(caught.value).partition("did you mean ")[2].rstrip("?")
    assert read(remedy) == ROWS[:1]


@pytest.mark.parametrize("count", ["0", "x", "-1", "1.5", ""])
def test_a_wrong_number_of_rows(tmp_path, count):
    path = _write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    with pytest.raises(ConfigError, match=r"must be a number of rows from 1: .*a\.jsonl#100"):
        read(f"{path}#{count}")
    assert read(f"{path}#100") == ROWS[:1]


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.parquet.gz"])
def test_an_unknown_suffix(tmp_path, name):
    with pytest.raises(
        ConfigError, match=r"--val_dataset .* is not read; accepted: \.jsonl, .*\.gz and \.zst; \.parquet"
    ):
        parse_source(str(_write(tmp_path / name, "")), "--val_dataset")


def test_bad_json_names_the_line(tmp_path):
    path = _write(tmp_path / "a.jsonl", '{"query": "q", "response": "r"}\n\n{"query": "q" "response": "r"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3, column 15: bad JSON .*one object per line, or one array"):
        read(path)
    array = _write(tmp_path / "a.json", '[{"query": "q"},\n {"query": }]')
    with pytest.raises(DataError, match=r"a\.json, line 2, column 12: bad JSON"):
        read(array)
    assert read(_write(array, '[{"query": "q"},\n {"query": "q"}]')) == [{"query": "q"}] * 2


def test_rows_that_are_no_objects(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: a row must be a JSON object, this is a int"):
        read(_write(tmp_path / "a.jsonl", "{}\n7\n"))
    with pytest.raises(DataError, match=r"a\.json, row 2: a row must be a JSON object, this is a str"):
        read(_write(tmp_path / "a.json", '[{}, "text"]'))


def test_csv_rows_of_another_width_name_row_line_and_remedy(tmp_path):
    path = _write(tmp_path / "a.csv", 'query,response\n"a\nb",r\nq,one, two\n')
    with pytest.raises(
        DataError, match=r"row 2 \(line 4\) has 3 cells, the header names 2: put cells .* double quotes"
    ):
        read(path)
    assert read(_write(path, 'query,response\nq,"one, two"\n')) == [{"query": "q", "response": "one, two"}]


def test_other_encodings_and_damaged_gzip(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"query": "q"}\n{"query": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not UTF-8 .*; save the file as UTF-8"):
        read(path)
    damaged = tmp_path / "a.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"query": "q"}\n' * 99)[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: damaged gzip file"):
        read(damaged)
    for cut in (zstandard.compress(b'{"query": "q"}\n' * 99)[:-9], b"no zstd"):
        damaged = tmp_path / "a.jsonl.zst"
        damaged.write_bytes(cut)
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: damaged zstd file"):
            read(damaged)
    frames = tmp_path / "frames.jsonl.zst"
    frames.write_bytes(b"".join(zstandard.compress(b'{"query": "%d"}\n' % i) for i in range(3)))
    assert read(frames) == [{"query": str(i)} for i in range(3)]
