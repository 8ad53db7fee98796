"""--rope_scaling, --max_model_len, --new_special_tokens: what is trained and written is what transformers reads.

fp32, against transformers with the config.json that was written: at most 1e-5 apart (max|a - b| / max|b|).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mswift.config.train import SftConfig
from mswift.converters.longer import longer
from mswift.converters.reader import WeightReader
from mswift.errors import ConfigError
from mswift.train.inputs import open_model
from mswift.train.new_tokens import GrownReader, new_tokens
from tests.support.ranks import join, run_ranks
from tests.support.tiny import tiny_model, tiny_tokenizer

TOLERANCE = 1e-5
YARN = '{"rope_type": "yarn", "factor": 4}'


def on_rank(payload: dict[str, Any]) -> Any:
    """Logits of the model of a training command."""
    dims, device = join(payload["world_size"], **payload["layout"])
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine

    reader = open_model(payload["config"], Path(payload["config"].model))
    engine = MegatronEngine(reader.table, dims, EngineConfig(), device)
    engine.load_weights(reader)
    logits = engine.logits(payload["tokens"]).numpy()
    engine.close()
    return logits


def apart(config: SftConfig, exported: Path, tokens: torch.Tensor, world_size: int = 1, **layout: Any) -> float:
    """Between our logits and those of transformers for the directory `exported`."""
    from transformers import AutoModelForCausalLM

    payload = {"config": config, "tokens": tokens, "world_size": world_size, "layout": layout}
    found = run_ranks(world_size, on_rank, payload)[0]
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        truth = model(tokens).logits.numpy()
    assert found.shape == truth.shape
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def with_side_files(config: SftConfig, target: Path) -> Path:
    """The model's weights with the config.json that a run writes."""
    target.mkdir()
    for name, data in open_model(config, Path(config.model)).side_files().items():
        (target / name).write_bytes(data)
    (target / "model.safetensors").write_bytes((Path(config.model) / "model.safetensors").read_bytes())
    return target


@pytest.mark.parametrize(
    ("model_type", "flags"),
    [
        ("qwen3", {"rope_scaling": YARN}),
        ("llama", {"rope_scaling": "yarn", "max_model_len": 200}),
        ("qwen3", {"rope_scaling": '{"type": "linear", "factor": 3.0}', "max_model_len": 180}),
        ("llama", {"max_model_len": 300}),
    ],
)
def test_a_longer_model_is_that_of_transformers(tmp_path: Path, model_type: str, flags: dict[str, Any]) -> None:
    tiny_model(tmp_path / "model", model_type, max_position_embeddings=64)
    config = SftConfig(model=str(tmp_path / "model"), **flags)
    exported = with_side_files(config, tmp_path / "exported")
    written = json.loads((exported / "config.json").read_text())
    reach = {YARN: 256}.get(str(flags.get("rope_scaling")), flags.get("max_model_len"))
    assert written["max_position_embeddings"] == reach
    if "rope_scaling" in flags:
        for field in ("rope_parameters", "rope_scaling"):  # transformers 5; transformers 4 and vLLM
            assert written[field]["factor"] > 1
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    tokens = torch.randint(0, 300, (1, 160), generator=torch.Generator().manual_seed(1))
    assert apart(config, exported, tokens) <= TOLERANCE
    assert WeightReader(exported).table.spec == open_model(config, Path(config.model)).table.spec
    if "rope_scaling" in flags:
        assert apart(SftConfig(model=str(tmp_path / "model")), exported, tokens) > 100 * TOLERANCE


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("scaling", "length", "words"),
    [
        (YARN, 300, "--max_model_len 300 is beyond .* 64 positions of the model x factor 4 = 256; use factor 5"),
        ("yarn", None, "--rope_scaling yarn needs --max_model_len"),
        ("{", None, "is not JSON"),
        ("[4]", None, "no JSON object"),
        ('{"rope_type": "dynamic", "factor": 2}', None, "rope_type 'dynamic' is not one of linear, yarn, llama3"),
        ('{"rope_type": "yarn"}', None, "factor None must be a number"),
        ('{"rope_type": "yarn", "factor": 0.5}', None, "factor 0.5 must be a number"),
        ('{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32}', None, "32 is not .* 64"),
        ('{"rope_type": "yarn", "factor": 4, "beta": 3}', None, r"unknown \['beta'\]"),
    ],
)
def test_a_scaling_that_is_wrong_is_refused(scaling: str, length: int | None, words: str) -> None:
    assert longer(CONFIG, YARN, None)["max_position_embeddings"] == 256
    with pytest.raises(ConfigError, match=words):
        longer(CONFIG, scaling, length)


def test_a_scaling_of_the_same_kind_goes_on() -> None:
    """Its factor is replaced, and the positions are counted from where the model was trained first."""
    own = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 20.0}
    changes = longer(CONFIG | {"rope_scaling": own, "rope_theta": 5e5}, YARN, None)
    assert changes["rope_scaling"] == own | {"factor": 4, "rope_theta": 5e5}
    assert (changes["max_position_embeddings"], changes["rope_theta"]) == (128, 5e5)


def test_several_ropes_and_windows_are_refused() -> None:
    positions = CONFIG | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    positions |= {"rope_scaling": long, "original_max_position_embeddings": 64, "max_position_embeddings": 128}
    with pytest.raises(ConfigError, match="computes otherwise with other max_position_embeddings"):
        longer(positions, None, 256)
    with pytest.raises(ConfigError, match="rope_type 'longrope' already"):
        longer(positions, YARN, None)


# -- new tokens

NEW = ("<think>", "</think>", "<tool>")


@pytest.mark.parametrize("rows", [259, 261, 300])
def test_rows_of_new_tokens_are_the_mean_of_the_others(tmp_path: Path, rows: int) -> None:
    """As transformers has them after resize_token_embeddings, but for the three rows, which are the mean."""
    model = tiny_model(tmp_path / "model", vocab_size=rows)
    tiny_tokenizer(tmp_path / "model")
    config = SftConfig(model=str(tmp_path / "model"), new_special_tokens=NEW)
    reader = open_model(config, Path(config.model))
    assert isinstance(reader, GrownReader)
    assert (reader.tokens.first_id, reader.tokens.end, reader.table.spec.vocab_size) == (259, 262, max(rows, 262))
    model.resize_token_embeddings(max(rows, 262))
    with torch.no_grad():
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            matrix[259:262] = matrix[:259].double().mean(dim=0).float()
    model.save_pretrained(tmp_path / "resized")
    assert json.loads(reader.side_files()["config.json"])["vocab_size"] == max(rows, 262)
    tokens = torch.randint(250, 262, (2, 24), generator=torch.Generator().manual_seed(2))
    assert apart(config, tmp_path / "resized", tokens) <= TOLERANCE
    if rows == 261:
        assert apart(config, tmp_path / "resized", tokens, 2, tp=2) <= TOLERANCE  # 262 rows, cut and not padded


def test_tokens_come_from_a_file_and_known_ones_are_not_new(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / "tokens.txt").write_text("<a>\n\n<b>\n")
    found = new_tokens(tmp_path, [str(tmp_path / "tokens.txt"), "<|im_start|>"])
    assert found is not None
    assert (found.names, found.first_id) == (("<a>", "<b>"), 259)
    assert new_tokens(tmp_path, ["<|im_start|>"]) is None
    for given, words in ((["<a>", "<a>"], "given 2 times"), ([" "], "is empty"), (["no.txt"], "no such file")):
        with pytest.raises(ConfigError, match=words):
            new_tokens(tmp_path, given)
    with pytest.raises(ConfigError, match="needs a tokenizer.json"):
        new_tokens(tmp_path / "absent", ["<a>"])
