"""The chat page in a real browser before a real `mswift deploy`, with a model that writes nothing but hostile text."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import page
from tests.support.browser import Browser, needs_browser
from tests.support.deployed import Running
from tests.support.tiny import tiny_model

pytestmark = needs_browser


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model of random weights, each token of which is one of page.HOSTILE."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("hostile")
    words = ["<unk>", *(text for text in page.HOSTILE if "```" not in text)]  # a fence would take in all the rest
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(path)
    no_end: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    tiny_model(path, vocab_size=len(words), num_hidden_layers=2, max_position_embeddings=100_000, **no_end)
    server = Running("deploy", "--model", str(path), "--max_new_tokens", "90000")
    found = Running("app", "--url", server.url, "--system", "Be hostile.")
    yield found
    assert (found.stop()[0], server.stop()[0]) == (0, 0)


TAGS = "p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li a table thead tbody tr th td"
ANSWER = "document.querySelector('#log article:last-child div')"
WATCH = """
globalThis.seen = {violations: [], lengths: new Set(), errors: []};
document.addEventListener("securitypolicyviolation", (event) => seen.violations.push(event.violatedDirective));
addEventListener("error", (event) => seen.errors.push(String(event.message)));
new MutationObserver(() => {
  const last = document.querySelector("#log article.assistant:last-child div");
  if (last) seen.lengths.add(last.textContent.length);
}).observe(document, {subtree: true, childList: true, characterData: true});
"""
"""Runs before the page's own scripts."""


def test_a_conversation_in_a_browser(app: Running, tmp_path: Path) -> None:
    """Typed and clicked: it streams, hostile text stays text, Stop stops, Clear clears, nothing else is called."""
    with Browser(tmp_path) as browser:
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        browser.open(app.url + "/")
        browser.until("document.querySelector('#system').value === 'Be hostile.'")
        assert browser.value("document.querySelector('#model').options.length") == 1
        browser.write("#max_tokens", "300")
        browser.write("#temperature", "100")
        browser.write("#seed", "3")
        browser.write("#prompt", "<b>Hello</b>")
        browser.press_enter()
        browser.until("document.querySelector('#status').textContent === 'cut: max_tokens'")
        assert browser.value("document.querySelector('#log article.user div').innerHTML") == "&lt;b&gt;Hello&lt;/b&gt;"
        if place := os.environ.get("MSWIFT_SCREENSHOTS"):
            Path(place, "hostile.png").write_bytes(browser.screenshot())
        _stayed_text(browser)
        assert browser.value("seen.lengths.size") > 3  # it came in pieces

        browser.write("#max_tokens", "90000")
        browser.write("#prompt", "More")
        browser.click("#send")
        browser.until(f"document.querySelectorAll('#log article').length === 4 && {ANSWER}.textContent.length > 1500")
        browser.click("#stop")
        browser.until("document.querySelector('#status').textContent === 'stopped'")
        assert not browser.value("document.querySelector('#send').disabled")
        _stayed_text(browser)
        browser.click("#clear")
        browser.until("document.querySelectorAll('#log article').length === 0")

        assert browser.value("[seen.violations, seen.errors]") == [[], []]
        asked = {
            event["params"]["request"]["url"]
            for event in browser.events
            if event["method"] == "Network.requestWillBeSent"
        }
        assert all(url.startswith(app.url + "/") for url in asked), asked
        assert f"{app.url}/v1/chat/completions" in asked
        bad = ("Page.javascriptDialogOpening", "Runtime.exceptionThrown", "Log.entryAdded")
        assert [event["params"] for event in browser.events if event["method"] in bad] == []


def _stayed_text(browser: Browser) -> None:
    """Elements of the last answer are of the short list; what looks like markup is to be read."""
    script = """[...ANSWER.querySelectorAll("*")].map((one) => [one.localName, ...one.getAttributeNames(),
        one.localName === "a" ? new URL(one.href).protocol : ""])"""
    found = browser.value(script.replace("ANSWER", ANSWER))
    assert len(found) > 3
    for tag, *attributes, protocol in found:
        assert tag in TAGS.split()
        if tag == "a":
            assert sorted(attributes) == ["href", "rel", "target", "title"]
            assert protocol in ("http:", "https:", "mailto:")
        else:
            assert attributes == []
    text = browser.value(f"{ANSWER}.textContent")
    assert sum(text.count(markup) for markup in ("<script>", "onerror=", "<style>", "<iframe")) > 3
