"""Optimizer state moves with its weights: checkpoint -> Hugging Face names -> checkpoint, then the run goes on.

From files alone: at the layout it had bit for bit like the uninterrupted run, at another one to 1e-5 in loss and
gradient norm.
"""

import json
import os
import resource
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mswift import rundir
from mswift.cli.main import main
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.errors import CheckpointError
from tests.support.commands import command, make_home, run, run_program
from tests.support.engines import make_engine
from tests.support.parity import random_model, random_steps
from tests.support.ranks import join, run_ranks
from tests.support.runs import log, tensors

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2}), "one": (1, {}), "dp2": (2, {}),
}  # fmt: skip
SETTINGS: dict[str, Any] = {"lr": 1e-3, "clip_grad": 1.0}


def on_rank(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Start from a model or a checkpoint, train steps, save."""
    dims, device = join(payload["world_size"], **payload["layout"])
    from torch.distributed import get_rank

    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch
    from mswift.train import checkpoint
    from mswift.train.save import save_state

    reader = WeightReader(payload["model"])
    engine = make_engine(reader.table, dims, payload["settings"], device)
    if payload["start"] is None:
        engine.load_weights(reader)
    else:
        checkpoint.load(engine, payload["start"], get_rank(), dims.world_size)
    steps = [[Microbatch(*batch) for batch in step] for step in payload["steps"]]
    results = [engine.train_step(s[engine.coordinate.dp :: dims.dp], 1e-3) for s in steps]
    state = checkpoint.RunState(
        engine.optimizer_step, 0, engine.optimizer_step, dims.world_size, checkpoint.engine_layout(engine), "none", 0,
        {}, dtype=engine.config.dtype,
    )  # fmt: skip
    files = {path.name: path.read_bytes() for path in payload["model"].glob("*.json")}
    saved = save_state(engine, payload["output"], state, get_rank(), files)
    engine.close()
    return {"loss": [r.loss for r in results], "grad_norm": [r.grad_norm for r in results], "saved": saved}


def train(home: Path, name: str, layout: str, steps: slice, start: Path | None = None, **settings: Any) -> Any:
    """Losses, gradient norms and the checkpoint of these steps."""
    world_size, degrees = LAYOUTS[layout]
    payload = {
        "world_size": world_size, "layout": degrees, "model": home / "model", "start": start, "output": home / name,
        "steps": random_steps()[steps], "settings": SETTINGS | settings,
    }  # fmt: skip
    return run_ranks(world_size, on_rank, payload)[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and its training at TP2: two steps, and three without a break."""
    home = tmp_path_factory.mktemp("moves")
    random_model("qwen3").save_pretrained(home / "model")  # type: ignore[operator]
    return home


@pytest.fixture(scope="module")
def two(home: Path) -> Path:
    path: Path = train(home, "two", "tp2", slice(0, 2))["saved"]
    return path


@pytest.fixture(scope="module")
def three(home: Path) -> Any:
    return train(home, "three", "tp2", slice(0, 3))


def convert(source: Path, to: str, target: Path, *flags: str, status: int = 0) -> None:
    argv = ["convert", "--model", str(source), "--to", to, "--output_dir", str(target), "--optimizer", "true", *flags]
    assert main(argv) == status


@pytest.fixture(scope="module")
def moved(home: Path, two: Path) -> Path:
    """The checkpoint of step 2 after its way through Hugging Face names."""
    convert(home / "two", "hf", home / "hf")
    (home / "moved").mkdir()
    convert(home / "hf", "megatron", home / "moved" / "checkpoint-2")
    return home / "moved" / "checkpoint-2"


def test_the_checkpoint_comes_back_bit_for_bit(home: Path, two: Path, moved: Path) -> None:
    before, after = tensors(two), tensors(moved)
    assert after == before
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in before)
    assert any(name.startswith("rng.") for name in before)
    for name in ("run.json", "hf/config.json"):
        assert (moved / name).read_bytes() == (two / name).read_bytes()
    rundir.check_files(moved)
    records = [json.loads((path / "mswift_optimizer.json").read_text()) for path in (home / "hf", moved)]
    assert records[0] == records[1]
    assert not list(home.glob(".*with-optimizer*"))


def test_states_have_the_names_and_places_of_the_weights(home: Path, moved: Path) -> None:
    """exp_avg of k_proj is where megatron-core's fused qkv has the rows of k: written out here by hand."""
    weights = load_file(home / "hf" / "model.safetensors")
    states = load_file(home / "hf" / "optimizer" / "exp_avg" / "model.safetensors")
    assert {n: t.shape for n, t in states.items()} == {n: t.shape for n, t in weights.items()}
    assert {t.dtype for t in states.values()} == {torch.float32}
    config = json.loads((home / "hf" / "config.json").read_text())
    groups, dim, heads = config["num_key_value_heads"], config["head_dim"], config["num_attention_heads"]
    key = "optimizer.exp_avg.decoder.layers.self_attention.linear_qkv.weight"
    fused = torch.frombuffer(bytearray(tensors(home / "two" / "checkpoint-2")[key]), dtype=torch.float32)
    fused = fused.view(config["num_hidden_layers"], groups, heads // groups + 2, dim, config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        own = states[f"model.layers.{layer}.self_attn.k_proj.weight"]
        assert torch.equal(own, fused[layer, :, heads // groups].reshape(own.shape))
        assert own.abs().max() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_run_goes_on(home: Path, moved: Path, three: Any, tmp_path: Path, layout: str) -> None:
    (tmp_path / "model").symlink_to(home / "model")
    rest = train(tmp_path, "run", layout, slice(2, 3), start=moved)
    if layout == "tp2":
        assert [rest[name] for name in ("loss", "grad_norm")] == [three[name][2:] for name in ("loss", "grad_norm")]
        assert tensors(rest["saved"]) == tensors(three["saved"])
    for name in ("loss", "grad_norm"):
        assert rest[name] == pytest.approx(three[name][2:], rel=1e-5), name


def test_other_states_would_be_another_run(home: Path, moved: Path, three: Any, tmp_path: Path) -> None:
    """Partner: first moments of zero. The record refuses them; made to fit, the weights of the next step differ."""
    shutil.copytree(home / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "optimizer" / "exp_avg" / "model.safetensors"
    save_file({name: 0 * tensor for name, tensor in load_file(file).items()}, file)
    convert(tmp_path / "hf", "megatron", tmp_path / "refused", status=1)
    assert not (tmp_path / "refused").exists()
    record = json.loads((tmp_path / "hf" / "mswift_optimizer.json").read_text())
    record["states"]["exp_avg"] = {}
    (tmp_path / "hf" / "mswift_optimizer.json").write_text(json.dumps(record))
    for folder in ("hf", "hf/optimizer/exp_avg"):
        (tmp_path / folder / "mswift_manifest.json").unlink(missing_ok=True)
    convert(tmp_path / "hf", "megatron", tmp_path / "start")
    (tmp_path / "model").symlink_to(home / "model")
    rest = train(tmp_path, "run", "tp2", slice(2, 3), start=tmp_path / "start")
    key = "decoder.layers.mlp.linear_fc1.weight"
    one, other = (torch.frombuffer(bytearray(tensors(r["saved"])[key]), dtype=torch.float32) for r in (rest, three))
    assert (one - other).abs().max() > 1e-4


def test_bf16_masters_move_too(home: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(home / "model")
    saved = train(tmp_path, "run", "dp2", slice(0, 2), dtype="BF16")["saved"]
    convert(tmp_path / "run", "hf", tmp_path / "hf")
    folders = sorted(path.name for path in (tmp_path / "hf" / "optimizer").iterdir() if path.is_dir())
    assert folders == ["exp_avg", "exp_avg_sq", "master"]
    convert(tmp_path / "hf", "megatron", tmp_path / "back")
    assert tensors(tmp_path / "back") == tensors(saved)
    convert(tmp_path / "run", "megatron", tmp_path / "again")  # the same format, other chunks
    assert tensors(tmp_path / "again") == tensors(saved)


def test_commands_continue_a_moved_run(tmp_path: Path) -> None:
    """The whole way in processes, as a user goes it."""
    home = make_home(tmp_path)
    run(command(home, "sft", home / "four", "--train_iters", "4"))
    run(command(home, "sft", home / "two", "--train_iters", "2"))
    convert(home / "two", "hf", home / "hf")
    (home / "moved").mkdir()
    convert(home / "hf", "megatron", home / "moved" / "checkpoint-2")
    assert "continuing after step 2" in run(command(home, "sft", home / "moved", "--train_iters", "4"))
    assert log(home / "moved") == log(home / "four")[2:]
    assert tensors(home / "moved" / "checkpoint-4") == tensors(home / "four" / "checkpoint-4")


def test_what_is_refused(
    home: Path, two: Path, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(home / "model", "megatron", tmp_path / "x", status=2)
    assert "holds no optimizer state" in capsys.readouterr().err
    convert(two, "hf", tmp_path / "x", "--part", "1/2", status=2)
    assert "--part is for weights alone" in capsys.readouterr().err
    shutil.copytree(home / "hf", tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf" / "optimizer" / "exp_avg")
    convert(tmp_path / "hf", "megatron", tmp_path / "x", status=1)
    assert "holds the states ['exp_avg_sq'], mswift_optimizer.json lists" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_publishes_nothing(two: Path, tmp_path: Path) -> None:
    """The limit lets the weights' file through (they are smaller than it) and not that of the states."""
    argv = [sys.executable, "-m", "mswift.cli.main", "convert", "--model", str(two), "--to", "megatron"]
    argv += ["--output_dir", str(tmp_path / "x"), "--optimizer", "true"]
    size = sum(path.stat().st_size for path in two.glob("*.distcp")) // 2

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    text = run_program(argv, status=1, preexec_fn=limit, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert "the disk is full" in text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_verify_sees_states(home: Path, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(home / "two"), str(home / "hf")]) == 0
    assert main(["verify", str(moved)]) == 0
    shutil.copytree(home / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "optimizer" / "exp_avg_sq" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(home / "two"), str(tmp_path / "hf")]) == 1
    assert "optimizer state exp_avg_sq of lm_head.weight: bits differ" in (text := capsys.readouterr().out), text
    assert main(["verify", str(tmp_path / "hf")]) == 1


def test_another_program_reads_the_index(moved: Path) -> None:
    """torch's own reader finds weights and states of the written checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(str(moved)).read_metadata()
    assert metadata.state_dict_metadata.keys() >= TorchDistSource(moved).tensors.keys()


def test_state_by_transformers_names_stays_where_it_was_made(tmp_path: Path) -> None:
    """Of muon, or of a part of a model: the weights alone go elsewhere."""
    from types import SimpleNamespace

    from mswift.converters.optimizer_sources import MegatronStates

    source: Any = SimpleNamespace(path=tmp_path, _files=SimpleNamespace(objects=()))
    names = ["optimizer.exp_avg.output_layer.weight", "optimizer.momentum_buffer.of.model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"momentum_buffer.of.*leave --optimizer out to convert the weights"):
        MegatronStates._refuse_layout_bound(source, names)
