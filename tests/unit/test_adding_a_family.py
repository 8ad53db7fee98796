"""The worked example of docs/adding-a-family.md is a family: one file, found by its name."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mswift.converters import families
from mswift.converters.catalog import family_names
from mswift.converters.plan import table_for
from tests.support import family_configs

PAGE = Path(__file__).resolve().parents[2] / "docs/adding-a-family.md"
FILE, ENTRY = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module of the package of families; forgotten afterwards."""
    (tmp_path / "seed_oss.py").write_text(FILE)
    paths = [*families.__path__, str(tmp_path)]
    package: ModuleType = families
    monkeypatch.setattr(package, "__path__", paths)
    yield
    sys.modules.pop(f"{families.__name__}.seed_oss", None)


def entry() -> dict[str, Any]:
    """The registry's entry, evaluated as it would be in its file."""
    source = "{" + ENTRY + "}"
    found: dict[str, dict[str, Any]] = eval(source, dict(vars(family_configs)))
    return found["seed_oss"]


def test_the_example_is_found_and_moves_every_element(example: None) -> None:
    assert "seed_oss" in family_names()
    assert len(FILE.splitlines()) <= 60
    table = table_for({"model_type": "seed_oss"} | entry())
    assert table.hf["model.layers.2.self_attn.o_proj.bias"] == (32,)
    assert table.hf["model.layers.2.self_attn.q_proj.bias"] == (96,)
    assert "model.layers.2.mlp.up_proj.bias" not in table.hf
    assert table.spec.dropout == 0
