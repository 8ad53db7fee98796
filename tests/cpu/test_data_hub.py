"""Data sets that `datasets` wrote, and hub names without a network; the oracle is `datasets` itself."""

import shutil

import pytest

from mswift.data.formats import required_row
from mswift.data.selection import Selection, selected_parts
from mswift.data.sources import parse_source
from mswift.errors import ConfigError

datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")

ROWS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "é"}], "label": i % 2 == 0}
    for i in range(7)
]


def read(spec):
    found = selected_parts(parse_source(str(spec)), 0, Selection("without_replacement", 5))
    return [required_row(record) for _, _, records in found for record in records]


def test_what_datasets_wrote_is_read_as_datasets_reads_it(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    data.to_parquet(tmp_path / "a.parquet")
    data.to_json(tmp_path / "a.jsonl")
    for name in ("saved", "a.parquet", "a.jsonl"):
        assert read(tmp_path / name) == ROWS == list(data)
    assert len(read(f"{tmp_path}/saved#5")) == 5
    chosen = data.select([4, 2])
    chosen.save_to_disk(tmp_path / "chosen")
    assert read(tmp_path / "chosen") == [ROWS[4], ROWS[2]]
    with pytest.raises(ConfigError, match=r"saved:train: the saved data set has no splits; leave :train out"):
        read(f"{tmp_path}/saved:train")


def test_splits_of_a_saved_dict(tmp_path):
    whole = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    )
    whole.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == read(f"{tmp_path}/saved:train") == ROWS
    assert read(f"{tmp_path}/saved:test") == ROWS[:2]
    with pytest.raises(ConfigError, match="has the splits train, test; name one: --dataset .*saved:train"):
        read(f"{tmp_path}/saved:valid")
    shutil.rmtree(tmp_path / "saved" / "train")
    (tmp_path / "saved" / "dataset_dict.json").write_text("{")
    with pytest.raises(ConfigError, match=r"dataset_dict\.json cannot be read .*; save the data set again"):
        read(tmp_path / "saved")


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = parse_source("nobody/nothing:en#3")
    assert (str(source.parts[0]), source.count) == ("nobody/nothing:en", 3)
    with pytest.raises(ConfigError, match=r"nobody/nothing:en: there is no such file, .*HF_HUB_OFFLINE is set: fetch"):
        read("nobody/nothing:en#3")


def test_a_hub_data_set_in_the_cache_is_read_without_a_network(tmp_path, monkeypatch):
    """The cache is written by `datasets` itself, from a local file, and lies where it keeps those of the hub."""
    cache = tmp_path / "cache"
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=str(cache))
    (made,) = (cache / "parquet").glob("default-*/0.0.0/*/parquet-train.arrow")
    target = cache / "nobody___some" / "default" / "0.0.0" / ("0" * 40)
    shutil.copytree(made.parent, target)
    (target / made.name).rename(target / "some-train.arrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    assert read("nobody/some") == read("nobody/some:default/train") == ROWS
    assert len(read("nobody/some#3")) == 3
