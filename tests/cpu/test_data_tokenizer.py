"""Tokenizers: published vectors, the end token by rendering, and the warning about untrained rows."""

import json

import numpy as np
import pytest

from mswift.data.tokenizer import (
    encode,
    end_token_id,
    load_tokenizer,
    pad_token_id,
    tokens_used_by_template,
    untrained_token_warning,
)
from mswift.errors import ConfigError
from tests.support.shared import shared_file


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(shared_file("data/tokenizers/qwen2-8k"))


def test_the_published_vectors():
    tokenizer = load_tokenizer(shared_file("data/tokenizers/qwen2-151k"))
    vectors = shared_file("data/tokenizers/vectors")
    texts = (vectors / "qwen2.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(word) for word in line.split()] for line in (vectors / "qwen2.out").read_text().split("\n")]
    assert len(texts) >= 47
    assert encode(tokenizer, texts) == ids[: len(texts)]


def test_the_end_token_is_the_templates_own(qwen):
    assert qwen.convert_ids_to_tokens(end_token_id(qwen)) == "<|im_end|>"
    assert qwen.convert_ids_to_tokens(pad_token_id(qwen)) == "<|endoftext|>"


def test_without_a_template_the_end_token_is_eos():
    tokenizer = load_tokenizer(shared_file("data/weights/stories260K-hf"))
    assert tokenizer.convert_ids_to_tokens(end_token_id(tokenizer)) == "</s>"
    assert tokens_used_by_template(tokenizer) == []


def test_a_template_that_ends_with_another_token_than_eos(tmp_path):
    tokenizer = _copy(tmp_path, eos_token="<|endoftext|>")
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(end_token_id(tokenizer)) == "<|im_end|>"


def test_a_tokenizer_without_any_end_token_names_the_remedy(tmp_path):
    tokenizer = _copy(tmp_path, eos_token=None)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match='has no end token.*tokenizer_config.json: "eos_token": "<|endoftext|>"'):
        end_token_id(tokenizer)
    assert end_token_id(_copy(tmp_path, eos_token="<|endoftext|>")) is not None


def _copy(folder, **changes):
    source = shared_file("data/tokenizers/qwen2-8k")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return load_tokenizer(folder)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="--model .*absent: there is no such folder"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"no tokenizer .*; copy tokenizer.json and tokenizer_config.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"The folder holds config.json, tokenizer.json; copy tokenizer.json"):
        load_tokenizer(tmp_path)
    assert len(_copy(tmp_path)) == 7926


def test_untrained_rows_are_named_with_the_flag(qwen):
    norms = np.random.default_rng(0).uniform(0.6, 1.4, size=len(qwen))
    assert untrained_token_warning(norms, qwen) is None
    start, end, unused = (qwen.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<|image_pad|>"))
    norms[[start, end]], norms[unused] = (0.01, 0.3), 0.0
    warning = untrained_token_warning(norms, qwen)
    assert f"'<|im_start|>' (id {start}, norm 0.01)" in warning
    assert f"'<|im_end|>' (id {end}, norm 0.3)" in warning
    assert "image_pad" not in warning
    assert "--modules_to_save embed_tokens lm_head" in warning


def test_no_row_of_a_trained_model_is_called_untrained():
    """The threshold against real weights: every row of stories260K (its weakest has 0.54 of the median norm)."""
    from safetensors.numpy import load_file

    rows = load_file(shared_file("data/weights/stories260K-hf/model.safetensors"))["model.embed_tokens.weight"]
    norms = np.linalg.norm(rows, axis=1)
    tokenizer = load_tokenizer(shared_file("data/weights/stories260K-hf"))
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    assert {1, 2} <= set(tokens_used_by_template(tokenizer))
    assert untrained_token_warning(norms, tokenizer) is None
    assert norms.min() / np.median(norms) == pytest.approx(0.536, abs=1e-3)
    norms[2] /= 5
    assert "'</s>' (id 2" in untrained_token_warning(norms, tokenizer)
