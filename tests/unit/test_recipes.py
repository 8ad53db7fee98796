"""Every recipe in configs/ runs as it is: strict load, and a dry run on a real model's shape without a refusal."""

import json
from pathlib import Path

import pytest

from mswift.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=[str(path.relative_to(CONFIGS)) for path in RECIPES])
def test_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_0_6B))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    kind = "pt" if recipe.stem.startswith("pt") else "sft"
    assert f"mswift {kind} {recipe.relative_to(CONFIGS.parent)}" in recipe.read_text()
    flags = [
        "--model",
        str(tmp_path),
        "--dataset",
        str(rows),
        "--dry_run",
        "--world_size",
        "1" if "demo" in recipe.parts else "4",
    ]
    assert main([kind, str(recipe), *flags]) == 0, capsys.readouterr().out
