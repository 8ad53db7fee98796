"""`mswift infer --infer_backend vllm` as a user runs it: a data set to a file, killed and continued; prompts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mswift.cli.main import main
from tests.support.shared import shared_file
from tests.support.vllm import needs_vllm

pytestmark = needs_vllm
NUM_ROWS = 24
VLLM = ("--infer_backend", "vllm")


@pytest.fixture(scope="module")
def model() -> tuple[str, ...]:
    return ("--model", str(shared_file("data/weights/stories260K-hd32-hf")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    names = ("Lily", "Tom", "Ben", "Sue")
    texts = [f"Once upon a time, {names[n % 4]} had {n} {('cats', 'dogs', 'toys')[n % 3]}." for n in range(NUM_ROWS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def argv(model: tuple[str, ...], rows: Path, result: Path) -> list[str]:
    flags = ("--max_new_tokens", "200", "--max_batch_size", "2")
    return ["infer", *model, "--val_dataset", str(rows), "--result_path", str(result), *flags]


@pytest.mark.whole  # tests/system/test_infer_command.py has it with the transformers engine
def test_a_killed_command_continues_to_the_answers_of_transformers(
    model: tuple[str, ...], rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Greedy answers are the same tokens, so that the files are the same bytes; then prompts, one by one."""
    expected, result = tmp_path / "transformers.jsonl", tmp_path / "new" / "vllm.jsonl"
    assert main(argv(model, rows, expected)) == 0
    program = subprocess.Popen(
        [sys.executable, "-m", "mswift.cli.main", *argv(model, rows, result), *VLLM],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    while not (result.exists() and b"\n" in result.read_bytes()):
        assert program.poll() is None, program.communicate()[0]
        time.sleep(0.01)
    os.killpg(program.pid, signal.SIGKILL)
    program.communicate()
    there = len(result.read_bytes().splitlines())
    with result.open("ab") as file:
        file.write(b'{"prompt": "Once upon a ti')  # and a torn line
    assert 0 < there < NUM_ROWS, "the command was not killed half-way"
    capfd.readouterr()
    assert main([*argv(model, rows, result), *VLLM]) == 0
    said = capfd.readouterr()
    assert f"{NUM_ROWS} rows ({there} were there, {NUM_ROWS - there} answered now)" in said.out
    assert result.read_bytes() == expected.read_bytes()

    prompts = ("infer", *model, "--max_new_tokens", "40", "--prompt", "Once upon a time, there was", "Tom and Lily")
    assert main([*prompts]) == 0
    theirs = capfd.readouterr().out
    assert main([*prompts, *VLLM]) == 0
    assert capfd.readouterr().out == theirs
    assert theirs.count("> ") == 2

    rows.write_text(rows.read_text().replace("cats", "bats"))
    assert main([*argv(model, rows, result), *VLLM]) == 2
    assert "row 1 is not the answer to row 1 of --val_dataset" in capfd.readouterr().err
