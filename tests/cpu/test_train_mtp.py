"""Commands on a model with a multi-token-prediction layer: what they train, say, save, export and merge."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mswift import rundir
from mswift.converters.plan import table_for
from mswift.tuners.merge import merge
from tests.cpu.test_parity_mtp import V3
from tests.support.checkpoints import write_model
from tests.support.commands import command, make_home, mswift, run
from tests.support.prediction import predicting_model
from tests.support.spaces import to_hf, to_megatron, weights_of
from tests.support.tiny import tiny_tokenizer

AHEAD = f"model.layers.{V3['num_hidden_layers']}."
COPIES = (AHEAD + "embed_tokens.weight", AHEAD + "shared_head.head.weight")
STEPS = ["--train_iters", "2", "--save_hf_steps", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a model as the hub has them: experts one by one, the layer with copies of embedding and head."""
    path = make_home(tmp_path_factory.mktemp("mtp"))
    shutil.rmtree(path / "model")
    model: Any = predicting_model(V3 | {"vocab_size": 300})
    config = {k: v for k, v in model.config.to_dict().items() if v is not None}
    config["architectures"] = ["DeepseekV3ForCausalLM"]
    written = weights_of(model)
    tensors = to_hf(to_megatron(written, table_for(config, written)), table_for(config))
    tensors[AHEAD + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[AHEAD + "shared_head.head.weight"] = tensors["lm_head.weight"]
    write_model(path / "model", config, {n: v.view(np.uint32) for n, v in tensors.items()}, "F32")
    tiny_tokenizer(path / "model")
    return path


def weights(path: Path) -> dict[str, Any]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def exported(home: Path, name: str) -> dict[str, Any]:
    """The weights of `mswift export`, which are those that the run wrote itself, bit for bit."""
    mswift("export", "--model", home / name, "--output_dir", home / f"{name}-hf")
    found, written = weights(home / f"{name}-hf"), weights(home / name / "hf-2")
    assert {n: v.tobytes() for n, v in found.items()} == {n: v.tobytes() for n, v in written.items()}
    assert json.loads((home / f"{name}-hf" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    return found


def check_copies(tensors: dict[str, Any]) -> None:
    """Programs that predict with the layer alone (vLLM) take embedding and head from it."""
    assert np.array_equal(tensors[AHEAD + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert np.array_equal(tensors[AHEAD + "shared_head.head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("stages", ["1", pytest.param("2", marks=pytest.mark.whole)])
def test_a_run_that_trains_the_layer(home: Path, stages: str) -> None:
    name, layout = f"trained-{stages}", ["--nproc_per_node", stages, "--pipeline_model_parallel_size", stages]
    flags = ["--mtp_num_layers", "1", "--mcore.mtp_loss_scaling_factor", "0.2", *layout]
    output = run(command(home, "sft", home / name, *STEPS, *flags))
    assert "1 multi-token-prediction layer, trained: loss + 0.2 x mtp_loss is minimised" in output
    rows = rundir.read_metrics(home / name)
    assert all(row["mtp_loss"] > 0 and row["mtp_loss"] != row["loss"] for row in rows)
    before, after = weights(home / "model"), exported(home, name)
    assert after.keys() == before.keys()
    check_copies(after)
    still = [name for name in before if np.array_equal(before[name], after[name])]
    assert all(name.endswith("e_score_correction_bias") for name in still)


@pytest.mark.whole
def test_a_run_that_does_not_keeps_it_bit_for_bit_and_says_so(home: Path) -> None:
    output = run(command(home, "pt", home / "kept", *STEPS))
    assert "not trained: saved and exported as they came" in output
    assert "(--mtp_num_layers 1 trains them)" in output
    assert "mtp_loss" not in rundir.read_metrics(home / "kept")[0]
    before, after = weights(home / "model"), exported(home, "kept")
    assert after.keys() == before.keys()
    check_copies(after)
    changed = {n for n in before if before[n].tobytes() != after[n].tobytes() and n not in COPIES}
    assert changed == {n for n in before if not n.startswith(AHEAD) and not n.endswith("e_score_correction_bias")}


@pytest.mark.whole
def test_an_adapter_leaves_it_to_the_base(home: Path) -> None:
    flags = ["--tuner_type", "lora", "--target_modules", "o_proj", "--modules_to_save", "embed_tokens"]
    output = run(command(home, "sft", home / "lora", "--train_iters", "2", *flags))
    assert "neither loaded nor adapted, --model keeps what it has" in output
    mswift("export", "--model", home / "lora", "--output_dir", home / "adapter")
    assert not [name for name in weights(home / "adapter") if AHEAD in name]
    merge(home / "model", [home / "adapter"], home / "merged")
    before, after = weights(home / "model"), weights(home / "merged")
    assert after.keys() == before.keys()
    check_copies(after)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert len(changed) > 3
    assert {name for name in changed if name.startswith(AHEAD)} == {COPIES[0]}  # with the embedding that it repeats
    without = {n: v.view(np.uint32) for n, v in before.items() if not n.startswith(AHEAD)}  # as transformers writes it
    write_model(home / "without", json.loads((home / "model/config.json").read_text()), without, "F32")
    merge(home / "without", [home / "adapter"], home / "merged-without")
    kept = {name: value.tobytes() for name, value in after.items() if not name.startswith(AHEAD)}
    assert {name: value.tobytes() for name, value in weights(home / "merged-without").items()} == kept
