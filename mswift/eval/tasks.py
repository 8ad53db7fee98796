"""The tasks of the usual files: multiple choice, numbers, texts and programs. Torch-free.

Prompts, stops and numbers of examples are lm-evaluation-harness 0.4.13's, so that scores compare with published ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mswift.errors import ConfigError
from mswift.eval import answers, documents, ifeval, sandbox, text
from mswift.eval.documents import Doc
from mswift.eval.statistics import Metric
from mswift.eval.task import Choices, Settings, Task, Values, sampled, user
from mswift.infer.request import Request, Sampling


def _ratio(*names: str, binary: bool = True, **more: Any) -> Callable[[Settings], tuple[Metric, ...]]:
    return lambda settings: tuple(Metric(name, binary=binary, **more) for name in names)


def _context(head: str, shown: Sequence[tuple[str, str]], question: str) -> str:
    """Examples and the question, as text: "question target", a blank line between."""
    return head + "".join(f"{asked} {target}\n\n" for asked, target in shown) + question


@dataclass(frozen=True)
class _Choice:
    """Multiple choice: each choice, behind a space, is a continuation of the question."""

    question: Callable[[Doc], str]
    choices: Callable[[Doc], Sequence[str]]
    gold: Callable[[Doc], int]
    head: Callable[[Doc], str] = lambda doc: ""

    def __call__(self, doc: Doc, examples: Sequence[Doc], settings: Settings) -> Choices:
        shown = [(self.question(one), self.choices(one)[self.gold(one)]) for one in examples]
        context = _context(self.head(doc), shown, self.question(doc))
        if settings.use_chat_template:
            return Choices(user(context), tuple(self.choices(doc)), self.gold(doc))
        return Choices(context, tuple(f" {choice}" for choice in self.choices(doc)), self.gold(doc))


@dataclass(frozen=True)
class _Generate:
    """A text to continue (or, with a chat template, to answer) up to one of the stops."""

    question: Callable[[Doc], str]
    target: Callable[[Doc], str]
    sampling: Sampling
    opening: Callable[[Doc], str] | None = None
    """With a chat template: how the answer begins."""
    chat_question: Callable[[Doc], str] | None = None
    chat_stop: tuple[str, ...] | None = None

    def __call__(self, doc: Doc, examples: Sequence[Doc], settings: Settings) -> Request:
        sampling = sampled(self.sampling, settings)
        shown = [(self.question(one), self.target(one)) for one in examples]
        if not settings.use_chat_template:
            return Request(prompt=_context("", shown, self.question(doc)), sampling=sampling)
        asked = self.chat_question(doc) if self.chat_question else _context("", shown, self.question(doc))
        if self.chat_stop is not None:
            sampling = replace(sampling, stop=self.chat_stop)
        return Request(messages=user(asked), opening=self.opening(doc) if self.opening else "", sampling=sampling)


def _each(score: Callable[[Doc, str], Values]) -> Callable[..., list[Values]]:
    """Scores of the first answer to each row."""
    return lambda docs, texts, settings: [score(doc, given[0]) for doc, given in zip(docs, texts, strict=True)]


def _gsm8k(doc: Doc, answer: str) -> Values:
    numbers = {"strict": answers.strict_number(answer), "flexible": answers.flexible_number(answer)}
    return {f"exact_match_{name}": answers.same_number(number, doc["answer"]) for name, number in numbers.items()}


def _references(doc: Doc) -> list[str]:
    return [doc["answer"]] if isinstance(doc["answer"], str) else list(doc["answer"])


def _text_scores(doc: Doc, answer: str) -> Values:
    references = _references(doc)
    rouges = [text.rouge(answer.strip(), reference) for reference in references]
    best: Values = {name: max(found[name] for found in rouges) for name in rouges[0]}
    return {**best, "bleu": text.bleu_stats(answer.strip(), references)}


def _text_metrics(settings: Settings) -> tuple[Metric, ...]:
    return (*(Metric(name) for name in ("rouge1", "rouge2", "rouge_l")), Metric("bleu", kind="bleu", highest=100.0))


def _programs(doc: Doc, answer: str) -> str:
    return f"{doc['prompt']}{answer}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def _humaneval(docs: Sequence[Doc], texts: Sequence[Sequence[str]], settings: Settings) -> list[Values]:
    programs = [_programs(doc, answer) for doc, given in zip(docs, texts, strict=True) for answer in given]
    verdicts = iter(sandbox.run_all(programs, settings.sandbox))
    values: list[Values] = []
    for given in texts:
        passed = sum(next(verdicts).passed for _ in given)
        values.append({f"pass@{k}": answers.pass_at_k(len(given), passed, k) for k in settings.pass_k})
    return values


def _check_humaneval(settings: Settings) -> None:
    num_samples = settings.sampling.n if settings.sampling else 1
    if max(settings.pass_k) > num_samples or min(settings.pass_k) < 1:
        raise ConfigError(
            f"--pass_k {' '.join(map(str, settings.pass_k))} needs --num_samples {max(settings.pass_k)} or more, and "
            f"{num_samples} answers are written to a problem"
        )
    sandbox.check(settings.sandbox)


def _pass_metrics(settings: Settings) -> tuple[Metric, ...]:
    one = settings.sampling is None or settings.sampling.n == 1
    return tuple(Metric(f"pass@{k}", binary=one) for k in settings.pass_k)


def _need_text_libraries(settings: Settings) -> None:
    text.rouge("", "")
    text.bleu_stats("", [""])


_CODE_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_LETTERS = ("A", "B", "C", "D")

LIBRARY_TASKS = (
    Task(
        "arc",
        "ARC, easy or challenge: JSON Lines as AI2 or the hub gives them",
        documents.arc,
        _ratio("acc", "acc_norm", "acc_bytes"),
        _Choice(
            lambda doc: f"Question: {doc['question']}\nAnswer:",
            lambda doc: doc["choices"]["text"],
            lambda doc: doc["choices"]["label"].index(doc["answerKey"]),
        ),
    ),
    Task(
        "mmlu",
        "MMLU: a CSV file, or a folder of *_test.csv",
        documents.mmlu,
        _ratio("acc"),
        _Choice(
            lambda doc: (
                f"{doc['question'].strip()}\n"
                + "".join(f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, doc["choices"], strict=True))
                + "Answer:"
            ),
            lambda doc: _LETTERS,
            lambda doc: doc["answer"],
            lambda doc: f"The following are multiple choice questions (with answers) about {doc['subject']}.\n\n",
        ),
        num_fewshot=5,
        example_of=lambda doc: doc["subject"],
        read_examples=documents.mmlu_examples,
    ),
    Task(
        "choices",
        "any multiple choice: JSON Lines of question, choices, answer (0, 1, ... or A, B, ...)",
        documents.choices,
        _ratio("acc", "acc_norm", "acc_bytes"),
        _Choice(
            lambda doc: f"Question: {doc['question']}\nAnswer:", lambda doc: doc["choices"], lambda doc: doc["answer"]
        ),
    ),
    Task(
        "gsm8k",
        "GSM8K: JSON Lines of question, answer",
        documents.gsm8k,
        _ratio("exact_match_strict", "exact_match_flexible"),
        _Generate(
            lambda doc: f"Question: {doc['question']}\nAnswer:",
            lambda doc: doc["answer"],
            Sampling(256, stop=("Question:", "</s>", "<|im_end|>")),
        ),
        _each(_gsm8k),
        num_fewshot=5,
    ),
    Task(
        "bbh",
        "BIG-bench Hard: its JSON, or JSON Lines of input, target",
        documents.bbh,
        _ratio("exact_match"),
        _Generate(
            lambda doc: f"Q: {doc['input']}\nA:",
            lambda doc: doc["target"],
            Sampling(64, stop=("</s>", "Q:", "<|im_end|>", "\n\n")),
        ),
        _each(lambda doc, answer: {"exact_match": answers.same_text(answer, doc["target"])}),
        num_fewshot=3,
    ),
    Task(
        "match",
        "any exact match: JSON Lines of question, answer (or several); case and punctuation aside",
        documents.pairs,
        _ratio("exact_match"),
        _Generate(
            lambda doc: f"Question: {doc['question']}\nAnswer:",
            lambda doc: _references(doc)[0],
            Sampling(64, stop=("\n",)),
            chat_question=lambda doc: str(doc["question"]),
            chat_stop=(),
        ),
        _each(lambda doc, answer: {"exact_match": max(answers.same_text(answer, one) for one in _references(doc))}),
    ),
    Task(
        "text",
        "ROUGE and BLEU against references: JSON Lines of question, answer (or several)",
        documents.pairs,
        _text_metrics,
        _Generate(lambda doc: str(doc["question"]), lambda doc: _references(doc)[0], Sampling(256)),
        _each(_text_scores),
        check=_need_text_libraries,
    ),
    Task(
        "humaneval",
        "HumanEval: its JSON Lines (.gz); programs run confined",
        documents.humaneval,
        _pass_metrics,
        _Generate(
            lambda doc: str(doc["prompt"]),
            lambda doc: str(doc["canonical_solution"]),
            Sampling(512, stop=_CODE_ENDS),
            opening=lambda doc: f"Here is the completed function:\n```python\n{doc['prompt']}",
            chat_question=lambda doc: (
                "Write a solution to the following problem and make sure that it passes the "
                f"tests:\n```python\n{doc['prompt']}\n```\n"
            ),
            chat_stop=("```", "\nclass", "\nif __name__", "\nprint"),
        ),
        _humaneval,
        check=_check_humaneval,
    ),
    Task(
        "ifeval",
        "IFEval: its JSON Lines; the checks are lm-eval's",
        documents.ifeval,
        ifeval.metrics,
        _Generate(lambda doc: str(doc["prompt"]), lambda doc: "", Sampling(1280)),
        _each(ifeval.values),
        check_docs=ifeval.check,
    ),
)
