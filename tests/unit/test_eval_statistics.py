"""Intervals and tests of scores against published numbers and against counting; comparisons refuse other questions."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mswift.errors import ConfigError
from mswift.eval import results
from mswift.eval.compare import compare
from mswift.eval.results import TaskResult, checkpoint_hash
from mswift.eval.statistics import Metric, Value, difference, estimate, mcnemar, wilson

ACC = Metric("acc", binary=True)
F1 = Metric("f1")


def test_wilson_is_the_published_interval() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for hits, tries, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(hits / tries, tries) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_mcnemar_is_the_binomial_test() -> None:
    def p(only_first: int, only_second: int) -> float:
        return mcnemar([1] * only_first + [0] * only_second + [1, 0], [0] * only_first + [1] * only_second + [1, 0])

    assert p(0, 0) == 1
    assert p(5, 5) == 1
    assert p(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert p(9, 1) == p(1, 9)
    assert p(0, 6) == pytest.approx(2 / 64)


def test_a_score_and_its_interval() -> None:
    found = estimate(ACC, [1.0, 0.0, 1.0, 1.0], 0)
    assert found is not None
    assert (found.value, found.num_samples, found.method) == (0.75, 4, "Wilson")
    assert estimate(ACC, [None, None], 0) is None
    part = estimate(F1, [0.5, None, 1.0], 0)
    assert part is not None
    assert (part.value, part.num_samples) == (0.75, 2)  # where it does not apply it does not count
    assert 0.5 <= part.low <= 0.75 <= part.high <= 1
    tries = estimate(Metric("inst"), [[1.0, 1.0], [0.0, 3.0]], 0)
    assert tries is not None
    assert tries.value == 0.25  # hits of all tries, not the mean of means


def test_the_bootstrap_covers_as_it_says() -> None:
    import numpy as np

    generator, hits = np.random.default_rng(0), 0
    for _ in range(60):
        found = estimate(F1, generator.beta(2, 3, 80).tolist(), 1)
        assert found is not None
        hits += found.low <= 0.4 <= found.high
    assert 51 <= hits <= 60  # 95 % of 60 is 57


def test_a_difference_is_of_the_same_rows() -> None:
    first: list[Value] = [float(n % 3 == 0) for n in range(90)]
    better: list[Value] = [float(n % 3 != 1) for n in range(90)]  # 30 more right, none lost
    found = difference(ACC, first, better, 0)
    assert found is not None
    assert (found.first, found.second) == pytest.approx((1 / 3, 2 / 3))
    assert 0 < found.low < 1 / 3 < found.high
    assert found.p_value == pytest.approx(2 / 2**30)
    same = difference(ACC, first, first, 0)
    assert same is not None
    assert (same.low, same.high, same.p_value) == (0, 0, 1)  # paired: no noise of two draws
    assert difference(F1, [None, 1.0], [1.0, None], 0) is None


def _result(values: Sequence[Value], **changes: Any) -> TaskResult:
    samples = [{"id": str(n), "prompt_sha256": f"p{n}", "values": {"acc": v}} for n, v in enumerate(values)]
    fields = {"name": "arc", "file": "f", "file_sha256": "0", "num_fewshot": 0, "prompts_sha256": "1", "num_cut": 2}
    return TaskResult(**{**fields, "metrics": (ACC, F1), "samples": samples, **changes})


def _write(path: Path, *found: TaskResult) -> Path:
    results.write(path, found, {"model": path.name, "backend": "native"}, 0)
    return path


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = _write(tmp_path / "one", _result([1.0, 0.0, 1.0]))
    about, (found,) = results.read(path)
    assert found == _result([1.0, 0.0, 1.0])
    assert about["tasks"]["arc"]["metrics"]["acc"]["value"] == pytest.approx(2 / 3)
    assert "value" not in about["tasks"]["arc"]["metrics"]["f1"]  # it applied to nothing
    assert {"python", "mswift", "numpy"} <= about["versions"].keys()
    table = (path / "report.md").read_text()
    assert "| arc | 0 | acc | 0.6667 | " in table
    assert "arc: 2 prompts" in table
    assert (path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_answers_with_line_breaks_of_unicode_are_read_again(tmp_path: Path) -> None:
    """U+2028, U+2029 and U+0085 end lines of text, and JSON holds them as they are."""
    told = {"id": "0", "prompt_sha256": "p0", "answers": ["a\u2028b\u2029c\x85d\re"], "values": {"acc": 1.0}}
    result = _result([], samples=[told])
    assert results.read(_write(tmp_path / "one", result))[1] == [result]


def test_two_models_side_by_side(tmp_path: Path) -> None:
    one = _write(tmp_path / "one", _result([0.0] * 30))
    two = _write(tmp_path / "two", _result([1.0] * 12 + [0.0] * 18))
    table = compare(one, two, tmp_path / "both", 0)
    assert "| arc | acc | 0.0000 | 0.4000 | +0.4000 | " in table
    assert " | 0.000488 | better | 30 |" in table  # 2 / 2 ** 12
    assert "| arc | f1 | - |" in table
    (row, _) = json.loads((tmp_path / "both" / "comparison.json").read_text())["rows"]
    assert math.isclose(row["p_value"], 2 / 2**12)
    assert (tmp_path / "both" / "comparison.png").exists()
    assert " | worse | " in compare(two, one, tmp_path / "back", 0)
    assert " | no | " in compare(one, one, tmp_path / "same", 0)


def test_other_questions_are_not_compared(tmp_path: Path) -> None:
    one = _write(tmp_path / "one", _result([1.0, 0.0]))
    samples = [{**sample, "prompt_sha256": "x"} for sample in _result([1.0, 0.0]).samples]
    other = _write(tmp_path / "other", _result([], samples=samples))
    with pytest.raises(ConfigError, match="asked different things in arc: 2 of 2 and 2 prompts"):
        compare(one, other, tmp_path / "both", 0)
    with pytest.raises(ConfigError, match="has no arc"):
        compare(one, _write(tmp_path / "gsm8k", _result([1.0], name="gsm8k")), tmp_path / "both", 0)
    with pytest.raises(ConfigError, match="not the results of mswift eval"):
        compare(one, tmp_path, tmp_path / "both", 0)
    told = _write(tmp_path / "told", _result([], metrics=(), reported={"acc": 0.5}))
    with pytest.raises(ConfigError, match="reported without its rows"):
        compare(told, told, tmp_path / "both", 0)
    (one / "results.json").write_text('{"mswift_eval": 2}')
    with pytest.raises(ConfigError, match="format 2, and this version reads 1"):
        results.read(one)


def test_a_checkpoint_is_told_by_its_contents(tmp_path: Path) -> None:
    def make(name: str, weights: bytes) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "config.json").write_text("{}")
        return tmp_path / name

    one = make("one", b"abc")
    assert checkpoint_hash([one]) == checkpoint_hash([make("copy", b"abc")])
    assert checkpoint_hash([one]) != checkpoint_hash([make("other", b"abd")])
    (one / "README.md").write_text("no part of the model")
    assert checkpoint_hash([one]) == checkpoint_hash([tmp_path / "copy"])
