"""Loss per sample, by channel and by validation file, through the command: transformers' losses averaged by hand.

One step whose batch is the whole file, at a learning rate that leaves the weights as they are.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mswift import rundir
from mswift.data.dataset import DataOptions, build_dataset
from mswift.data.loss_scale import parse_loss_scale
from mswift.data.tokenizer import load_tokenizer
from tests.support.commands import make_home, run

LAYOUTS = [[], ["--nproc_per_node", "2", "--context_parallel_size", "2", "--micro_batch_size", "2"]]
SCALE = "react"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_home(tmp_path_factory.mktemp("channels"))
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"q{i}"},
                      {"role": "assistant", "content": "Action: f" * (i % 3) + "x" * (i + 1), "loss_scale": 1 + i % 2}]}
        for i in range(12)
    ]  # fmt: skip
    for i in range(9):
        rows[i]["channel"] = "abc"[i % 2]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def losses(home: Path, file: str, model: Any, *, per_sample: bool) -> dict[str, tuple[float, float]]:
    """Weighted loss and weights of all samples ("all") and of each channel."""
    options = DataOptions(max_length=64, cache_dir=home / "oracle", loss_scale=parse_loss_scale(SCALE, by_channel=True))
    tokenizer = load_tokenizer(home / "model")
    data = build_dataset(
        "sft", [str(home / file)], tokenizer, options, is_writer=True, barrier=lambda: None, progress=False
    )
    sums: dict[str, tuple[float, float]] = {}
    for number in range(len(data)):
        sample = data.sample(number)
        tokens, weights = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.loss_weights[1:]).double()
        with torch.no_grad():
            each = F.cross_entropy(model(tokens[None, :-1]).logits[0].double(), tokens[1:], reduction="none")
        weights = weights / weights.sum() if per_sample else weights
        for name in ("all", sample.channel or "(none)"):
            loss_sum, weight_sum = sums.get(name, (0.0, 0.0))
            sums[name] = loss_sum + float((each * weights).sum()), weight_sum + float(weights.sum())
    return {name: (loss_sum / weight_sum, weight_sum) for name, (loss_sum, weight_sum) in sums.items()}


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_equals_transformers(home: Path, normalization: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    per_sample = normalization == "sample"
    expected = losses(home, "rows.jsonl", model, per_sample=per_sample)
    all_val, val = ({}, {})
    for file in ("val.jsonl", "chat.jsonl"):
        val[file], all_val[file] = losses(home, file, model, per_sample=per_sample)["all"]
    for number, layout in enumerate(LAYOUTS if per_sample else LAYOUTS[1:]):
        out = home / f"{normalization}-{number}"
        argv = [
            sys.executable, "-m", "mswift.cli.main", "sft", "--model", str(home / "model"), "--max_length", "64",
            "--dataset", str(home / "rows.jsonl"), "--val_dataset", str(home / "val.jsonl"), str(home / "chat.jsonl"),
            "--output_dir", str(out), "--cache_dir", str(home / "cache"), "--global_batch_size", "12", "--lr", "1e-9",
            "--loss_scale", SCALE, "--enable_channel_loss", "--loss_normalization", normalization, *layout,
        ]  # fmt: skip
        said = run([*argv, "--train_iters", "1"])
        (row,) = rundir.read_metrics(out)
        assert row["loss"] == pytest.approx(expected["all"][0], rel=1e-5)
        assert row["loss_weights"] == pytest.approx(expected["all"][1], rel=1e-6)
        assert row["channel_loss"] == {n: pytest.approx(v, rel=1e-5) for n, (v, _) in expected.items() if n != "all"}
        assert row["channel_weights"] == {n: pytest.approx(w, rel=1e-6) for n, (_, w) in expected.items() if n != "all"}
        parts = [row["channel_loss"][name] * weight for name, weight in row["channel_weights"].items()]
        assert sum(parts) == pytest.approx(row["loss"] * row["loss_weights"], rel=1e-6)
        assert row["eval_losses"] == {name: pytest.approx(value, rel=1e-5) for name, value in val.items()}
        mean = sum(val[name] * all_val[name] for name in val) / sum(all_val.values())
        assert row["eval_loss"] == pytest.approx(mean, rel=1e-5)
        assert f"loss[a] {row['channel_loss']['a']:.4f}" in said
        assert f"eval_loss[val.jsonl] {row['eval_losses']['val.jsonl']:.4f}" in said
        what = "samples of a global batch, of each over its tokens" if per_sample else "tokens of a global batch"
        assert f"mean over the {what}, by loss weights; --loss_scale react; apart for" in said
    other = {"token": "sample", "sample": "token"}[normalization]
    changed = [other if word == normalization else word for word in argv]
    text = run([*changed, "--train_iters", "2"], status=2)
    assert f"--loss_normalization: the run of this --output_dir has {normalization}, the command says {other}" in text
