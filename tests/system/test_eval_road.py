"""`mswift eval` from the files to the scores of programs, calls and agents: in process, over a server, by vLLM.

A model that knows its answers by heart scores 1 in each task; a real one that never saw such tasks walks the same road.
"""

import contextlib
import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mswift.agent.conversation import write_reply
from mswift.agent.formats import FORMATS
from mswift.cli.main import main
from mswift.eval import results
from mswift.eval.catalog import choose
from mswift.eval.model import encode
from mswift.eval.statistics import estimate
from mswift.eval.task import Settings
from mswift.infer.backends import EngineConfig, open_engine
from mswift.infer.loading import load_tokenizer
from mswift.infer.prompts import prompt_tokens
from tests.support.by_heart import learn
from tests.support.serving import serving
from tests.support.shared import shared_file
from tests.support.vllm import needs_vllm

TREE = "data/agent/toolbench/answer/G1_answer/57_ChatGPT_DFS_woFilter_w2.json"
WEATHER = {
    "tools": [{"type": "function", "function": {"name": "weather", "description": "Weather of a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}],
    "messages": [
        {"role": "user", "content": "Is it raining in Bern?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]},
    ],
}  # fmt: skip
CALL = {"name": "math.factorial", "arguments": {"number": 5}}
RIGHT = {
    "humaneval pass@1": 1.0, "bfcl ast_match": 1.0, "bfcl calls": 1.0, "toolbench plan_em": 1.0,
    "toolbench act_em": 1.0, "toolbench f1": 1.0, "toolbench hallu_rate": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """The model that knows, and the files of its questions."""
    home = tmp_path_factory.mktemp("known")
    files = {name: home / f"{name}.jsonl" for name in ("humaneval", "bfcl", "toolbench")}
    with gzip.open(shared_file("data/eval/HumanEval.jsonl.gz"), "rt") as lines:
        problems = [json.loads(line) for line in lines]
    files["humaneval"].write_text(json.dumps(next(p for p in problems if p["task_id"] == "HumanEval/53")) + "\n")
    for ending in (".jsonl", ".answers.jsonl"):
        row = shared_file(f"data/agent/bfcl/simple_python_100{ending}").read_text().splitlines()[97]
        (home / f"bfcl{ending}").write_text(row + "\n")
    files["toolbench"].write_text(json.dumps(WEATHER) + "\n")
    tokenizer: Any = load_tokenizer_beside_config(home / "tokenizer")
    pairs = []
    for name, file in files.items():
        (chosen,) = choose([f"{name}={file}"], [], 0, None)
        (doc,) = chosen.docs
        asked: Any = chosen.task.ask(doc, [], Settings())
        prompt = encode(tokenizer, asked.prompt) if asked.messages is None else prompt_tokens(tokenizer, asked)
        target = {
            "humaneval": lambda doc=doc: doc["canonical_solution"],
            "bfcl": lambda: f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
            "toolbench": lambda doc=doc: write_reply(doc["reply"], FORMATS["toolbench"], doc["where"]),
        }[name]()
        answer = tokenizer(target, add_special_tokens=False)["input_ids"]
        pairs.append((prompt, [*answer, tokenizer.eos_token_id]))
    learn(home / "model", pairs, 2048)
    return home / "model", files


def load_tokenizer_beside_config(path: Path) -> Any:
    """The tokenizer qwen2-8k as a model directory has it."""
    shutil.copytree(shared_file("data/tokenizers/qwen2-8k"), path)
    (path / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(path)


def evaluate(output: Path, files: dict[str, Path], *flags: str) -> dict[str, float]:
    """The scores of `mswift eval`, as "task metric"."""
    words = [f"{name}={file}" for name, file in files.items()]
    assert main(["eval", "--eval_dataset", *words, "--eval_output_dir", str(output), *flags]) == 0
    scores = {}
    for result in results.read(output)[1]:
        for metric in result.metrics:
            found = estimate(metric, result.values(metric), 0)
            if found is not None:
                scores[f"{result.name} {metric.name}"] = found.value
    return scores


@contextlib.contextmanager
def served(model: Path) -> Iterator[tuple[str, ...]]:
    """The flags that ask a server of this model."""
    engine: Any = open_engine("transformers", EngineConfig(model, device="cpu"))
    with serving(engine, "served") as url:
        yield ("--eval_url", url)
    engine.close()


def test_who_knows_the_answers_scores_one(known: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    model, files = known
    flags = ("--model", str(model), "--max_new_tokens", "100")
    assert evaluate(tmp_path / "native", files, *flags, "--device", "cpu") == RIGHT
    with served(model) as server:
        assert evaluate(tmp_path / "server", files, *flags, *server) == RIGHT
        talks = {name: file for name, file in files.items() if name != "humaneval"}
        right = {name: score for name, score in RIGHT.items() if not name.startswith("humaneval")}
        assert evaluate(tmp_path / "alone", talks, "--max_new_tokens", "100", *server) == right  # no --model
    answers = [results.read(tmp_path / name)[1] for name in ("native", "server")]
    assert [[s["answers"] for s in r.samples] for r in answers[0]] == [
        [s["answers"] for s in r.samples] for r in answers[1]
    ]


@needs_vllm
@pytest.mark.skipif(os.environ.get("MSWIFT_ALL_FAULTS") != "1", reason="one more vLLM: MSWIFT_ALL_FAULTS=1 runs it")
def test_vllm_scores_the_same(known: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    model, files = known
    flags = ("--model", str(model), "--max_new_tokens", "100", "--infer_backend", "vllm")
    assert evaluate(tmp_path / "vllm", files, *flags) == RIGHT


def test_who_knows_nothing_walks_the_same_road(tmp_path: Path) -> None:
    """stories260K with room for long prompts: published problems, calls and a ToolBench tree; the scores are 0."""
    model = tmp_path / "stories"
    shutil.copytree(shared_file("data/weights/stories260K-hd32-hf"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    (model / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    paths = {
        "humaneval": "data/eval/HumanEval.jsonl.gz",
        "bfcl": "data/agent/bfcl/simple_python_100.jsonl",
        "toolbench": TREE,
    }
    files = {name: shared_file(path) for name, path in paths.items()}
    flags = ("--model", str(model), "--eval_limit", "3", "--max_new_tokens", "48")
    found = evaluate(tmp_path / "native", files, *flags, "--device", "cpu")
    assert found["humaneval pass@1"] == found["bfcl ast_match"] == found["bfcl calls"] == 0
    assert found["toolbench act_em"] == found["toolbench f1"] == 0
    with served(model) as server:
        assert evaluate(tmp_path / "server", files, *flags, *server) == found
    samples = {r.name: r.samples for r in results.read(tmp_path / "native")[1]}
    assert [sample["id"] for sample in samples["humaneval"]] == [f"HumanEval/{n}" for n in range(3)]
    assert all(sample["answers"][0].strip() for sample in samples["bfcl"])
