"""Rows of the usual evaluation files, in the shape that the Hugging Face hub and lm-evaluation-harness give them."""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mswift.errors import DataError

Doc = dict[str, Any]


def json_lines(path: Path) -> Iterator[tuple[str, Doc]]:
    """Objects of a JSON Lines file (also .gz), with where each stands. Raises DataError."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error})") from None
            if not isinstance(value, dict):
                raise DataError(f"{where}: {type(value).__name__}, not an object")
            yield where, value


def need(doc: Doc, where: str, **kinds: type | tuple[type, ...]) -> None:
    """DataError unless the row has these fields, of these types."""
    for name, kind in kinds.items():
        if not isinstance(doc.get(name), kind):
            wanted = "/".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            found = f"{name} is {doc[name]!r:.40}" if name in doc else f"it has {', '.join(doc) or 'nothing'}"
            raise DataError(f"{where}: a row of this task needs {name} ({wanted}); {found}")


def arc(path: Path) -> list[Doc]:
    """ARC, as AI2 publishes it or as on the hub: id, question, choices {text, label}, answerKey."""
    docs = []
    for where, row in json_lines(path):
        doc = dict(row)
        if isinstance(question := row.get("question"), dict):
            need(question, where, stem=str, choices=list)
            doc["question"] = question["stem"]
            doc["choices"] = {name: [choice[name] for choice in question["choices"]] for name in ("text", "label")}
        need(doc, where, question=str, choices=dict, answerKey=str)
        if doc["answerKey"] not in doc["choices"]["label"]:
            raise DataError(f"{where}: answerKey {doc['answerKey']} is none of {doc['choices']['label']}")
        docs.append(doc)
    return docs


def choices(path: Path) -> list[Doc]:
    """question, choices (texts), answer (number from 0, or the letter A, B, ...)."""
    docs = []
    for where, doc in json_lines(path):
        need(doc, where, question=str, choices=list, answer=(int, str))
        docs.append({**doc, "answer": _index(doc["answer"], len(doc["choices"]), where)})
    return docs


def mmlu(path: Path, ending: str = "test") -> list[Doc]:
    """MMLU's CSV files: one, or all *_test.csv of a folder. Rows: question, four choices, answer; a header may be."""
    files = sorted(path.glob(f"*_{ending}.csv")) if path.is_dir() else [path]
    docs: list[Doc] = []
    for file in files:
        subject = file.stem.rpartition("_")[0].replace("_", " ")
        with file.open(newline="", encoding="utf-8") as stream:
            for number, row in enumerate(csv.reader(stream), start=1):
                where = f"{file}, row {number}"
                if number == 1 and row[-1:] == ["answer"]:
                    continue
                if len(row) != 6:
                    raise DataError(f"{where}: {len(row)} columns; MMLU has question, four choices, answer")
                answer = _index(row[5], 4, where)
                docs.append({"question": row[0], "subject": subject, "choices": row[1:5], "answer": answer})
    return docs


def mmlu_examples(path: Path) -> list[Doc]:
    """One file, or all *_dev.csv of a folder."""
    return mmlu(path, "dev")


def _index(answer: int | str, count: int, where: str) -> int:
    index = ord(answer) - ord("A") if isinstance(answer, str) and len(answer) == 1 and answer.isalpha() else answer
    if not str(index).isdigit() or int(index) >= count:
        raise DataError(f"{where}: answer {answer!r} is none of {count} choices; write 0, 1, ... or A, B, ...")
    return int(index)


def gsm8k(path: Path) -> list[Doc]:
    """question, answer (with its steps; the number behind ####)."""
    docs = []
    for where, doc in json_lines(path):
        need(doc, where, question=str, answer=str)
        if "#### " not in doc["answer"]:
            raise DataError(f"{where}: the answer has no #### before its number")
        docs.append(doc)
    return docs


def bbh(path: Path) -> list[Doc]:
    """BIG-bench Hard's JSON (examples: input, target), or rows of input and target."""
    if path.suffix == ".json":
        try:
            examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no JSON object with examples ({error})") from None
        rows = [(f"{path}, example {number}", doc) for number, doc in enumerate(examples, start=1)]
    else:
        rows = list(json_lines(path))
    for where, doc in rows:
        need(doc, where, input=str, target=str)
    return [doc for _, doc in rows]


def pairs(path: Path) -> list[Doc]:
    """question, answer (a text, or several of which each is right)."""
    docs = []
    for where, doc in json_lines(path):
        need(doc, where, question=str, answer=(str, list))
        docs.append(doc)
    return docs


def humaneval(path: Path) -> list[Doc]:
    """task_id, prompt, entry_point, test."""
    docs = []
    for where, doc in json_lines(path):
        need(doc, where, task_id=str, prompt=str, entry_point=str, test=str)
        docs.append(doc)
    return docs


def ifeval(path: Path) -> list[Doc]:
    """key, prompt, instruction_id_list, kwargs."""
    docs = []
    for where, doc in json_lines(path):
        need(doc, where, key=int, prompt=str, instruction_id_list=list, kwargs=list)
        docs.append(doc)
    return docs
