"""`mswift eval --eval_backend opencompass` with OpenCompass itself, where an environment of its own has it."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from mswift.cli.main import main
from mswift.eval import results
from tests.support.deployed import Running
from tests.support.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif("MSWIFT_OPENCOMPASS" not in os.environ, reason="MSWIFT_OPENCOMPASS names no command")
KEY = "the-servers-own-key"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_tokenizer(path)
    tiny_model(path, "qwen3", vocab_size=259, max_position_embeddings=8192, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Running]:
    found = Running("deploy", "--model", str(model), MSWIFT_API_KEY=KEY)
    yield found
    assert found.stop()[0] == 0


def test_its_score_is_that_of_the_servers_answers(
    model: Path, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of GSM8K's form: "NULL" is what it takes for the number of an answer without one. Answers of 512 tokens, as
    its configuration says."""
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is.\n#### {gold}"} for n, gold in ((1, "NULL"), (2, 4))]
    data = tmp_path / "cache" / "data" / "gsm8k"
    data.mkdir(parents=True)
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPASS_DATA_CACHE", "cache")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out = tmp_path / "out"
    argv = ["eval", "--eval_backend", "opencompass", "--eval_url", server.url, "--model", str(model),
            "--eval_dataset", "gsm8k_gen", "--eval_output_dir", str(out)]  # fmt: skip
    assert main(argv) == 0
    assert sorted(os.listdir(tmp_path)) == ["cache", "out"]
    assert KEY not in "".join(path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())
    _, (found,) = results.read(out)
    (written,) = (out / "opencompass" / "work").glob("*/predictions/mswift_server/gsm8k.json")
    right = []
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        for one, row in zip(json.loads(written.read_text()).values(), rows, strict=True):
            roles = {"HUMAN": "user", "BOT": "assistant"}
            messages = [{"role": roles[part["role"]], "content": part["prompt"]} for part in one["origin_prompt"]]
            told = client.chat.completions.create(model=model.name, messages=messages, max_tokens=512, temperature=0)  # type: ignore[arg-type]
            assert one["prediction"] == told.choices[0].message.content
            numbers = re.findall(r"-?\d+\.\d+|-?\d+", one["prediction"].split("Question:")[0])
            right.append((numbers[-1] if numbers else "NULL") == row["answer"].split("#### ")[1])
    assert found.reported == {"accuracy": pytest.approx(100 * sum(right) / len(right), abs=0.01)}
