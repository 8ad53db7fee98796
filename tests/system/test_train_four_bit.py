"""A run on a base in four bits: checkpoint, resume, export, and the loss that PEFT gives the adapter on such a base."""

from pathlib import Path

import pytest
import torch

from mswift import rundir
from tests.support.commands import command, make_home, mswift, run
from tests.support.runs import log
from tests.support.tiny import tiny_model

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'mswift[quant]'")

FLAGS = ("--tuner_type", "lora", "--quant_method", "bnb", "--quant_bits", "4")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole blocks on two ranks."""
    path = make_home(tmp_path_factory.mktemp("four"))
    tiny_model(path / "model", hidden_size=128, intermediate_size=128, head_dim=32)
    return path


def test_a_resumed_run_is_the_same_run_and_its_adapter_loads(home: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    layout = ["--nproc_per_node", "2", "--tensor_model_parallel_size", "2", "--save_steps", "2"]
    said = run(command(home, "sft", home / "full", *FLAGS, *layout, "--train_iters", "4"))
    assert "frozen 0." in said or "frozen 1." in said, said  # bytes of each; 4 without
    run(command(home, "sft", home / "half", *FLAGS, *layout, "--train_iters", "2"))
    run(command(home, "sft", home / "half", *FLAGS, *layout, "--train_iters", "4"))
    assert log(home / "half") == log(home / "full")
    other = [*FLAGS[:2], *layout, "--train_iters", "6"]
    assert "--quant_method: the run of this --output_dir has bnb" in run(command(home, "sft", home / "half", *other), 2)
    # the other engine, whose codes are whole on each rank, then cut over both, goes on with it
    for step, backend in ((5, "ddp"), (6, "fsdp")):
        other = ["--nproc_per_node", "2", "--backend", backend, "--train_iters", str(step)]
        said = run(command(home, "sft", home / "half", *FLAGS, *other))
        assert "frozen 0." in said or "frozen 1." in said, said
    run(command(home, "sft", home / "full", *FLAGS, *layout, "--train_iters", "6"))
    losses = [[row["loss"] for row in rundir.read_metrics(home / name)[-2:]] for name in ("half", "full")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # on one rank, from weights alone: the first loss is that of the exported adapter
    more = ["--load_weights_only", "--resume_from_checkpoint", str(home / "full"), "--train_iters", "1"]
    run(command(home, "sft", home / "more", *FLAGS, *more))
    first = rundir.read_metrics(home / "more")[0]["loss"]
    mswift("export", "--model", home / "full", "--output_dir", home / "adapter")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        home / "model", dtype=torch.float32, quantization_config=how, device_map="cpu"
    )
    tuned = PeftModel.from_pretrained(base, home / "adapter").train()  # in eval mode its CPU product rounds to bf16
    assert abs(first - loss(tuned, home)) < 1e-5 * first


def loss(model: torch.nn.Module, home: Path) -> float:
    """Of the first global batch, token by token."""
    from transformers import AutoTokenizer

    from mswift.data.dataset import DataOptions, build_dataset
    from mswift.data.order import sample_ids

    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    options = DataOptions(max_length=64, cache_dir=home / "cache")
    data = build_dataset("sft", [str(home / "chat.jsonl")], tokenizer, options, is_writer=True,
                         barrier=lambda: None, progress=False)  # fmt: skip
    total, count = 0.0, 0.0
    for number in sample_ids(len(data), 42, 0, 8):
        sample = data.sample(int(number))
        tokens = torch.from_numpy(sample.tokens).long()[None]
        logits = model(tokens).logits[0, :-1].detach()
        losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        weights = torch.from_numpy(sample.loss_weights[1:])
        total, count = total + float(losses @ weights), count + float(weights.sum())
    return total / count
