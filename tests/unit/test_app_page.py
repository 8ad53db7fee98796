"""What the chat page makes of a model's text: elements of a short list, safe links, and otherwise text."""

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import page

pytestmark = page.needs_node


def _elements(tree: Any) -> Iterator[Any]:
    if isinstance(tree, list):
        yield tree
        for child in tree[2:]:
            yield from _elements(child)


def _check(tags: list[str], found: Any) -> None:
    for tag, attributes, *_ in list(_elements(found["tree"]))[1:]:
        assert tag in tags
        if tag == "a":
            assert re.match(r"(https?://[^/]|mailto:)", attributes["href"]), attributes
            assert attributes["title"] == attributes["href"]
            assert (attributes["target"], attributes["rel"]) == ("_blank", "noopener noreferrer nofollow")
        else:
            assert attributes == {}


def test_hostile_text_stays_text() -> None:
    told = page.run("render.mjs", page.HOSTILE)
    assert set(told["tags"]).isdisjoint({"script", "style", "img", "iframe", "svg", "object", "form", "input", "base"})
    for text, found in zip(page.HOSTILE, told["found"], strict=True):
        _check(told["tags"], found)
        for markup in re.findall(r"<[^>]*>", text):
            assert markup in found["text"]  # shown, as it was written


PIECES = (
    "**", "*", "_", "~~", "`", "```", "[", "](", ")", "\n", "\n\n", "> ", "- ", "1. ", "# ", "|", "|-|", " ", "\\",
    "<b>", "a", "é🙂", "https://a.example", "javascript:", "mailto:", "    ", "\t",
)  # fmt: skip


def test_any_text_becomes_known_elements_and_loses_no_letter() -> None:
    chosen = random.Random(5)
    texts = ["".join(chosen.choices(PIECES, k=chosen.randint(1, 40))) for _ in range(500)]
    told = page.run("render.mjs", texts)
    for text, found in zip(texts, told["found"], strict=True):
        _check(told["tags"], found)
        if "```" not in text and "](" not in text:  # a fence's first line and a link's address are not shown
            assert found["text"].count("é🙂") == text.count("é🙂")


def test_markdown_that_models_write() -> None:
    told = page.run("render.mjs", [
        "# Title\n\nSome **bold *both*** and `a <b>`; snake_case_word, 2 * 3 * 4.\nNext line\n",
        "- a\n- b\n  - c\n\n1. one\n2. two",
        "```python\nprint('<b>')\n\n# no heading\n```\nafter",
        "*a **b** c* ***d*** See [the *page*](https://a.example/x \"t\") or https://b.example/y.",
        "| a | b |\n|---|:-:|\n| 1 | **2** |\n\n> said\n\n---",
        "```\nhalf a fence",
    ])["found"]  # fmt: skip
    link = {"target": "_blank", "rel": "noopener noreferrer nofollow"}
    assert [one["tree"][2:] for one in told] == [
        [["h1", {}, "Title"],
         ["p", {}, "Some ", ["strong", {}, "bold ", ["em", {}, "both"]], " and ", ["code", {}, "a <b>"],
          "; snake_case_word, 2 * 3 * 4.", ["br", {}], "Next line"]],
        [["ul", {}, ["li", {}, "a"], ["li", {}, ["p", {}, "b"], ["ul", {}, ["li", {}, "c"]]]],
         ["ol", {}, ["li", {}, "one"], ["li", {}, "two"]]],
        [["pre", {}, ["code", {}, "print('<b>')\n\n# no heading"]], ["p", {}, "after"]],
        [["p", {}, ["em", {}, "a ", ["strong", {}, "b"], " c"], " ", ["strong", {}, ["em", {}, "d"]], " See ",
          ["a", {"href": "https://a.example/x", "title": "https://a.example/x", **link},
           "the ", ["em", {}, "page"]], " or ",
          ["a", {"href": "https://b.example/y", "title": "https://b.example/y", **link}, "https://b.example/y"], "."]],
        [["table", {}, ["thead", {}, ["tr", {}, ["th", {}, "a"], ["th", {}, "b"]]],
          ["tbody", {}, ["tr", {}, ["td", {}, "1"], ["td", {}, ["strong", {}, "2"]]]]],
         ["blockquote", {}, ["p", {}, "said"]], ["hr", {}]],
        [["pre", {}, ["code", {}, "half a fence"]]],
    ]  # fmt: skip


def test_long_texts_of_marks_take_no_time() -> None:
    """Twice the text takes at most about twice the time: 100,000 marks well below a second."""
    marks = [
        "*",
        "[",
        "`",
        "**a ",
        "> ",
        "- ",
        "_a",
        "[a](",
        "| a ",
        "# ",
        "- x\n",
        "1. a\n\n",
        "https://",
        "x\n",
        "|-|\n",
    ]
    texts = [mark * (100_000 // len(mark)) for mark in marks] + ["[" * 100_000 + "](x)", "#" + " " * 100_000 + "x"]
    for text, found in zip(texts, page.run("render.mjs", texts)["found"], strict=True):
        assert found["seconds"] < 1, text[:20]


@pytest.mark.parametrize("name", ["main", "chat", "stream", "markdown"])
def test_no_script_can_make_html_of_text(name: str) -> None:
    code = (page.PAGE / f"{name}.js").read_text()
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "srcdoc",
        ".src ",
    ):
        assert sink not in code
    html = (page.PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|javascript:|https?://", html)
