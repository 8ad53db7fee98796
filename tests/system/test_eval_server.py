"""Scores over a server are those of the engine: by mswift's client, by lm-evaluation-harness's own, by EvalScope."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mswift.config.eval import EvalConfig
from mswift.errors import ConfigError
from mswift.eval import results
from mswift.eval.results import TaskResult
from mswift.eval.run import main
from mswift.infer.backends import EngineConfig, open_engine
from tests.support.serving import serving
from tests.support.shared import shared_file

NUM_ROWS = 4
ECHO = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


@dataclass(frozen=True)
class Place:
    """A model, and the address of a server of it."""

    model: Path
    url: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    model = tmp_path_factory.mktemp("server") / "stories"
    shutil.copytree(shared_file("data/weights/stories260K-hd32-hf"), model)
    (model / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    (model / "chat_template.jinja").write_text(ECHO)
    engine: Any = open_engine("transformers", EngineConfig(model=model, device="cpu"))
    with serving(engine, "stories") as url:
        yield Place(model, url)
    engine.close()


def _eval(output: Path, **changes: Any) -> dict[str, TaskResult]:
    given = {"num_fewshot": 0, "eval_limit": NUM_ROWS, "max_new_tokens": 12, "eval_output_dir": str(output)}
    assert main(EvalConfig(**{**given, **changes})) == 0
    return {result.name.partition("_")[0]: result for result in results.read(output)[1]}


def _files(arc: str) -> tuple[str, ...]:
    return (
        f"{arc}={shared_file('data/eval/arc_challenge_200.jsonl')}",
        f"gsm8k={shared_file('data/eval/gsm8k_test_200.jsonl')}",
    )


@pytest.fixture(scope="module")
def native(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskResult]:
    return _eval(tmp_path_factory.mktemp("native") / "out", model=str(place.model), eval_dataset=_files("arc"))


def _likelihoods(samples: Any) -> list[list[float]]:
    return [sample["log_probabilities"] for sample in samples]


def test_the_server_scores_as_the_engine(place: Place, native: dict[str, TaskResult], tmp_path: Path) -> None:
    found = _eval(tmp_path / "out", model=str(place.model), eval_url=place.url, eval_dataset=_files("arc"))
    about = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (about["model"], about["engine"]) == ("stories", f"server {place.url}")
    for own, other in zip(_likelihoods(native["arc"].samples), _likelihoods(found["arc"].samples), strict=True):
        assert own == pytest.approx(other, abs=2e-4)
    answers = [[sample["answers"] for sample in result["gsm8k"].samples] for result in (native, found)]
    assert answers[0] == answers[1]
    assert native["arc"].prompts_sha256 == found["arc"].prompts_sha256


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'mswift[eval]'")
def test_lm_evals_client_agrees(place: Place, native: dict[str, TaskResult], tmp_path: Path) -> None:
    more = {"eval_backend": "lm_eval", "eval_url": place.url, "eval_dataset": _files("arc_challenge")}
    found = _eval(tmp_path / "out", model=str(place.model), **more)
    theirs = [[float(answer[0][0]) for answer in sample["answers"]] for sample in found["arc"].samples]
    for own, other in zip(_likelihoods(native["arc"].samples), theirs, strict=True):
        assert own == pytest.approx(other, abs=2e-4)
    texts = [sample["answers"][0][0].strip() for sample in found["gsm8k"].samples]
    assert texts == [sample["answers"][0].strip() for sample in native["gsm8k"].samples]


def test_conversations_over_the_server_are_the_engines(place: Place, tmp_path: Path) -> None:
    """With --model, without it, and where the answer has a beginning (humaneval's chat form)."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Once upon a time", "answer": "there"}\n{"question": "Lily", "answer": "x"}\n')
    problem = {"task_id": "t/0", "prompt": "def add(a, b):\n", "entry_point": "add", "test": "def check(f): f(1, 2)"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem))
    files = (f"match={rows}", f"humaneval={tmp_path / 'problems.jsonl'}")
    chat = {"use_chat_template": True, "eval_dataset": files, "eval_limit": 2}
    own = _eval(tmp_path / "own", model=str(place.model), **chat)
    with_model = _eval(tmp_path / "with", model=str(place.model), eval_url=place.url, **chat)
    without = _eval(tmp_path / "without", eval_url=place.url, **{**chat, "eval_dataset": files[:1]})
    answers = [[s["answers"] for s in found["match"].samples] for found in (own, with_model, without)]
    assert answers[0] == answers[1] == answers[2]
    assert [s["answers"] for s in own["humaneval"].samples] == [s["answers"] for s in with_model["humaneval"].samples]


def test_what_a_server_does_not_do_is_said(place: Place, tmp_path: Path) -> None:
    files = _files("arc")[:1]
    with pytest.raises(ConfigError, match="likelihoods over --eval_url need the tokenizer.*give --model DIR"):
        _eval(tmp_path / "out", eval_url=place.url, eval_dataset=files)
    long = (f"humaneval={shared_file('data/eval/HumanEval.jsonl.gz')}",)
    with pytest.raises(ConfigError, match=r"4 of 4 conversations leave no room .* 12: .* the model 512"):
        _eval(tmp_path / "out", model=str(place.model), eval_url=place.url, eval_dataset=long, use_chat_template=True)
    with pytest.raises(ConfigError, match=r"completions: 404 .*nobody"):
        _eval(tmp_path / "out", eval_url=place.url, served_model_name="nobody", eval_dataset=_files("arc")[1:])


@pytest.mark.skipif("MSWIFT_EVALSCOPE_PYTHON" not in os.environ, reason="MSWIFT_EVALSCOPE_PYTHON names no interpreter")
def test_evalscope_asks_the_server(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "mcq"
    folder.mkdir()
    lines = shared_file("data/eval/arc_challenge_200.jsonl").read_text().splitlines()[:NUM_ROWS]
    with (folder / "arc_val.jsonl").open("w") as file:
        for row in map(json.loads, lines):
            choices = {choice["label"]: choice["text"] for choice in row["question"]["choices"]}
            file.write(json.dumps({"question": row["question"]["stem"], **choices, "answer": row["answerKey"]}) + "\n")
    more = {"eval_backend": "evalscope", "eval_url": place.url, "eval_dataset": (f"general_mcq={folder}",)}
    found = _eval(tmp_path / "out", **{**more, "num_fewshot": None})
    assert len(found["general"].samples) == NUM_ROWS
    assert [metric.name for metric in found["general"].metrics] == ["accuracy"]
