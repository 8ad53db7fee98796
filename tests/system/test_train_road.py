"""The road through the commands: sft with LoRA at TP2 x PP2, export, merge; transformers and PEFT confirm the numbers.

Each command once as a program, launcher and all; what else is run is forked.

The evaluation loss that training reports is recomputed with transformers from the exported files and the rendered text.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mswift import rundir
from tests.support.commands import PROGRAM, command, make_home, mswift, run, run_program


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def loss_by_transformers(model: Any, tokenizer: Any, rows: Path) -> float:
    """Mean over assistant tokens of the rendered conversations, one row at a time, by transformers' own mask."""
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": row["response"]}]
        batch = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        mask = torch.as_tensor(batch["assistant_masks"]).reshape(-1).bool()[1:]
        with torch.no_grad():
            scores = model(batch["input_ids"]).logits[0, :-1].float().log_softmax(-1)
        total -= float(scores.gather(1, batch["input_ids"][0, 1:, None])[mask].sum())
        count += int(mask.sum())
    return total / count


def program(*words: object) -> None:
    run_program([*PROGRAM, *map(str, words)])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("road"))


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """A LoRA run of five steps and five saves at TP2 x PP2 with sequence parallelism, its adapter and merged model."""
    before = hashes(home / "model")
    layout = ["--nproc_per_node", "4", "--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2"]
    flags = ["--tuner_type", "lora", "--lora_rank", "4", "--lora_alpha", "16", "--sequence_parallel", *layout]
    val = ["--val_dataset", str(home / "val.jsonl"), "--train_iters", "5", "--save_steps", "1"]
    output = run_program(command(home, "sft", home / "lora", *flags, *val))
    assert "TP 2 x PP 2 x DP 1, sequence parallel" in output
    assert rundir.committed_steps(home / "lora") == [1, 2, 3, 4, 5]
    program("export", "--model", home / "lora", "--output_dir", home / "adapter")
    program("merge", "--model", home / "model", "--adapters", home / "adapter", "--output_dir", home / "merged")
    assert hashes(home / "model") == before  # promise 5: nothing of this touched the base
    return home


def test_peft_loads_the_adapter_and_finds_the_loss_that_training_reported(trained: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    before = loss_by_transformers(base, tokenizer, trained / "val.jsonl")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")  # PEFT warns of both kinds of keys
        tuned = PeftModel.from_pretrained(base, trained / "adapter")
    after = loss_by_transformers(tuned, tokenizer, trained / "val.jsonl")
    reported = rundir.read_metrics(trained / "lora")[-1]["eval_loss"]
    assert after == pytest.approx(reported, rel=1e-5)
    assert after < 0.8 * before  # it learned, and the comparison could have failed
    merged = AutoModelForCausalLM.from_pretrained(trained / "merged", dtype=torch.float32)
    tokens = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = tuned(tokens).logits, merged(tokens).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_full_training_is_exported_as_it_was_evaluated(home: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    val = ["--val_dataset", str(home / "val.jsonl"), "--train_iters", "3"]
    run(command(home, "sft", home / "full", *val, "--nproc_per_node", "2", "--tensor_model_parallel_size", "2"))
    mswift("export", "--model", home / "full", "--output_dir", home / "full-hf")
    program("verify", home / "full", home / "full-hf")
    model = AutoModelForCausalLM.from_pretrained(home / "full-hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home / "full-hf")
    reported = rundir.read_metrics(home / "full")[-1]["eval_loss"]
    assert loss_by_transformers(model, tokenizer, home / "val.jsonl") == pytest.approx(reported, rel=1e-5)
    assert (home / "full-hf" / "config.json").read_bytes() == (home / "model" / "config.json").read_bytes()


def test_training_starts_from_a_converted_checkpoint_and_from_an_adapter(trained: Path) -> None:
    program("convert", "--model", trained / "model", "--to", "megatron", "--output_dir", trained / "megatron")
    argv = command(trained, "sft", trained / "a", "--train_iters", "1")
    run(argv)
    argv[argv.index(str(trained / "model"))] = str(trained / "megatron")
    argv[argv.index(str(trained / "a"))] = str(trained / "b")
    run(argv)
    first, second = (rundir.read_metrics(trained / name)[0] for name in "ab")
    assert [second[k] for k in ("loss", "grad_norm")] == [first[k] for k in ("loss", "grad_norm")]
    flags = ["--tuner_type", "lora", "--adapters", str(trained / "adapter"), "--train_iters", "1", "--lr", "0"]
    flags += ["--val_dataset", str(trained / "val.jsonl"), "--lr_warmup_iters", "0"]
    run(command(trained, "sft", trained / "more", *flags))
    continued = rundir.read_metrics(trained / "more")[-1]["eval_loss"]
    assert continued == pytest.approx(rundir.read_metrics(trained / "lora")[-1]["eval_loss"], rel=1e-5)
