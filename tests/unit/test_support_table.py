"""docs/families.md against the catalog: one row a family, its architecture, and proofs that name it."""

import re
from pathlib import Path

import pytest

from mswift.converters.catalog import family_for, family_names
from tests.support.family_configs import REMOTE_CODE

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/families.md").read_text("utf-8").splitlines()
    if line.startswith("| `")
]
OVER_ALL = ("tests/unit/test_every_family.py", "tests/cpu/test_families_transformers.py")
"""Tests over the whole registry, which need not name a family."""


def test_one_row_for_each_family_in_order() -> None:
    assert [row[0].strip("`") for row in ROWS] == family_names()
    assert {len(row) for row in ROWS} == {6}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_row_tells_the_truth(row: list[str]) -> None:
    family = row[0].strip("`")
    assert row[1] == family_for({"model_type": family}).architecture
    conversion, training = (re.findall(r"`(tests/[\w./]+)`", cell) for cell in row[3:5])
    assert conversion == [OVER_ALL[family not in REMOTE_CODE]]
    assert training or row[4].startswith("no: "), "training is proved by a file, or the row says `no: ` and why not"
    for file in training:
        assert f'"{family}"' in (ROOT / file).read_text("utf-8")
