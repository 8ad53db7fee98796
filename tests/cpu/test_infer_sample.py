"""`mswift sample`: scores are the reward's, the best is the best, a half-written file continues to the same bytes."""

import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mswift.cli.main import main
from mswift.config.sample import SampleConfig
from mswift.errors import DataError
from mswift.eval import rewards, sample
from mswift.infer.loading import load_model, load_tokenizer
from mswift.infer.request import Completion, Request
from mswift.infer.transformers_engine import TransformersEngine
from tests.support.serving import fixed_answer_model, serving
from tests.support.tiny import tiny_model, tiny_tokenizer

REWARD = """
def reward(prompts, completions, label):
    assert len(prompts) == len(completions) == len(label)
    return [len(text) + (prompt == "1?") * 100 for prompt, text in zip(prompts, completions)]
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_tokenizer(path)
    tiny_model(path, "qwen3", vocab_size=259)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": f"{n}?", "response": str(n)}) + "\n" for n in range(5)))
    return path


def _sample(model: Path, rows: Path, result: Path, *flags: str) -> list[dict[str, Any]]:
    argv = ["sample", "--model", str(model), "--val_dataset", str(rows), "--result_path", str(result)]
    assert main([*argv, "--num_samples", "3", "--max_new_tokens", "12", "--max_batch_size", "2", *flags]) == 0
    return [json.loads(line) for line in result.read_bytes().splitlines()]


def test_answers_are_scored_by_a_function_and_the_best_become_rows(
    model_dir: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(REWARD)
    result, best = tmp_path / "samples.jsonl", tmp_path / "new" / "best.jsonl"
    flags = (
        "--reward",
        str(tmp_path / "own.py"),
        "--min_score",
        "100",
        "--best_path",
        str(best),
        "--pass_at",
        "1",
        "2",
    )
    lines = _sample(model_dir, rows, result, *flags)
    said = capsys.readouterr().out
    assert [line["label"] for line in lines] == list("01234")
    for number, line in enumerate(lines):
        texts = [sample["response"] for sample in line["samples"]]
        assert len(set(texts)) == 3
        assert [sample["score"] for sample in line["samples"]] == [len(text) + 100 * (number == 1) for text in texts]
    assert "pass@1 0.2000\npass@2 0.2000\n" in said
    (row,) = (json.loads(line) for line in best.read_text().splitlines())
    longest = max((sample["response"] for sample in lines[1]["samples"]), key=len)
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][1]["content"] == longest
    whole = result.read_bytes()
    result.write_bytes(whole[: len(whole) // 2])
    _sample(model_dir, rows, result, *flags)
    assert result.read_bytes() == whole


def test_answers_with_line_breaks_of_unicode_are_reported(
    model_dir: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """U+2028 and U+0085 end lines of text, and JSON holds them as they are."""
    text = "a\u2028b\x85c"

    class Engine:
        tokenizer = SimpleNamespace(chat_template="any")

        def generate(self, requests: list[Request]) -> list[Completion]:
            return [Completion(text, "stop", 1, 1) for request in requests for _ in range(request.sampling.n)]

        def close(self) -> None: ...

    monkeypatch.setattr(sample, "open_engine", lambda *_: Engine())
    best = tmp_path / "best.jsonl"
    _sample(model_dir, rows, tmp_path / "out", "--reward", "regex:.", "--min_score", "0", "--best_path", str(best))
    assert "5 rows, 15 answers" in capsys.readouterr().out
    contents = [json.loads(line)["messages"][1]["content"] for line in best.read_bytes().splitlines()]
    assert contents == [text] * 5


def test_a_file_of_another_reward_is_refused(
    model_dir: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the answers by one reward and half by another would be one file with one mean."""
    own, result = tmp_path / "own.py", tmp_path / "samples.jsonl"
    own.write_text(REWARD)
    _sample(model_dir, rows, result, "--reward", str(own))
    whole = result.read_bytes()
    result.write_bytes(whole[: len(whole) // 2])
    own.write_text(REWARD.replace("100", "101"))
    argv = ["sample", "--model", str(model_dir), "--val_dataset", str(rows), "--result_path", str(result)]
    flags = ("--num_samples", "3", "--max_new_tokens", "12", "--reward", str(own))
    capsys.readouterr()
    assert main([*argv, *flags]) == 2
    error = capsys.readouterr().err
    assert "row 1 is not the answer to row 1 of --val_dataset with this model, sampling and reward (5 rows)" in error
    assert result.read_bytes() == whole[: len(whole) // 2]
    own.write_text(REWARD)
    _sample(model_dir, rows, result, "--reward", str(own))
    assert result.read_bytes() == whole
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert main([*argv, *flags, "--chat_template", str(tmp_path / "other.jinja")]) == 2


def test_rewards_are_told_apart_by_what_scores() -> None:
    from mswift.config.sample import SampleConfig
    from mswift.eval.rewards import reward_identity

    def identity(**changes: Any) -> str:
        fields = {"reward": "judge", "judge_url": "http://a/v1", "judge_model": "m", **changes}
        return reward_identity(SampleConfig(model="m", val_dataset=("d",), result_path="r", **fields))

    assert identity(judge_url="http://b/v1") == identity()
    others = [{"judge_prompt": "Rate {completion}"}, {"judge_model": "n"}, {"reward": "exact_match"}]
    assert len({identity(), *(identity(**other) for other in others)}) == 4


def test_labels_by_pattern_and_a_judge_behind_an_address(
    model_dir: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = tmp_path / "judge"
    tokenizer = tiny_tokenizer(judge)
    asked = [{"role": "user", "content": "Rate."}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    fixed_answer_model(judge, tokenizer, f"{prompt}It is 8<|im_end|>")
    engine = TransformersEngine(load_model(judge, None, torch.device("cpu")), load_tokenizer(judge))
    with serving(engine, "judge") as url:
        flags = ("--reward", "judge", "--judge_url", url, "--judge_model", "judge", "--judge_prompt", "Rate.")
        lines = _sample(model_dir, rows, tmp_path / "judged.jsonl", *flags)
    assert {sample["score"] for line in lines for sample in line["samples"]} == {8.0}
    from mswift.config.sample import SampleConfig
    from mswift.eval.rewards import find_reward

    def score(reward: str, *answers: str) -> list[float]:
        config = SampleConfig(model="m", val_dataset=("d",), result_path="r", reward=reward)
        return find_reward(config)("q", answers, "41")

    assert score("exact_match", "41", " 41\n", "it is 41", "") == [1, 1, 0, 0]
    assert score(r"regex:is (\d+)", "it is 40, no, it is 41", "it is 41, no, it is 40", "41") == [1, 0, 0]
    assert score(r"regex:\d+", "40 41", "x") == [1, 0]
    capsys.readouterr()


def test_a_judge_is_asked_what_was_said_and_its_thinking_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that hold {label} or {completion} stay as they are; "<think>" may speak of other numbers."""
    asked: list[str] = []

    def answer(request: Any, timeout: float) -> Any:
        asked.append(json.loads(request.data)["messages"][0]["content"])
        said = "<think>\nIt has 2 errors.\n</think>\n\nIt is worth 7."
        return BytesIO(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

    monkeypatch.setattr(rewards, "urlopen", answer)
    config = SampleConfig(
        model="m", val_dataset=("d",), result_path="r", reward="judge", judge_url="http://a/v1", judge_model="m",
        judge_prompt="{prompt} | {label} | {completion} | {other}",
    )  # fmt: skip
    score = rewards.find_reward(config)
    assert score("What is {completion} in {label}?", ["{prompt}", "a{label}"], "secret") == [7.0, 7.0]
    assert asked == [
        "What is {completion} in {label}? | secret | {prompt} | {other}",
        "What is {completion} in {label}? | secret | a{label} | {other}",
    ]


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def reward(prompts, completions, label):\n    return [1.0, float('nan')]\n")
    config = SampleConfig(model="m", val_dataset=("d",), result_path="r", reward=str(tmp_path / "own.py"))
    with pytest.raises(DataError, match="a score is nan"):
        rewards.find_reward(config)("q", ["a", "b"], None)


def test_mistakes_are_one_line(model_dir: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.py").write_text("x = 1\n")
    mistakes = {
        ("--reward", "best"): "exact_match, regex:PATTERN, judge, or a file",
        ("--reward", "regex:("): "--reward regex:(",
        ("--reward", str(tmp_path / "none.py")): "it has no function reward",
        ("--reward", str(tmp_path / "absent.py")): "no such file",
        ("--reward", "judge"): "needs --judge_url and --judge_model",
        ("--judge_url", "http://x/v1"): "--judge_url is for --reward judge",
        ("--temperature", "0"): "8 times the same answer",
        ("--pass_at", "9"): "from 1 to --num_samples 8",
        ("--num_samples", "0"): "--num_samples 0",
    }
    argv = ("--model", str(model_dir), "--val_dataset", str(rows), "--result_path", str(tmp_path / "r.jsonl"))
    for flags, message in mistakes.items():
        assert main(["sample", *argv, *flags]) == 2, flags
        error = capsys.readouterr().err
        assert message in error, (flags, error)
        assert error.count("\n") == 1
