"""The dry run: what it counts against the files, what it prints, what it refuses, what it does not import."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mswift import rundir
from mswift.cli.main import main
from mswift.config.train import PtConfig, SftConfig
from mswift.converters.catalog import read_config
from mswift.converters.plan import ModelTable, table_for
from mswift.errors import MswiftError
from mswift.launchers.environment import RankInfo
from mswift.topology import ParallelDims
from mswift.train.dry_run import dry_run
from mswift.train.memory import activations, stage_memory, stage_parameters
from mswift.train.run import prepare
from mswift.train.trained import trained_parameters, virtual_tokens
from mswift.tuners.prompt_config import prompt_config
from mswift.tuners.prompts import EMBEDDINGS
from tests.support.checkpoints import write_model
from tests.support.family_configs import family_config
from tests.support.quantised import AWQ, GPTQ
from tests.support.shared import shared_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1003,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def _table(**change: Any) -> ModelTable:
    return table_for({**LLAMA, **change})


def _count(table: ModelTable) -> int:
    return sum(math.prod(shape) for shape in table.hf.values())


def test_one_rank_holds_what_the_file_holds() -> None:
    model = shared_file("data/weights/stories260K-hf")
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    in_file = sum(math.prod(info["shape"]) for name, info in header.items() if name != "__metadata__")
    assert stage_parameters(table_for(read_config(model)), ParallelDims(), 0) == in_file


@pytest.mark.parametrize("tied", [False, True])
def test_the_stages_hold_the_model_once_and_a_tied_embedding_twice(tied: bool) -> None:
    table = _table(tie_word_embeddings=tied)
    stages = [stage_parameters(table, ParallelDims(4, pp=4), stage) for stage in range(4)]
    assert sum(stages) == _count(table) + tied * 1003 * 64
    assert stages[1] == stages[2] < stages[0]


def test_tensor_parallel_ranks_hold_the_model_the_norms_of_the_others_and_the_padding() -> None:
    table = _table()
    norms = sum(math.prod(shape) for name, shape in table.hf.items() if name.endswith("norm.weight"))
    padding = 2 * 64 * (4 * math.ceil(1003 / 4) - 1003)
    assert 4 * stage_parameters(table, ParallelDims(4, tp=4), 0) == _count(table) + 3 * norms + padding


def test_memory_parts() -> None:
    table, dims = _table(), ParallelDims(4)
    config = PtConfig(model="m", max_length=128, global_batch_size=8)
    full = stage_memory(config, table, dims, 2, 0)
    count = _count(table)
    assert (full.weights_bytes, full.gradients_bytes, full.optimizer_bytes) == (2 * count, 4 * count, 3 * count)
    lora = stage_memory(SftConfig(model="m", tuner_type="lora", lora_rank=4), table, dims, 4, 0)
    leaves = {name: shape for name, shape in table.hf.items() if "_proj." in name}
    assert lora.trained == 4 * sum(sum(shape) for shape in leaves.values())
    assert lora.parameters == count + lora.trained
    assert trained_parameters(SftConfig(model="m", tuner_type="lora", lora_rank=4), table) == lora.trained


def test_what_a_part_of_the_model_trains_is_of_the_stages_where_it_lies() -> None:
    table = _table()
    frozen = ("model.embed_tokens", *(f"model.layers.{n}." for n in range(table.spec.num_layers // 2)))
    own = SftConfig(model="m", freeze_parameters=frozen, freeze_parameters_regex="layers.3.self_attn")
    every = stage_parameters(table, ParallelDims(2, pp=2), 1)
    attention = sum(math.prod(shape) for name, shape in table.hf.items() if "layers.3.self_attn" in name)
    first, last = (stage_memory(own, table, ParallelDims(2, pp=2), 2, stage) for stage in range(2))
    assert (first.trained, first.gradients_bytes, first.optimizer_bytes) == (0, 0, 0)
    assert last.trained == trained_parameters(own, table) == every - attention
    assert (last.gradients_bytes, last.optimizer_bytes) == (4 * last.trained, 12 * last.trained)
    one = stage_memory(own, table, ParallelDims(), 2, 0)
    assert one.trained == last.trained


def test_a_base_in_four_bits() -> None:
    table, dims = _table(), ParallelDims(4)
    config = SftConfig(model="m", tuner_type="lora", quant_method="bnb", quant_bits=4)
    found = stage_memory(config, table, dims, 4, 0)
    linears = sum(math.prod(shape) for name, shape in table.hf.items() if "_proj." in name)
    assert found.weights_bytes == (found.parameters - linears) * 4 + linears * 0.5625


def test_a_base_that_keeps_its_codes(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, dims = table_for(_table().config | {"quantization_config": GPTQ}), ParallelDims(4)
    config = SftConfig(model="m", tuner_type="lora", quant_method="gptq")
    found = stage_memory(config, table, dims, 4, 0)
    linears = sum(math.prod(shape) for name, shape in table.hf.items() if "_proj." in name)
    assert found.weights_bytes == (found.parameters - linears) * 4 + linears * (0.5 + 3 / GPTQ["group_size"])
    fields = LLAMA | {"quantization_config": AWQ, "torch_dtype": "bfloat16"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    assert main([*argv, "--tuner_type", "lora", "--quant_method", "awq"]) == 0
    assert "base in 4 bits (the codes of awq)" in capsys.readouterr().out
    assert main([*argv, "--tuner_type", "lora", "--quant_method", "gptq"]) == 2
    assert "refused: --quant_method gptq keeps the codes of the checkpoint" in capsys.readouterr().out


def test_ranks_that_share_sequences_share_activations_and_the_optimizer() -> None:
    table, config = _table(), PtConfig(model="m", max_length=128, global_batch_size=8)
    one, four = (stage_memory(config, table, ParallelDims(n, cp=n), 4, 0) for n in (1, 4))
    assert (four.weights_bytes, four.gradients_bytes) == (one.weights_bytes, one.gradients_bytes)
    assert (4 * four.optimizer_bytes, 4 * four.activations_bytes) == (one.optimizer_bytes, one.activations_bytes)


@pytest.mark.parametrize("tuner", ["prompt", "ptuning", "prefix"])
@pytest.mark.parametrize("backend", ["ddp", "fsdp", "deepspeed"])
def test_virtual_tokens_are_positions_of_every_row(tuner: str, backend: str) -> None:
    table, dims = _table(), ParallelDims(world_size=2)
    own = {"model": "", "backend": backend, "micro_batch_size": 2, "cross_entropy_loss_fusion": "false"}
    with_tokens = SftConfig(**own, tuner_type=tuner, max_length=100, tuner_config='{"num_virtual_tokens": 28}')
    assert virtual_tokens(with_tokens, table) == 28
    longer = SftConfig(**own, max_length=128)
    assert virtual_tokens(longer, table) == 0
    assert activations(with_tokens, table, dims, 2, 0) == activations(longer, table, dims, 2, 0)


def test_virtual_tokens_leave_positions_to_samples(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    prompt = [*argv, "--backend", "ddp", "--tuner_type", "prompt", "--tuner_config"]
    assert main([*prompt, '{"num_virtual_tokens": 126}']) == 0
    assert main([*prompt, '{"num_virtual_tokens": 127}']) == 2
    said = "refused: --tuner_config: num_virtual_tokens 127 leaves 1 of the model's 128 positions to a sample"
    assert said in capsys.readouterr().out


def test_virtual_tokens_of_an_adapter_to_go_on_with_are_its_own(tmp_path: Path, argv: list[str], capsys: Any) -> None:
    adapter = prompt_config(_table(), "prompt", {"num_virtual_tokens": 7})
    (tmp_path / "adapter_config.json").write_bytes(adapter.text(_table(), (), None))
    save_file({EMBEDDINGS: np.zeros((7, 64), np.float32)}, tmp_path / "adapter_model.safetensors")
    flags = ["--backend", "fsdp", "--tuner_type", "prompt", "--adapters", str(tmp_path)]
    assert main([*argv, *flags]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n  virtual +7 tokens before each sample, which --max_length does not count", printed)
    assert re.search(r"^ +0 +[\d,]+ +448 ", printed, re.MULTILINE)  # 7 of width 64 are trained


def test_context_parallelism_is_told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--context_parallel_size", "4", "--cp_comm_type", "a2a+p2p"]
    sizes = ["--hierarchical_context_parallel_sizes", "2", "2"]
    assert main([*argv, *layout, *sizes, "--world_size", "8"]) == 0
    output = capsys.readouterr().out
    for words in (
        "8 ranks = TP 1 x CP 4 x PP 1 x DP 2",
        "[0 1 2 3] [4 5 6 7] share each sequence (a2a+p2p)",
        "DP x CP",
    ):
        assert words in output
    assert main([*argv, *layout, "--world_size", "8"]) == 2
    assert "use --cp_comm_type a2a+p2p --hierarchical_context_parallel_sizes 2 2" in capsys.readouterr().out


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "data.txt").write_text("text")
    paths = ["--model", f"{tmp_path}/model", "--dataset", f"{tmp_path}/data.txt", "--output_dir", f"{tmp_path}/out"]
    return ["pt", *paths, "--dry_run", "--train_iters", "10"]


def test_a_run_on_256_ranks_is_told_from_config_json_alone(argv: list[str], tmp_path: Path) -> None:
    layout = ["--world_size", "256", "--tensor_model_parallel_size", "4", "--pipeline_model_parallel_size", "2"]
    layout += ["--global_batch_size", "64"]
    code = (
        f"import sys; from mswift.cli.main import main; status = main({[*argv, *layout]})\n"
        "print(status, [m for m in ('torch', 'transformers', 'megatron') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr.strip() == "0 []"
    for words in ("256 ranks = TP 4 x PP 2 x DP 32", "[0 1 2 3]", "2 microbatches x 1 x DP 32", "activations"):
        assert words in result.stdout
    assert not (tmp_path / "out").exists()


def test_the_stages_are_printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--world_size", "2", "--pipeline_model_parallel_size", "2"]
    assert main([*argv, *layout, "--pipeline_model_parallel_layout", "Et|tt|t|L"]) == 0
    said = capsys.readouterr().out
    for words in (
        "2 ranks = TP 1 x PP 2 x DP 1 (VPP 2)",
        "stage 0      embedding, layer 0 | layer 3",
        "stage 1      layers 1-2 | final norm and logits",
        "interleaved 1F1B of 2 chunks a stage, 3% of the time idle",
    ):
        assert words in said


def test_what_a_rank_sends_in_a_step(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """2 data-parallel ranks each send half of the gradients (fp32) and half of the weights (fp32)."""
    assert main([*argv, "--world_size", "2"]) == 0
    padded = -(-_count(_table()) // 128) * 128
    assert f"sent           DP {padded * (4 + 4) / 2 / 1e9:.3g} GB (" in capsys.readouterr().out
    assert main([*argv, "--world_size", "2", "--tuner_type", "lora"]) == 0
    assert "sent           not estimated with adapters" in capsys.readouterr().out


def test_a_part_of_the_model_is_told_by_its_flags(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([*argv, "--freeze_parameters", "model.embed_tokens", "lm_head", "--trainable_parameters_regex", "mlp"])
        == 0
    )
    said = "tuner          full, a part of the model: --freeze_parameters model.embed_tokens lm_head --trainable_par"
    assert said in capsys.readouterr().out
    assert main(argv) == 0
    assert "tuner          full\n" in capsys.readouterr().out


def test_every_refusal_is_printed_and_the_status_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--tensor_model_parallel_size", "8", "--lora_rank", "3", "--val_dataset", "absent.txt", "--resume", "true"]
    assert main([*argv, *wrong, "--world_size", "8"]) == 2
    refused = [line for line in capsys.readouterr().out.splitlines() if line.startswith("refused: ")]
    for flag in ("--lora_rank 3", "--tensor_model_parallel_size 8", "--val_dataset absent.txt", "--resume true"):
        assert sum(flag in line for line in refused) == 1
    assert len(refused) == 4


def test_rows_of_cut_documents_are_no_mixture(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cut = ["--packing", "--packing_strategy", "concat-and-split"]
    assert main([*argv, *cut]) == 0
    assert "packs a step" in capsys.readouterr().out
    assert main([*argv, *cut, "--dataset_weights", "1"]) == 2
    assert "concat-and-split fills rows with documents in file order, which weights" in capsys.readouterr().out
    assert main([*argv, *cut, "--dataset_weights", "1", "--streaming"]) == 0
    assert main([*argv, "--packing", "--dataset_weights", "1"]) == 0


def test_a_wrong_module_name_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--tuner_type", "lora", "--target_modules", "q_prj"]) == 2
    assert "q_proj" in capsys.readouterr().out
    assert main([*argv, "--tuner_type", "lora", "--target_modules", "q_proj,v_proj"]) == 2
    assert "names stand apart by spaces: --target_modules q_proj v_proj" in capsys.readouterr().out


def _whole_model(path: Path, config: dict[str, Any]) -> None:
    """A model with weights, of a config.json that may be refused: its sizes are those without dropouts."""
    plain = {name: 0.0 if "drop" in name else value for name, value in config.items()}
    tensors = {name: np.zeros(shape, np.uint32) for name, shape in table_for(plain).hf.items()}
    write_model(path, config, tensors, "F32", 1)


def _checkpoint(output_dir: Path, **files: bytes) -> None:
    """A committed checkpoint-5 with these files in it."""
    path = output_dir / "checkpoint-5"
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (path / rundir.COMMIT).write_text(json.dumps({"version": 1, "files": {}}))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, bytes], dict[str, bytes], str]] = {
    # config.json, files beside it, files of a checkpoint in --output_dir, words of the refusal
    "starcoder2": (family_config("starcoder2", residual_dropout=0.1), {}, {}, "does not compute dropout 0.1"),
    "granite": (family_config("granite", attention_dropout=0.1), {}, {}, "does not compute dropout 0.1"),
    "llama": (LLAMA | {"attention_dropout": 0.1}, {}, {}, "'attention_dropout' is 0.1"),
    "phi3": (family_config("phi3", resid_pdrop=0.1), {}, {}, "'resid_pdrop' is 0.1"),
    "nemotron_h": (family_config("nemotron_h", hidden_dropout=0.1), {}, {}, "'hidden_dropout' is 0.1"),
    "deepseek_v2": (family_config("deepseek_v2", attention_dropout=0.1), {}, {}, "'attention_dropout' is 0.1"),
    "bin": (LLAMA, {"pytorch_model.bin": b"no zip"}, {}, "is not a zip file of torch.save"),
    "adapter": (LLAMA, {}, {"hf/adapter_config.json": b"{}"}, "trains an adapter; pass --tuner_type lora"),
    "own weights": (LLAMA, {}, {".metadata": b"x", "hf/config.json": b"{}"}, "checkpoint-5/.metadata: refused"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_shows_what_a_launch_refuses(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields, beside, of_a_run, words = REFUSED[case]
    _whole_model(tmp_path / "m", fields)
    for name, content in beside.items():
        (tmp_path / "m" / "model.safetensors").unlink()
        (tmp_path / "m" / name).write_bytes(content)
    if of_a_run:
        _checkpoint(tmp_path / "out", **of_a_run)
    (tmp_path / "data.txt").write_text("text")
    model, data, output_dir = (str(tmp_path / name) for name in ("m", "data.txt", "out"))
    config = PtConfig(model=model, dataset=(data,), output_dir=output_dir, train_iters=10)
    with pytest.raises(MswiftError) as launch:
        prepare("pt", config, RankInfo.single())
    assert words in str(launch.value)
    assert refused_by_dry_run(config, capsys) == (launch.value.exit_status, str(launch.value))


def refused_by_dry_run(config: PtConfig, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and first refusal of `--dry_run`."""
    try:
        status = dry_run(config)
    except MswiftError as error:
        return error.exit_status, str(error)
    printed = capsys.readouterr().out
    return status, next(line for line in printed.splitlines() if line.startswith("refused: ")).removeprefix("refused: ")


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("how", "stored", "becomes"),
    [
        (FP8, "float16", "BF16, of one rank"),
        (FP8, "bfloat16", "BF16, of one rank"),
        (GPTQ, "float16", "model holds F16 weights"),
        (AWQ, "bfloat16", "BF16, of one rank"),
    ],
)
def test_what_quantised_weights_that_are_not_here_become(
    how: Any, stored: str, becomes: str, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = LLAMA | {"quantization_config": how, "torch_dtype": stored}
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    assert main(argv) == (2 if "F16 " in becomes else 0)
    assert becomes in capsys.readouterr().out
