"""Imports of a start: the collector rests, a library can be hidden, and both are over afterwards."""

import gc
import importlib
import sys
from pathlib import Path

import pytest

from mswift.startup import importing


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`user_of_it` sees whether `helper_of_it` can be found, and whether the collector works."""
    (tmp_path / "helper_of_it.py").write_text("")
    (tmp_path / "user_of_it.py").write_text(
        "import gc, importlib.util\n"
        "found = importlib.util.find_spec('helper_of_it') is not None\n"
        "collects = gc.isenabled()\n"
        "class Cycle: pass\n"
        "cycle = Cycle()\n"
        "cycle.own = cycle\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("user_of_it", "helper_of_it"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("modules")
def test_the_collector_rests_while_a_module_is_imported_and_never_looks_at_it_again() -> None:
    with importing("user_of_it"):
        module = importlib.import_module("user_of_it")
    assert (module.collects, module.found, gc.isenabled()) == (False, True, True)
    try:
        assert not any(thing is module.cycle for thing in gc.get_objects())  # get_objects leaves out what is frozen
    finally:
        gc.unfreeze()
    assert any(thing is module.cycle for thing in gc.get_objects())


@pytest.mark.usefixtures("modules")
def test_a_hidden_library_is_found_again_afterwards() -> None:
    with importing("user_of_it", without="helper_of_it"):
        module = importlib.import_module("user_of_it")
    gc.unfreeze()
    assert not module.found
    assert importlib.import_module("helper_of_it").__name__ == "helper_of_it"


@pytest.mark.usefixtures("modules")
def test_a_library_that_is_loaded_is_not_hidden() -> None:
    importlib.import_module("helper_of_it")
    with importing("user_of_it", without="helper_of_it"):
        module = importlib.import_module("user_of_it")
    gc.unfreeze()
    assert module.found


@pytest.mark.usefixtures("modules")
def test_nothing_is_special_where_the_module_is_loaded() -> None:
    importlib.import_module("user_of_it")
    with importing("user_of_it", without="helper_of_it"):
        assert gc.isenabled()
        assert importlib.import_module("helper_of_it")


@pytest.mark.usefixtures("modules")
def test_an_import_that_fails_leaves_everything_as_it_was() -> None:
    with pytest.raises(ModuleNotFoundError), importing("not_there_at_all", without="helper_of_it"):
        importlib.import_module("not_there_at_all")
    gc.unfreeze()
    assert gc.isenabled()
    assert importlib.import_module("helper_of_it")
