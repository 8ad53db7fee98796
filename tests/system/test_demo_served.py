"""The model of `make demo`, served and scored by others: vLLM gives its answers, lm-eval its scores. Minutes."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mswift.cli.main import main
from mswift.eval import results
from mswift.infer.backends import EngineConfig, open_engine
from tests.support.serving import serving
from tests.support.shared import shared_file
from tests.support.vllm import needs_vllm

pytestmark = pytest.mark.skipif(
    os.environ.get("MSWIFT_ALL_FAULTS") != "1", reason="trains the demo's model: MSWIFT_ALL_FAULTS=1 runs it"
)
DEMO = Path(__file__).parents[2] / "configs" / "demo" / "run.py"
MADE = "MSWIFT_DEMO_OUTPUT"
"""Environment variable: the output of a demo that was run already."""
SUBJECTS = {
    "after-pretraining-asked-in-chat-form": ("--model", "pt-hf"),
    "after-LoRA": ("--model", "pt-hf", "--adapters", "adapter"),
    "after-LoRA-merged": ("--model", "merged"),
}
NUM_ROWS = 200


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if MADE in os.environ:
        return Path(os.environ[MADE])
    path = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run([sys.executable, str(DEMO), "--output_dir", str(path)], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return path


@needs_vllm
@pytest.mark.parametrize("name", SUBJECTS)
def test_vllm_answers_as_transformers(demo: Path, tmp_path: Path, name: str) -> None:
    """All held-out questions, greedily: base, adapter and merged model."""
    words = [str(demo / word) if not word.startswith("--") else word for word in SUBJECTS[name]]
    found = tmp_path / "vllm.jsonl"
    flags = ("--max_new_tokens", "16", "--max_batch_size", "100", "--infer_backend", "vllm")
    data = ("--val_dataset", str(demo / "data" / "held_out.jsonl"), "--result_path", str(found))
    assert main(["infer", *words, *data, *flags]) == 0
    theirs = (demo / "answers" / f"{name}.jsonl").read_text().splitlines()
    assert len(theirs) == NUM_ROWS
    assert [json.loads(line) for line in found.read_text().splitlines()] == [json.loads(line) for line in theirs]


@needs_vllm
@pytest.mark.parametrize("tp", ["1", "2"])
def test_the_gate_lets_them_pass(demo: Path, tp: str) -> None:
    tensor_parallel = ("--tensor_model_parallel_size", tp, "--gate_tokens", "2048")
    assert main(["handover", str(demo / "pt-hf"), "--run", str(demo / "pt"), *tensor_parallel]) == 0
    adapter = ("--adapters", str(demo / "adapter"), "--run", str(demo / "sft"))
    assert main(["handover", str(demo / "pt-hf"), *adapter, *tensor_parallel]) == 0
    report = json.loads((demo / "adapter" / "handover.json").read_text())
    print((demo / "adapter" / "handover.md").read_text())
    compared = {(each["subject"], *each["engines"]) for each in report["comparisons"]}
    assert {("adapter", "transformers", "vllm"), ("merged", "megatron", "vllm")} <= compared
    assert all(each["max"] < 1e-4 for each in report["comparisons"])


def evaluate(output: Path, arc: str, *flags: str) -> tuple[dict[str, float], list[list[float]], list[str]]:
    """Scores, log-probabilities of ARC's choices and GSM8K's texts."""
    files = [f"{arc}={shared_file('data/eval/arc_challenge_200.jsonl')}"]
    files.append(f"gsm8k={shared_file('data/eval/gsm8k_test_200.jsonl')}")
    more = ("--num_fewshot", "0", "--max_new_tokens", "32", "--eval_output_dir", str(output))
    assert main(["eval", "--eval_dataset", *files, *more, *flags]) == 0
    found = {result.name.partition("_")[0]: result for result in results.read(output)[1]}
    scores = {}
    for name, metrics in (("arc", ("acc", "acc_norm")), ("gsm8k", ("exact_match",))):
        for metric in found[name].metrics:
            kind = metric.name.replace("exact_match,flexible-extract", "exact_match_flexible")
            if kind.startswith(metrics) and kind not in ("exact_match_strict", "exact_match,strict-match"):
                values = [sample["values"][metric.name] for sample in found[name].samples]
                scores[f"{name} {kind}"] = sum(values) / len(values)
    return scores, _likelihoods(found["arc"].samples), [_text(sample) for sample in found["gsm8k"].samples]


def _likelihoods(samples: Any) -> list[list[float]]:
    if "log_probabilities" in samples[0]:
        return [sample["log_probabilities"] for sample in samples]
    return [[float(answer[0][0]) for answer in sample["answers"]] for sample in samples]


def _text(sample: Any) -> str:
    answer = sample["answers"][0]
    return str(answer if isinstance(answer, str) else answer[0]).strip()


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    engine: Any = open_engine("transformers", EngineConfig(model, device="cpu", max_num_seqs=16))
    with serving(engine, "demo") as url:
        yield url
    engine.close()


def test_scores_do_not_depend_on_who_computes_them(demo: Path, tmp_path: Path) -> None:
    """200 questions each of ARC and GSM8K: native, by lm-eval's hf, and by lm-eval's client and ours over a server."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'mswift[eval]'")
    model = ("--model", str(demo / "merged"))
    theirs = ("--eval_backend", "lm_eval")
    ways = {"native": evaluate(tmp_path / "native", "arc", *model, "--device", "cpu")}
    hf = ("--eval_args", "model=hf", "--max_batch_size", "1", "--device", "cpu")
    ways["hf"] = evaluate(tmp_path / "hf", "arc_challenge", *model, *theirs, *hf)
    with served(demo / "merged") as url:
        ways["server"] = evaluate(tmp_path / "server", "arc_challenge", *model, *theirs, "--eval_url", url)
        ways["native-server"] = evaluate(tmp_path / "own", "arc", *model, "--eval_url", url)
    scores, likelihoods, texts = ways["native"]
    for name, (own_scores, own_likelihoods, own_texts) in ways.items():
        pairs = [(a, b) for x, y in zip(likelihoods, own_likelihoods, strict=True) for a, b in zip(x, y, strict=True)]
        apart = max(abs(a - b) for a, b in pairs)
        same = sum(a == b for a, b in zip(texts, own_texts, strict=True))
        print(f"{name}: {own_scores}, log-probabilities apart {apart:.1e}, {same} of {len(texts)} texts the same")
    for own_scores, own_likelihoods, own_texts in ways.values():
        common = {name: score for name, score in own_scores.items() if name in scores}
        assert common == {name: scores[name] for name in common}
        assert {"arc acc", "arc acc_norm", "gsm8k exact_match_flexible"} <= common.keys()
        assert own_texts == texts
        for own, other in zip(likelihoods, own_likelihoods, strict=True):
            assert own == pytest.approx(other, abs=5e-4, rel=1e-6)
