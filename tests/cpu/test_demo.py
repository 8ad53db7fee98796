"""What the demo starts from: no held-out question is in its data, its recipes parse, its directory is its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mswift.cli.options import parse
from mswift.config.train import PtConfig, SftConfig

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo"


def _python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = f"import sys; sys.path.insert(0, {str(DEMO)!r}); {code}"
    return subprocess.run([sys.executable, "-c", command], cwd=cwd, capture_output=True, text=True, check=False)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    code = (
        "from pathlib import Path; import materials as m; m.write_data(Path('data'), 7); "
        "m.write_model(Path('base'), ['What number comes after 4731? 4732'] * 50, 7)"
    )
    result = _python(code, path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return path


def test_no_held_out_question_is_trained_on(demo: Path) -> None:
    held_out = {row["messages"][0]["content"] for row in _rows(demo / "data" / "held_out.jsonl")}
    conversations = [row["messages"] for row in _rows(demo / "data" / "chat.jsonl")]
    chat = {message["content"] for messages in conversations for message in messages if message["role"] == "user"}
    assert {len(messages) for messages in conversations} == {2, 4, 6}
    documents = {row["text"].partition("?")[0] + "?" for row in _rows(demo / "data" / "pretrain.jsonl")}
    assert len(held_out) == 200
    assert not held_out & chat
    assert not held_out & documents
    assert len(chat) == 8999 - 200
    for row in _rows(demo / "data" / "held_out.jsonl"):
        question, answer = (message["content"] for message in row["messages"])
        assert int(question[-5:-1]) + 1 == int(answer)


def test_every_digit_is_a_token_and_the_template_marks_the_answer(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "base")
    assert tokenizer.tokenize("4731") == ["4", "7", "3", "1"]
    row = _rows(demo / "data" / "held_out.jsonl")[0]
    encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(learned) == row["messages"][1]["content"] + "<|im_end|>"


def test_the_recipes_are_those_of_the_commands() -> None:
    pretraining = parse(PtConfig, [str(DEMO / "pt.yaml"), "--model", "m"])
    assert (pretraining.train_iters, pretraining.lr, pretraining.max_length) == (600, 2e-3, 128)
    tuning = parse(SftConfig, [str(DEMO / "sft.yaml"), "--model", "m"])
    assert (tuning.tuner_type, tuning.lora_rank, tuning.train_iters, tuning.lr) == ("lora", 16, 300, 4e-3)


def test_a_directory_that_no_demo_wrote_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "out" / "data" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    command = [sys.executable, str(DEMO / "run.py"), "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "holds data, which no demo wrote; give another --output_dir" in result.stderr
    assert mine.read_text() == "mine"


def test_a_command_that_fails_ends_the_demo(tmp_path: Path) -> None:
    result = _python(
        "import run; from pathlib import Path; run.Demo(Path('d'), 1, 2).mswift('verify', 'base')", tmp_path
    )
    assert result.stdout.startswith("\n$ mswift verify d/base")
    assert "mswift verify ended with status" in result.stderr
