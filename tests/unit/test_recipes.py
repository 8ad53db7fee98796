"""Every recipe in configs/ runs as it is: strict load, and a dry run on a real model's shape without a refusal.

Recipes of one model are held against a table: published number of parameters, batch, tokens, and memory of a rank.
"""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from mswift.cli.commands import COMMANDS, load
from mswift.cli.main import main
from mswift.cli.options import parse
from mswift.config.loader import recipe_command
from mswift.converters.plan import table_for
from mswift.eval.catalog import TASKS
from mswift.refusals import dims_of
from mswift.train.memory import stage_memory

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Expected:
    """Of a recipe on `nodes` nodes of 8: published parameters; a step; GiB of weights, gradients, optimizer, all."""

    model: str
    nodes: int
    parameters: int
    layout: str
    microbatches: str
    tokens: int
    memory: tuple[float, float, float, float]


TABLE = {
    "llama3_8b_pt": Expected(
        "Meta-Llama-3-8B", 1, 8_030_261_248, "TP 4 x PP 1 x DP 2", "64 microbatches x 1", 2**20,
        (3.74, 7.48, 11.22, 33.18),
    ),
    "qwen3_30b_a3b_sft": Expected(
        "Qwen3-30B-A3B", 2, 30_532_122_624, "TP 1 x PP 2 x DP 8; experts ETP 1 x EP 8 x EDP 1",
        "16 microbatches x 1", 2**19, (4.81, 9.62, 21.33, 69.13),
    ),
    "qwen2_5_72b_lora": Expected(
        "Qwen2.5-72B-Instruct", 16, 72_706_203_648, "TP 8 x PP 2 x DP 8", "16 microbatches x 1", 2**20,
        (9.25, 1.57, 0.59, 37.27),
    ),
    "llama3_1_8b_128k_sft": Expected(
        "Llama-3.1-8B", 64, 8_030_261_248, "TP 4 x CP 8 x PP 1 x DP 16", "4 microbatches x 1", 2**23,
        (3.74, 7.48, 0.18, 32.38),
    ),
}  # fmt: skip
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.stem not in TABLE and path.stem != "eval")
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=[str(path.relative_to(CONFIGS)) for path in RECIPES])
def test_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "deepspeed" in recipe.stem and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'mswift[deepspeed]'")
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


@pytest.mark.parametrize("name", TABLE)
def test_recipe_of_a_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    want = TABLE[name]
    recipe, model = CONFIGS / f"{name}.yaml", CONFIGS / "models" / f"{want.model}.json"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    command = recipe_command(recipe)
    assert command is not None
    text, nodes = recipe.read_text(), f"--nodes {want.nodes} " * (want.nodes > 1)
    assert f"mswift {command} configs/{name}.yaml --model configs/models/{want.model}.json" in text
    assert f"mswift launch slurm configs/{name}.yaml {nodes}--model DIR" in text
    flags = [str(recipe), "--model", str(model), "--dataset", str(rows)]
    assert main([command, *flags, "--dry_run", "--world_size", str(8 * want.nodes)]) == 0
    out = capsys.readouterr().out
    assert f"parameters     {want.parameters:,}" in out
    assert f"{8 * want.nodes} ranks = {want.layout}" in out
    assert f"= {want.microbatches}" in out
    assert f"at most {want.tokens:,} tokens a step" in out
    config = parse(load(COMMANDS[command].config), flags)
    table = table_for(json.loads(model.read_text()))
    dims = dims_of(config, 8 * want.nodes, table.spec.num_layers)
    found = stage_memory(config, table, dims, 2, 0)  # the first stage has most microbatches in flight
    parts = (found.weights_bytes, found.gradients_bytes, found.optimizer_bytes, found.total_bytes)
    assert tuple(round(part / 2**30, 2) for part in parts) == want.memory
    assert found.total_bytes < 80e9 * 0.95
    assert main(["launch", "slurm", *flags, "--nodes", str(want.nodes), "--dry_run"]) == 0
    assert f"#SBATCH --nodes={want.nodes}\n" in capsys.readouterr().out


def test_a_model_file_is_for_dry_runs_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    model = CONFIGS / "models" / "Llama-3.1-8B.json"
    flags = ["--model", str(model), "--dataset", str(tmp_path / "rows.jsonl"), "--train_iters", "1"]
    assert main(["sft", *flags, "--output_dir", str(tmp_path / "run")]) == 2
    assert "is a file; --model takes a model directory on this machine" in capsys.readouterr().err


def test_the_recipe_of_evaluation(tmp_path: Path) -> None:
    recipe = CONFIGS / "eval.yaml"
    assert "mswift eval configs/eval.yaml " in recipe.read_text()
    config = parse(load(COMMANDS["eval"].config), [str(recipe), "--model", str(tmp_path)])
    assert {given.partition("=")[0] for given in config.eval_dataset} <= TASKS.keys()
