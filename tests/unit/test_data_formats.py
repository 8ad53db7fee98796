"""Files -> rows: every format, `PATH#N`, and messages for files that cannot be read (the remedy is then run)."""

import gzip
import json

import pytest

from mswift.data.formats import parse_spec, read_rows
from mswift.errors import ConfigError, DataError

ROWS = [{"query": f"q{i}", "response": f"é,\n\"{i}"} for i in range(5)]  # fmt: skip
CSV = "query,response\r\n" + "".join(f'q{i},"é,\n""{i}"\r\n' for i in range(5))


def read(spec):
    return list(read_rows(parse_spec(str(spec))))


def _write(path, text):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as stream:
        stream.write(text)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
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
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, text, suffix):
    path = _write(tmp_path / (name + suffix), text)
    assert read(path) == ROWS
    assert read(f"{path}#2") == ROWS[:2]
    assert read(f"{path}#99") == ROWS


def test_a_text_file_is_one_document(tmp_path):
    text = "First line\n\nsecond, after an empty one\r\n"
    assert read(_write(tmp_path / "a.txt", text)) == [{"text": text}]


def test_an_empty_csv_cell_is_an_absent_field(tmp_path):
    path = _write(tmp_path / "a.csv", "system,query,response\n,q,r\n\n")
    assert read(path) == [{"query": "q", "response": "r"}]


def test_a_literal_path_wins_over_the_number_of_rows(tmp_path):
    _write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    literal = _write(tmp_path / "a.jsonl#1.jsonl", json.dumps(ROWS[1]))
    assert read(literal) == [ROWS[1]]
    odd = tmp_path / "odd#3"
    odd.mkdir()
    assert read(_write(odd / "b.jsonl", json.dumps(ROWS[2]))) == [ROWS[2]]


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


def test_a_folder_and_an_unknown_suffix(tmp_path):
    with pytest.raises(ConfigError, match="--val_dataset .* is a folder; name the files in it"):
        parse_spec(str(tmp_path), "--val_dataset")
    with pytest.raises(ConfigError, match=r"'\.xlsx' is not read; accepted: \.jsonl, \.json, \.csv, \.txt"):
        read(_write(tmp_path / "a.xlsx", ""))


def test_bad_json_names_the_line(tmp_path):
    path = _write(tmp_path / "a.jsonl", '{"query": "q", "response": "r"}\n\n{"query": "q" "response": "r"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3, column 15: bad JSON .*one object per line, or one array"):
        read(path)
    array = _write(tmp_path / "a.json", '[{"query": "q"},\n {"query": }]')
    with pytest.raises(DataError, match=r"a\.json, line 2, column 12: bad JSON"):
        read(array)
    assert read(_write(array, '[{"query": "q"},\n {"query": "q"}]')) == [{"query": "q"}] * 2


def test_rows_that_are_no_objects(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: a row must be a JSON object, this is a int"):
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
