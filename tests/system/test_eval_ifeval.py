"""IFEval by lm-eval's checks: what follows its instructions, nothing downloaded, the data that is missing named."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mswift.cli.main import main
from mswift.errors import ConfigError
from mswift.eval import documents, ifeval, results
from tests.support.shared import shared_file

NAMES = ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc")
needs_library = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("lm_eval", "langdetect", "immutabledict", "nltk")),
    reason="the checks of IFEval are not installed: pip install 'mswift[eval]'",
)


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without nltk_data, and where a download would be noticed."""
    nltk = pytest.importorskip("nltk", reason="NLTK is not installed: pip install 'mswift[eval]'")

    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", download)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    ifeval._library.cache_clear()


def doc(*instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    names, kwargs = zip(*instructions, strict=True)
    return {"key": 1, "prompt": "Write.", "instruction_id_list": list(names), "kwargs": list(kwargs)}


FORMS = doc(("punctuation:no_comma", {}), ("detectable_format:number_bullet_lists", {"num_bullets": 2}))


@needs_library
@pytest.mark.parametrize(
    ("answer", "strict", "loose"),
    [
        ("* one\n* two", 2, 2),
        ("* one, or two\n* three, four", 1, 1),  # commas
        ("one, two", 0, 0),
        ("Sure, here it is:\n* one\n* two", 1, 2),  # loosely the first line may be left out
        ("", 0, 0),
    ],
)
def test_instructions_are_followed_or_not(answer: str, strict: int, loose: int) -> None:
    expected = [strict == 2, [strict, 2], loose == 2, [loose, 2]]
    assert ifeval.values(FORMS, answer) == dict(zip(NAMES, expected, strict=True))


@needs_library
def test_the_data_of_two_instructions_is_named_and_the_other_rows_are_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shared_file("data/eval/ifeval.jsonl")
    with pytest.raises(ConfigError, match=r"64 of 541 rows \(number_sentences, .*\) need NLTK's punkt_tab.*NLTK_DATA"):
        ifeval.check(documents.ifeval(file))
    model = ("--model", str(shared_file("data/weights/stories260K-hd32-hf")), "--max_new_tokens", "24")
    assert main(["eval", *model, "--eval_dataset", f"ifeval={file}", "--eval_output_dir", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    free = [doc for doc in documents.ifeval(file) if not set(doc["instruction_id_list"]) & set(ifeval._NEED_DATA)]
    assert len(free) == 541 - 64
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(doc) + "\n" for doc in free[:6]))
    scores = []
    for backend in ("native", "lm_eval"):
        flags = ("--eval_backend", backend, "--eval_dataset", f"ifeval={rows}", "--num_fewshot", "0")
        assert main(["eval", *model, *flags, "--eval_output_dir", str(tmp_path / backend)]) == 0
        (result,) = results.read(tmp_path / backend)[1]
        scores.append([[sample["values"][name] for name in NAMES[:1]] for sample in result.samples])
    assert scores[0] == scores[1]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval", None)
    with pytest.raises(ConfigError, match=r"which need lm_eval.*: pip install 'mswift\[eval\]'"):
        ifeval.check([])
