"""Runs with new control tokens and a longer context: checkpoint, resume, export; what transformers and PEFT load."""

from pathlib import Path

import pytest
import torch

from tests.support.commands import command, make_home, mswift, run
from tests.support.runs import log
from tests.support.tiny import CHAT_TEMPLATE

NEW = ("<think>", "</think>", "<tool>")
YARN = '{"rope_type": "yarn", "factor": 4}'


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 rows whose tokenizer has 259 tokens."""
    return make_home(tmp_path_factory.mktemp("tokens"))


def test_a_full_run_saves_tokenizer_and_rows_and_continues(home: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    template, other = home / "a.jinja", home / "b.jinja"
    template.write_text(CHAT_TEMPLATE.replace("message.role == 'assistant'", "'assistant' == message.role"))
    other.write_text(CHAT_TEMPLATE.replace("<|im_end|>{% end", "!<|im_end|>{% end"))
    own = ["--chat_template", str(template)]
    flags = [*own, "--new_special_tokens", *NEW, "--save_steps", "2", "--rope_scaling", YARN]
    layout = ["--nproc_per_node", "2", "--tensor_model_parallel_size", "2", "--sequence_parallel"]
    said = run(command(home, "sft", home / "full", *flags, *layout, "--train_iters", "4"))
    assert "ids 259 to 261 of 300 rows" in said
    assert "mean of the rows" in said
    run(command(home, "sft", home / "half", *flags, *layout, "--train_iters", "2"))
    run(command(home, "sft", home / "half", *flags, *layout, "--train_iters", "4"))
    assert log(home / "half") == log(home / "full")
    changed = [*flags[2:], "--chat_template", str(other)]
    refused = command(home, "sft", home / "half", *changed, "--train_iters", "6")
    assert "the tokenised data differs" in run(refused, status=2)
    mswift("export", "--model", home / "full", "--output_dir", home / "full-hf")
    tokenizer = AutoTokenizer.from_pretrained(home / "full-hf")
    assert tokenizer.chat_template == template.read_text()
    assert tokenizer.convert_tokens_to_ids(list(NEW)) == [259, 260, 261]
    assert tokenizer("a<think>b", add_special_tokens=False)["input_ids"][1] == 259
    model = AutoModelForCausalLM.from_pretrained(home / "full-hf", dtype=torch.float32)
    assert model.config.max_position_embeddings == 1024
    assert model.config.rope_parameters["rope_type"] == "yarn"


def test_an_adapter_brings_its_tokens(home: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = [f"<new{i}>" for i in range(45)]  # 304 tokens, four more than rows
    flags = ["--tuner_type", "lora", "--new_special_tokens", *names, "--train_iters", "2"]
    run(command(home, "sft", home / "lora", *flags, "--val_dataset", str(home / "val.jsonl")))
    mswift("export", "--model", home / "lora", "--output_dir", home / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(home / "adapter")
    assert tokenizer.convert_tokens_to_ids(names) == list(range(259, 304))
    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    base.resize_token_embeddings(304)
    tuned = PeftModel.from_pretrained(base, home / "adapter")
    with torch.no_grad():
        rows = tuned.get_input_embeddings().weight
    assert rows.shape[0] == 304
    assert float(rows[303].norm()) > 0
