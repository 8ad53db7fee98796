"""--agent_template with a tokenizer: what is trained, against chat templates that write tools themselves; and infer."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.agent.formats import FORMATS
from mswift.cli.main import main
from mswift.data.dataset import DataOptions, build_dataset
from mswift.data.loss_scale import parse_loss_scale
from mswift.data.rows import to_conversation
from mswift.data.spans import tokenize
from mswift.data.template import ChatTemplate
from mswift.data.tokenizer import load_tokenizer
from mswift.errors import DataError
from tests.support import chat_templates
from tests.support.shared import shared_file
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.unit.test_agent import TALK, TOOL, call, shared_rows

ROW = {"messages": TALK, "tools": [TOOL]}
END = "<|im_end|>"


@pytest.fixture(scope="module")
def qwen() -> Any:
    return load_tokenizer(shared_file("data/tokenizers/qwen2-8k"))


def samples(tokenizer: Any, row: dict[str, Any], agent: str | None, loss_scale: str = "default") -> list[Any]:
    conversation = to_conversation(row, "row", agent=FORMATS[agent] if agent else None)
    renderings = ChatTemplate(tokenizer, parse_loss_scale(loss_scale)).render(conversation, "row")
    return tokenize(tokenizer, renderings, ["row"] * len(renderings))


def learned(tokenizer: Any, sample: Any) -> list[tuple[str, float]]:
    """Texts of the runs of tokens with one weight, and the weight."""
    weights = sample.loss_weights
    edges = [0, *(np.flatnonzero(np.diff(weights)) + 1), len(weights)]
    runs = [(tokenizer.decode(sample.tokens[a:b]), float(weights[a])) for a, b in pairwise(edges)]
    return [(text, weight) for text, weight in runs if weight]


@pytest.mark.parametrize("file", ["sft/glaive_toolcall_en_demo.json", "agent/toolbench/answer"])
def test_hermes_is_what_the_template_of_qwen_writes(qwen: Any, file: str) -> None:
    """Every token and weight is that of the chat template with the tools, which transformers renders."""
    rows = [*shared_rows(file)[::7], ROW]
    for row in rows:
        (by_agent,), (by_template,) = samples(qwen, row, "hermes"), samples(qwen, row, None)
        if to_conversation(row, "row").tools is not None:
            assert by_agent.tokens.tolist() == by_template.tokens.tolist()
            assert by_agent.loss_weights.tolist() == by_template.loss_weights.tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_the_learned_tokens_are_what_the_assistant_writes(qwen: Any, name: str) -> None:
    """Results are never learned; each learned run but the last ends where its result is given, or its turn ends."""
    agent = FORMATS[name]
    for row in [ROW, *shared_rows("sft/glaive_toolcall_en_demo.json")[::29], *shared_rows("agent/toolbench/answer")]:
        (sample,) = samples(qwen, row, name)
        messages = to_conversation(row, "row", agent=agent).messages
        wanted = []
        for message in messages:
            if message["role"] == "assistant":
                parts = message.get("parts", [(message["content"], 1.0)])
                runs = [text for text, weight in parts if weight]
                wanted += [*runs[:-1], runs[-1] + (END if parts[-1][1] else "")]
        assert [text for text, _ in learned(qwen, sample)] == wanted
        assert sum(len(json.dumps(text)) for text in wanted) > 0


def test_a_prompt_of_inference_gives_the_tokens_that_were_trained(qwen: Any) -> None:
    for name in ("react_zh", "qwen_en"):
        (sample,) = samples(qwen, ROW, name)
        messages = to_conversation(ROW, "row", agent=FORMATS[name]).messages
        prompt = qwen.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        prompt += "".join(text for text, _ in messages[-1]["parts"][:-1])
        ids = qwen([prompt], add_special_tokens=False)["input_ids"][0]
        assert sample.tokens[: len(ids)].tolist() == ids
        assert sample.loss_weights[len(ids)] == 1
        assert sample.loss_weights[len(ids) - 1] == 0


def test_weights_of_tables_and_of_messages_stay(qwen: Any) -> None:
    (sample,) = samples(qwen, ROW, "react_en", "react")
    call_text = 'I look.\nAction: get_weather\nAction Input: {"city": "Bern"}\nObservation:'
    said = [("I look.\n", 1), (call_text.removeprefix("I look.\n"), 2), ("17 °C." + END, 1)]
    assert learned(qwen, sample) == said
    half = [*TALK[:2], {**TALK[2], "loss": False}, TALK[3], {**TALK[4], "loss_scale": 0.5}]
    (sample,) = samples(qwen, {"messages": half, "tools": [TOOL]}, "qwen_en")
    assert learned(qwen, sample) == [(": 17 °C." + END, 0.5)]
    more = [*TALK, {"role": "user", "content": "And?"}, TALK[2], TALK[3], TALK[4]]
    (sample,) = samples(qwen, {"messages": more, "tools": [TOOL]}, "hermes", "last_round")
    assert [text for text, _ in learned(qwen, sample)][-1] == "17 °C." + END
    assert len(learned(qwen, sample)) == 2  # the call of the last round too: its result is no question


def test_results_inside_a_turn_that_the_template_changes_are_refused(
    qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        qwen, "chat_template", chat_templates.PLAIN.replace("m.content", "m.content | replace(' ', '  ')")
    )
    with pytest.raises(DataError, match="row, message 3: the chat template changes the text of this turn.*hermes"):
        samples(qwen, ROW, "react_en")
    assert samples(qwen, {"messages": TALK[1:2] + TALK[4:]}, "react_en")


def test_the_template_decides_the_cache_entry(qwen: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    found = {
        build_dataset(
            "sft", [str(tmp_path / "a.jsonl")], qwen, DataOptions(1024, agent_template=name, cache_dir=tmp_path),
            is_writer=True, barrier=lambda: None, progress=False,
        ).fingerprint
        for name in (None, "react_en", "qwen_en")
    }  # fmt: skip
    assert len(found) == len(list((tmp_path / "tokens").iterdir())) == 3


def test_show_and_infer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    tiny_tokenizer(model)
    tiny_model(model, num_hidden_layers=1, vocab_size=259, bos_token_id=None, max_position_embeddings=4096)
    rows = [
        ROW,
        {"messages": TALK[:4], "tools": [TOOL]},
        {"messages": TALK[:3], "tools": [TOOL]},
        {"messages": TALK[1:2]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "a.jsonl")
    assert main(["data", "show", "--model", str(model), "--dataset", data, "--agent_template", "react_en"]) == 0
    shown = capsys.readouterr().out
    assert 'Action Input: {"city": "Bern"}\nObservation:⟧ 17 °C\n⟦17 °C.<|im_end|>⟧' in shown
    asked = ["infer", "--model", str(model), "--max_new_tokens", "2", "--agent_template", "qwen_zh"]
    assert main([*asked, "--val_dataset", data, "--result_path", str(tmp_path / "r.jsonl")]) == 0
    first, second, third, plain = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert first["messages"] == second["messages"]
    assert first["messages"][-1]["content"].endswith("✿RESULT✿: 17 °C\n✿RETURN✿")
    assert first["response"] == second["response"] == first["content"]
    assert (first["label"], first["tool_calls"]) == ("17 °C.", [])
    assert third["messages"][-1]["role"] == "user"
    assert third["label"].endswith('✿ARGS✿: {"city": "Bern"}\n✿RESULT✿')
    assert "tool_calls" not in plain
    capsys.readouterr()
    assert main([*asked, "--prompt", "hi"]) == 2
    assert "--agent_template qwen_zh is for the tools of rows" in capsys.readouterr().err


def test_calls_in_the_results_of_infer() -> None:
    from mswift.infer.request import Completion, Request
    from mswift.infer.results import to_json
    from mswift.infer.rows import Row

    row = Row("row 1", ({"role": "user", "content": "q"},), None, None, None, FORMATS["hermes"])
    text = FORMATS["hermes"].write(
        FORMATS["hermes"].read('<tool_call>{"name": "f", "arguments": {"a": "é"}}</tool_call>'), ""
    )
    for said, content, calls, problem in (
        (text, "", [{"name": "f", "arguments": {"a": "é"}}], None),
        (text[:-3], text[:-3], [], "<tool_call> without </tool_call> behind its JSON"),
    ):
        line = json.loads(to_json(row, Request(messages=row.messages), Completion(said, "stop", 1, 1), "0"))
        assert (line["response"], line["content"], line["tool_calls"]) == (said, content, calls)
        assert line.get("tool_call_problem") == problem
    assert call("f")["function"] == {"name": "f", "arguments": {}}
