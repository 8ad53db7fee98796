"""`mswift eval` on a real model: lm-evaluation-harness, which loads the model itself, computes the same likelihoods,
answers and scores; ROUGE and BLEU are their libraries' own; an agent that answers as the target does scores 1."""

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mswift.cli.main import main
from mswift.errors import ConfigError
from mswift.eval import results
from mswift.eval.agents import step_text
from mswift.eval.catalog import choose
from mswift.eval.results import TaskResult
from mswift.eval.statistics import estimate
from mswift.eval.task import Settings
from tests.support.shared import shared_file
from tests.support.vllm import needs_vllm

NUM_ROWS = 6
needs_extra = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'mswift[eval]'"
)


def _flags(**changes: Any) -> list[str]:
    given = {"eval_limit": NUM_ROWS, "num_fewshot": 0, "max_new_tokens": 16, **changes}
    return [word for name, value in given.items() for word in (f"--{name}", *map(str, _list(value)))]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the length of answers in generation_config.json, which lm-eval's hf puts above the task's."""
    model = tmp_path_factory.mktemp("model") / "stories"
    shutil.copytree(shared_file("data/weights/stories260K-hd32-hf"), model)
    (model / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    return model


def _eval(model: Path, output: Path, arc: str, **changes: Any) -> tuple[dict[str, Any], dict[str, TaskResult]]:
    files = [f"{arc}={shared_file('data/eval/arc_challenge_200.jsonl')}"]
    files.append(f"gsm8k={shared_file('data/eval/gsm8k_test_200.jsonl')}")
    flags = _flags(model=model, eval_dataset=files, eval_output_dir=output, **changes)
    assert main(["eval", *flags]) == 0
    about, found = results.read(output)
    return about, {result.name.partition("_")[0]: result for result in found}


@pytest.fixture(scope="module")
def native(
    stories: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, TaskResult], Path]:
    output = tmp_path_factory.mktemp("native") / "out"
    return *_eval(stories, output, "arc"), output


def test_results_say_what_was_evaluated(native: tuple[dict[str, Any], dict[str, TaskResult], Path]) -> None:
    about, found, output = native
    assert (about["backend"], about["engine"], about["seed"]) == ("native", "transformers", 42)
    assert len(about["checkpoint_blake3"]) == 64
    assert about["config"]["eval_limit"] == NUM_ROWS
    assert "transformers" in about["versions"]
    assert {task["num_fewshot"] for task in about["tasks"].values()} == {0}
    assert len(found["arc"].samples) == len(found["gsm8k"].samples) == NUM_ROWS
    assert {path.name for path in output.iterdir()} == {
        "results.json", "report.md", "chart.png", "samples-arc.jsonl", "samples-gsm8k.jsonl",
    }  # fmt: skip


def _likelihoods(result: TaskResult) -> list[list[float]]:
    """Of each choice of each row, from our samples or lm-eval's."""
    first = result.samples[0]
    if "log_probabilities" in first:
        return [sample["log_probabilities"] for sample in result.samples]
    return [[float(answer[0][0]) for answer in sample["answers"]] for sample in result.samples]


def _answers(found: dict[str, TaskResult]) -> list[str]:
    """Without white space around: lm-eval decodes new tokens alone, which loses a space before the first word."""
    texts = [sample["answers"][0] for sample in found["gsm8k"].samples]
    return [(text if isinstance(text, str) else text[0]).strip() for text in texts]


def _check_same(found: dict[str, TaskResult], native: dict[str, TaskResult]) -> None:
    for own, other in zip(_likelihoods(native["arc"]), _likelihoods(found["arc"]), strict=True):
        assert own == pytest.approx(other, abs=2e-4)  # sums of up to 60 float32 log-probabilities
    assert _answers(found) == _answers(native)
    scores = {name: _score(native, name) for name in ("arc acc", "arc acc_norm", "gsm8k exact_match_flexible")}
    assert scores == {
        "arc acc": _score(found, "arc acc"),
        "arc acc_norm": _score(found, "arc acc_norm"),
        "gsm8k exact_match_flexible": _score(found, "gsm8k exact_match,flexible-extract"),
    }


def _score(found: dict[str, TaskResult], name: str) -> float:
    task, _, metric = name.partition(" ")
    (chosen,) = (one for one in found[task].metrics if one.name == metric)
    score = estimate(chosen, found[task].values(chosen), 0)
    assert score is not None
    return score.value


@needs_extra
def test_lm_eval_that_loads_the_model_itself_agrees(
    stories: Path, native: tuple[dict[str, Any], dict[str, TaskResult], Path], tmp_path: Path
) -> None:
    more = {"eval_backend": "lm_eval", "eval_args": "model=hf", "max_batch_size": 1, "device": "cpu"}
    about, found = _eval(stories, tmp_path / "hf", "arc_challenge", **more)
    assert about["engine"] == "lm-eval's hf"
    assert about["checkpoint_blake3"] == native[0]["checkpoint_blake3"]
    assert about["reported_by_lm_eval"]["arc_challenge"]["acc,none"] == _score(found, "arc acc")
    _check_same(found, native[1])


@needs_extra
def test_lm_eval_over_the_engine_agrees(
    stories: Path, native: tuple[dict[str, Any], dict[str, TaskResult], Path], tmp_path: Path
) -> None:
    about, found = _eval(stories, tmp_path / "engine", "arc_challenge", eval_backend="lm_eval")
    assert about["engine"] == "transformers"
    _check_same(found, native[1])


@needs_extra
def test_what_lm_eval_asks_several_times_is_drawn_anew_and_the_seed_decides(tmp_path: Path) -> None:
    """Tasks with `repeats` (pass@k, votes) ask the same again and again."""
    from types import SimpleNamespace

    from mswift.eval.lm_eval_backend import _engine_model

    class Seeds:
        """An EvalModel whose answers are the seeds."""

        tokenizer = SimpleNamespace(eos_token="<end>")

        def generate(self, asked: Sequence[Any], advance: Any) -> tuple[list[list[Any]], list[bool]]:
            return [[SimpleNamespace(text=str(one.sampling.seed))] for one in asked], [False] * len(asked)

    same = [SimpleNamespace(args=("Q", {"until": ["\n"], "do_sample": True, "temperature": 0.8}))] * 4
    first, again, other = (_engine_model(Seeds(), False, seed).generate_until(same) for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert first == again
    assert len({*first, *other}) == 8


@needs_extra
def test_prompts_are_lm_evals_own(tmp_path: Path) -> None:
    """With examples too: the text that lm-eval's own task gives is the text that ours gives."""
    from lm_eval.tasks import TaskManager

    from mswift.eval.lm_eval_backend import _spec

    manager = TaskManager()
    files = {
        "gsm8k": ("gsm8k", "data/eval/gsm8k_test_200.jsonl", "data/eval/gsm8k_train.jsonl", 5),
        "arc_challenge": ("arc", "data/eval/arc_challenge_200.jsonl", "data/eval/arc_challenge_dev_50.jsonl", 3),
        "mmlu_abstract_algebra": (
            "mmlu", "data/eval/mmlu/abstract_algebra_test.csv", "data/eval/mmlu/abstract_algebra_dev.csv", 5,
        ),
    }  # fmt: skip
    for name, (ours, file, examples, count) in files.items():
        spec = _spec(name, shared_file(file), shared_file(examples), manager, tmp_path)
        task: Any = manager.load([spec])["tasks"][name]
        (chosen,) = choose([f"{ours}={shared_file(file)}"], [f"{ours}={shared_file(examples)}"], count, 3)
        for doc, theirs in zip(chosen.docs, task.test_docs(), strict=False):
            asked: Any = chosen.task.ask(doc, chosen.examples_for(doc), Settings())
            context = task.fewshot_context(theirs, num_fewshot=count)
            assert context == (asked.prompt if hasattr(asked, "prompt") else asked.context), name


@needs_extra
def test_rouge_and_bleu_are_the_libraries(tmp_path: Path) -> None:
    import sacrebleu
    from rouge_score import rouge_scorer

    answers = ["the cat sat on the mat", "a dog ran away quickly from it", "", "It's 17 degrees."]
    references = [
        ["the cat is on the mat", "a cat sat on a mat"],
        ["the dog ran away from it"],
        ["x"],
        ["It is 17 degrees."],
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": "q", "answer": r}) + "\n" for r in references))
    (chosen,) = choose([f"text={file}"], [], 0, None)
    assert chosen.task.score is not None
    values = chosen.task.score(chosen.docs, [[answer] for answer in answers], Settings())
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for value, answer, many in zip(values, answers, references, strict=True):
        found = [scorer.score(reference, answer) for reference in many]
        for ours, theirs in (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rouge_l", "rougeL")):
            assert value[ours] == max(one[theirs].fmeasure for one in found)
    streams = [[many[0] for many in references], [many[1] if len(many) > 1 else None for many in references]]
    whole = sacrebleu.corpus_bleu(answers, streams)
    (metric,) = (one for one in chosen.task.metrics(Settings()) if one.kind == "bleu")
    score = estimate(metric, [value["bleu"] for value in values], 0)
    assert score is not None
    assert score.value == pytest.approx(whole.score)
    assert score.low < score.value < score.high


def _steps(file: str) -> Any:
    (chosen,) = choose([f"toolbench={shared_file(file)}"], [], 0, None)
    return chosen


def _toolbench_scores(chosen: Any, texts: Sequence[str]) -> dict[str, float]:
    values = chosen.task.score(chosen.docs, [[text] for text in texts], Settings())
    found = {m.name: estimate(m, [v[m.name] for v in values], 0) for m in chosen.task.metrics(Settings())}
    return {name: one.value for name, one in found.items() if one is not None}


@needs_extra
def test_an_agent_that_does_as_the_target_scores_one() -> None:
    from mswift.agent.conversation import write_reply
    from mswift.agent.formats import FORMATS

    agent = FORMATS["toolbench"]
    chosen = _steps("data/agent/toolbench/answer/G1_answer/57_ChatGPT_DFS_woFilter_w2.json")
    targets = [write_reply(doc["reply"], agent, doc["where"]) for doc in chosen.docs]
    assert len(targets) >= 3
    request = chosen.task.ask(chosen.docs[-1], [], Settings())
    assert request.messages[0]["content"].startswith("You are AutoGPT")
    assert request.opening.count("Observation:") >= 1  # the turn goes on behind its results
    ideal = {"plan_em": 1.0, "act_em": 1.0, "f1": 1.0, "hallu_rate": 0.0, "rouge_l": 1.0}
    assert _toolbench_scores(chosen, targets) == ideal
    lost = _toolbench_scores(chosen, ["I do not know."] * len(targets))
    assert lost == {**dict.fromkeys(ideal, 0.0), "plan_em": pytest.approx(1 - 1 / len(targets))}
    made_up = [step_text(target, agent, behind_results=False).replace("Action: ", "Action: my_") for target in targets]
    assert _toolbench_scores(chosen, made_up)["hallu_rate"] == 1


@pytest.mark.whole
@needs_vllm
def test_questions_longer_than_the_model_lose_their_beginning_and_are_scored_by_vllm(
    stories: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """vLLM writes the last token of a choice, so that prompt and choice fill its longest input and no more."""
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"question": "Tom had a dog. " * 200, "choices": ["dog", "big red ball"], "answer": 0}) + "\n"
    )
    flags = _flags(model=stories, eval_dataset=f"choices={tmp_path / 'rows.jsonl'}", eval_output_dir=tmp_path / "out")
    assert main(["eval", *flags, "--infer_backend", "vllm"]) == 0
    assert "without their beginning: choices: 1 prompts" in capfd.readouterr().out


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from mswift.config.eval import EvalConfig
    from mswift.eval.run import main as run

    for module in ("lm_eval", "lm_eval.tasks", "rouge_score", "sacrebleu.metrics", "sacrebleu"):
        monkeypatch.setitem(sys.modules, module, None)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\n')
    from mswift.eval import text

    for cached in (text._scorer, text._word_scorer, text._bleu):
        cached.cache_clear()
    config = EvalConfig(model="m", eval_dataset=(f"text={file}",), eval_output_dir=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"ROUGE needs the package rouge_score: pip install 'mswift\[eval\]'"):
        run(config)
    config = EvalConfig(
        model="m", eval_backend="lm_eval", eval_dataset=("arc_easy",), eval_output_dir=str(tmp_path / "o")
    )
    with pytest.raises(ConfigError, match=r"lm_eval needs the package lm_eval.*pip install 'mswift\[eval\]'"):
        run(config)
