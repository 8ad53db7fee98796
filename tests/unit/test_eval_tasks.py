"""Files become questions: the usual ones read, wrong ones named; prompts as lm-evaluation-harness words them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mswift.agent.calls import to_json
from mswift.config.eval import EvalConfig
from mswift.errors import ConfigError, DataError
from mswift.eval import native
from mswift.eval.agents import step_text
from mswift.eval.catalog import TASKS, Chosen, choose
from mswift.eval.run import main
from mswift.eval.task import Choices, Settings
from mswift.infer.request import Request, Sampling
from tests.support.shared import shared_file

FILES = {
    "arc": ("data/eval/arc_challenge_200.jsonl", 200),
    "gsm8k": ("data/eval/gsm8k_test_200.jsonl", 200),
    "humaneval": ("data/eval/HumanEval.jsonl.gz", 164),
    "ifeval": ("data/eval/ifeval.jsonl", 541),
    "bfcl": ("data/agent/bfcl/simple_python_100.jsonl", 100),
}


def _chosen(name: str, file: str, **more: Any) -> Chosen:
    (found,) = choose([f"{name}={shared_file(file)}"], [], 0, None)
    return found


def _ask(name: str, row: int = 0, **settings: Any) -> Any:
    found = _chosen(name, FILES[name][0])
    return found.task.ask(found.docs[row], [], Settings(**settings))


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_read(name: str) -> None:
    file, count = FILES[name]
    found = _chosen(name, file)
    assert len(found.docs) == count
    assert native.num_questions([found], Settings()) >= count


def test_mmlu_is_one_file_or_a_folder() -> None:
    folder = shared_file("data/eval/mmlu")
    (all_subjects,) = choose([f"mmlu={folder}"], [], 0, None)
    subjects = {doc["subject"] for doc in all_subjects.docs}
    assert subjects == {"abstract algebra", "computer security", "high school us history", "professional law"}
    (shown,) = choose([f"mmlu={folder}"], [f"mmlu={folder}"], None, None)
    assert all(len(shown.examples_for(doc)) == 5 for doc in shown.docs)
    dev = folder / "abstract_algebra_dev.csv"
    (one,) = choose([f"mmlu={folder / 'abstract_algebra_test.csv'}"], [f"mmlu={dev}"], None, 2)
    asked = one.task.ask(one.docs[0], one.examples_for(one.docs[0]), Settings())
    assert isinstance(asked, Choices)
    head = "The following are multiple choice questions (with answers) about abstract algebra.\n\nFind all c in Z_3"
    assert str(asked.context).startswith(head)
    assert str(asked.context).count("\nAnswer:") == 6
    assert "such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: B\n\nStatement 1 |" in str(
        asked.context
    )
    assert asked.continuations == (" A", " B", " C", " D")
    (law,) = choose([f"mmlu={folder / 'professional_law_test.csv'}"], [f"mmlu={dev}"], None, 2)
    with pytest.raises(DataError, match="has 0 examples of professional law"):
        law.examples_for(law.docs[0])


def test_bbh_is_read() -> None:
    found = _chosen("bbh", "data/eval/bbh/boolean_expressions.json")
    assert found.task.ask(found.docs[0], found.docs[1:2], Settings()).prompt.startswith("Q: True and not not (")
    assert found.task.score is not None
    assert found.task.score(found.docs[:1], [[" False."]], Settings()) == [{"exact_match": 1.0}]


def test_choices_follow_a_space_or_the_chat_template() -> None:
    plain, chat = _ask("arc"), _ask("arc", use_chat_template=True)
    assert plain.context.startswith("Question: An astronomer observes that a planet rotates faster")
    assert plain.context.endswith("rotation?\nAnswer:")
    assert plain.continuations[2] == " Planetary days will become shorter."
    assert plain.gold == 2
    assert chat.context == ({"role": "user", "content": plain.context},)
    assert chat.continuations[2] == "Planetary days will become shorter."


def test_examples_precede_the_question(tmp_path: Path) -> None:
    train = shared_file("data/eval/gsm8k_train.jsonl")
    test = shared_file(FILES["gsm8k"][0])
    (found,) = choose([f"gsm8k={test}"], [f"gsm8k={train}"], None, 3)
    request = found.task.ask(found.docs[0], found.examples_for(found.docs[0]), Settings(max_new_tokens=7))
    assert isinstance(request, Request)
    prompt = str(request.prompt)
    assert prompt.count("Question: ") == 6
    assert prompt.startswith("Question: Natalia sold clips to 48 of her friends")
    assert "\n#### 72\n\nQuestion: Weng earns" in prompt
    assert prompt.endswith(
        "per fresh duck egg. How much in dollars does she make every day at the farmers' market?\nAnswer:"
    )
    assert request.sampling == Sampling(7, stop=("Question:", "</s>", "<|im_end|>"))
    with pytest.raises(
        ConfigError, match="5 examples precede each question; give their file, --fewshot_dataset gsm8k=FILE"
    ):
        choose([f"gsm8k={test}"], [], None, None)


def test_humaneval_answers_go_on_from_the_function() -> None:
    plain, chat = _ask("humaneval"), _ask("humaneval", use_chat_template=True)
    assert plain.prompt.startswith("from typing import List\n\n\ndef has_close_elements")
    assert "\ndef" in plain.sampling.stop
    assert chat.opening.endswith(plain.prompt)
    assert chat.sampling.stop[0] == "```"


def test_humaneval_counts_what_passes() -> None:
    found = _chosen("humaneval", FILES["humaneval"][0])
    docs = found.docs[:3]
    right = [doc["canonical_solution"] for doc in docs]
    assert found.task.score is not None
    settings = Settings(sampling=Sampling(n=4), pass_k=(1, 2))
    texts = [[right[0], "    pass\n", "    pass\n", "    pass\n"], [right[1]] * 4, ["    pass\n"] * 4]
    assert found.task.score(docs, texts, settings) == [
        {"pass@1": pytest.approx(0.25), "pass@2": pytest.approx(0.5)},
        {"pass@1": 1.0, "pass@2": 1.0},
        {"pass@1": 0.0, "pass@2": 0.0},
    ]
    with pytest.raises(ConfigError, match="--pass_k 1 2 needs --num_samples 2 or more"):
        found.task.check(Settings(pass_k=(1, 2)))


def test_a_call_that_is_the_answer_matches() -> None:
    found = _chosen("bfcl", FILES["bfcl"][0])
    request = found.task.ask(found.docs[0], [], Settings())
    assert isinstance(request, Request)
    assert request.messages is not None
    assert '"type": "object"' in request.messages[0]["content"]  # BFCL says dict
    assert found.task.score is not None
    call = {"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5}}
    texts = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>"]
    assert found.task.score(found.docs[:1], [texts], Settings()) == [{"ast_match": 1.0, "calls": 1.0}]
    call["arguments"] = {"base": 10}
    wrong = [[f"<tool_call>\n{json.dumps(call)}\n</tool_call>"], ["I would call calculate_triangle_area"]]
    assert found.task.score(found.docs[:1] * 2, wrong, Settings()) == [
        {"ast_match": 0.0, "calls": 1.0},
        {"ast_match": 0.0, "calls": 0.0},
    ]


def test_a_step_reads_alike_in_every_template() -> None:
    from mswift.agent.calls import Call, Reply
    from mswift.agent.formats import FORMATS

    reply = Reply("I look.", (Call("weather", {"city": "Bern"}),))
    wanted = f"Action: weather\nAction Input: {to_json({'city': 'Bern'})}"
    for name, agent in FORMATS.items():
        text = step_text(agent.write(reply, name), agent, behind_results=False)
        assert text.strip().endswith(wanted), name
        assert text.startswith("I look."), name


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("choices", '{"question": "q", "choices": ["a"], "answer": "B"}', "answer 'B' is none of 1 choices"),
        ("choices", '{"question": "q", "choices": ["a"], "answer": -1}', "answer -1 is none of 1 choices"),
        ("choices", '{"query": "q"}', r"needs question \(str\); it has query"),
        ("choices", "[1]", "line 1: list, not an object"),
        ("choices", "{", "line 1: not JSON"),
        ("choices", "", "no rows"),
        ("arc", '{"question": "q", "choices": {"text": [], "label": []}, "answerKey": "A"}', "answerKey A is none of"),
        ("gsm8k", '{"question": "q", "answer": "5"}', "no #### before its number"),
        ("mmlu", "a,b\n", "2 columns"),
        ("bbh", '{"input": "q", "target": 1}', r"needs input|needs target"),
        ("bfcl", '{"id": "1", "question": [[]], "function": []}', r"needs ground_truth \(list\)"),
    ],
)
def test_a_wrong_row_is_named(task: str, content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        choose([f"{task}={file}"], [], 0, None)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to ask": ({"model": "m"}, "--eval_dataset is required"),
    "no model": ({"eval_dataset": ("arc=f",)}, "--model or --eval_url is required"),
    "no task": ({"model": "m", "eval_dataset": ("arcs=FILE",)}, "no task arcs; the tasks are arc, mmlu, "),
    "no file named": ({"model": "m", "eval_dataset": ("arc",)}, "write TASK=FILE"),
    "no file": ({"model": "m", "eval_dataset": ("arc=none.jsonl",)}, "arc=none.jsonl: no such file"),
    "twice": ({"model": "m", "eval_dataset": ("text=FILE", "text=FILE")}, "text is given twice"),
    "limit": ({"model": "m", "eval_dataset": ("match=FILE",), "eval_limit": 0}, "--eval_limit 0"),
    "examples of nothing": (
        {"model": "m", "eval_dataset": ("match=FILE",), "fewshot_dataset": ("arc=FILE",)},
        "--eval_dataset has no arc",
    ),
    "samples": ({"model": "m", "eval_dataset": ("match=FILE",), "num_samples": 3}, "--num_samples 3 is for humaneval"),
    "native arguments": (
        {"model": "m", "eval_dataset": ("match=FILE",), "eval_args": ("a=b",)},
        "--eval_args are for the other backends",
    ),
    "a name without a server": (
        {"model": "m", "eval_dataset": ("match=FILE",), "served_model_name": "m"},
        "--served_model_name needs --eval_url",
    ),
    "adapters of a server": (
        {"eval_url": "http://x/v1", "adapters": ("a",), "eval_dataset": ("match=FILE",)},
        "--adapters with --eval_url",
    ),
    "one to compare": ({"compare": ("a",)}, "--compare takes two directories"),
    "compare and evaluate": ({"compare": ("a", "b"), "model": "m"}, "--compare evaluates nothing"),
    "batch": ({"model": "m", "eval_dataset": ("match=FILE",), "max_batch_size": 0}, "--max_batch_size 0"),
    "no model directory": ({"model": "no-such", "eval_dataset": ("match=FILE",)}, "no-such: no such directory"),
    "no address": ({"eval_url": "localhost:1", "eval_dataset": ("match=FILE",)}, "an address such as"),
    "nobody there": ({"eval_url": "http://127.0.0.1:9/v1", "eval_dataset": ("match=FILE",)}, "no answer from models"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_evaluated_is_refused(name: str, tmp_path: Path) -> None:
    given, message = REFUSALS[name]
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\n')
    for option in ("eval_dataset", "fewshot_dataset"):
        if option in given:
            given = {**given, option: tuple(text.replace("FILE", str(file)) for text in given[option])}
    with pytest.raises(ConfigError, match=message):
        main(EvalConfig(**given, eval_output_dir=str(tmp_path / "out")))


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds results already"):
        main(EvalConfig(model="m", eval_dataset=("arc=f",), eval_output_dir=str(tmp_path)))


def test_every_task_says_what_it_is() -> None:
    assert all(task.summary and task.metrics(Settings()) for task in TASKS.values())
