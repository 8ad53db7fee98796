"""A run on a base that keeps the codes of its checkpoint: losses of one on the dequantised base, an adapter."""

import json
from pathlib import Path

import pytest

from mswift import rundir
from tests.support.commands import PROGRAM, command, make_home, mswift, run
from tests.support.quantised import GPTQ, quantise_directory
from tests.support.runs import log
from tests.support.tiny import tiny_model

LORA = ("--tuner_type", "lora", "--torch_dtype", "float32")
CODES = (*LORA, "--quant_method", "gptq")
TP2 = ("--nproc_per_node", "2", "--tensor_model_parallel_size", "2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised model whose rows are whole groups on two ranks."""
    path = make_home(tmp_path_factory.mktemp("codes"))
    (path / "model").rename(path / "base")
    tiny_model(path / "base", hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    quantise_directory(path / "base", GPTQ, path / "model")
    return path


def test_it_is_the_run_on_the_dequantised_base(home: Path) -> None:
    run(command(home, "sft", home / "whole", *LORA, *TP2, "--train_iters", "3"))
    run(command(home, "sft", home / "held", *CODES, *TP2, "--train_iters", "2"))
    assert log(home / "held") == log(home / "whole")[:2]
    other = command(home, "sft", home / "held", *LORA, "--train_iters", "4")
    assert "--quant_method: the run of this --output_dir has gptq" in run(other, 2)
    # the other engine, whose codes are cut over both ranks, goes on with it
    run(command(home, "sft", home / "held", *CODES, *TP2[:2], "--backend", "fsdp", "--train_iters", "3"))
    losses = [rundir.read_metrics(home / name)[2]["loss"] for name in ("held", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    mswift("export", "--model", home / "held", "--output_dir", home / "held-adapter")
    config = json.loads((home / "held-adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "model")
    prompt = ("--prompt", "say 3", "--max_new_tokens", "8", "--temperature", "0")
    plain, quantised = (
        mswift("infer", "--model", home / base, "--adapters", home / "held-adapter", *prompt).splitlines()[-1]
        for base in ("model-plain", "model")
    )
    assert plain == quantised != ""
    # and it is merged into what conversion makes of the base
    adapter = ("--adapters", home / "held-adapter", "--output_dir")
    refused = run([*PROGRAM, "merge", "--model", str(home / "model"), *map(str, adapter), str(home / "merged")], 2)
    assert f"mswift convert --model {home / 'model'} --to hf --output_dir {home / 'model'}-hf" in refused
    mswift("convert", "--model", home / "model", "--to", "hf", "--output_dir", home / "converted")
    mswift("verify", home / "converted", home / "model-plain")
    mswift("merge", "--model", home / "converted", *adapter, home / "merged")
    assert mswift("infer", "--model", home / "merged", *prompt).splitlines()[-1] == plain


def test_a_base_without_such_codes_is_refused_in_a_line(home: Path) -> None:
    argv = command(home, "sft", home / "refused", *LORA, "--quant_method", "awq", "--train_iters", "1")
    assert "--quant_method awq keeps the codes of the checkpoint, and --model" in run(argv, 2)
    assert not (home / "refused").exists()
