"""EVA and LoRA-GA against PEFT's own preparation from the same batches: A and B, the model's function, files.

One rank, cut over two with recomputation, whole on two, sequences shared by two. Directions are told up to their sign.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mswift.tuners.data_start import DataStart
from mswift.tuners.export import export_adapter
from mswift.tuners.lora import LoraConfig
from tests.support.adapters import table_of
from tests.support.parity import VOCAB, difference, random_model, random_steps
from tests.support.ranks import join, run_ranks
from tests.support.spaces import assemble, gather

TARGETS = ("q_proj", "k_proj", "down_proj")
CASES: dict[str, tuple[DataStart, int]] = {
    "eva": (DataStart("eva"), 4),
    "lora_ga": (DataStart("lora_ga"), 16),
    "lora_ga ArBr, weight_svd": (DataStart("lora_ga", "ArBr", "weight_svd"), 16),
    "lora_ga A2rBr, gd_scale": (DataStart("lora_ga", "A2rBr", "gd_scale"), 16),
    "lora_ga unit": (DataStart("lora_ga", scale="unit"), 16),
}
"""Name -> (how, rank); at rank 16 LoRA-GA's decomposition of 64 rows or columns is exact, not drawn."""
TOLERANCES = {"eva": 1e-5, "lora_ga": 2e-4}
"""max|a - b| / max|b|; a singular vector of a gradient moves by rounding over the gap to its neighbours."""
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "cut over two": (2, {}, {"shard_size": 2, "recompute_blocks": 2}),
    "whole on two": (2, {}, {"shard_size": 1}),
    "sequences shared by two": (2, {"cp": 2}, {"shard_size": 2}),
}


def steps_of() -> list[list[Any]]:
    """Three steps of four microbatches of two rows of 24 positions."""
    return random_steps(3, 4)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    model: Any = random_model("qwen3", num_hidden_layers=2, vocab_size=VOCAB)
    model.save_pretrained(folder / "model")
    return folder


def base_of(home: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32, attn_implementation="eager")


def by_peft(home: Path, case: str, world_size: int) -> dict[str, NDArray[Any]]:
    """A and B by their names in files, as PEFT prepares them."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import LoraGAConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora import EvaConfig, preprocess_loraga

    how, rank = CASES[case]
    model = base_of(home)
    own: dict[str, Any] = {"r": rank, "lora_alpha": 32, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    if how.kind == "eva":
        settings = PeftLoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, tau=how.tau), **own)
        peft: Any = get_peft_model(model, settings)
        batches = [batch for step in steps_of() for batch in joined(step, world_size)]
        initialize_lora_eva_weights(peft, [labelled(*batch) for batch in batches], show_progress_bar=False)
    else:
        ga = LoraGAConfig(direction=how.direction, scale=how.scale, stable_gamma=how.stable_gamma)  # type: ignore[arg-type]
        settings = PeftLoraConfig(init_lora_weights="lora_ga", lora_ga_config=ga, **own)
        preprocess_loraga(model, settings, lambda: [mean_loss(model, step).backward() for step in steps_of()] and None)
        peft = get_peft_model(model, settings)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).replace(".default.", "."): parameter.detach().numpy()
        for name, parameter in peft.named_parameters()
        if ".lora_" in name
    }


def joined(step: list[Any], world_size: int) -> list[Any]:
    """Microbatches as all ranks compute them at a time."""
    return [
        tuple(torch.cat(parts) for parts in zip(*step[first : first + world_size], strict=True))
        for first in range(0, len(step), world_size)
    ]


def labelled(tokens: torch.Tensor, _labels: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    learned = F.pad(weights[:, :-1], (1, 0)) > 0
    return {"input_ids": tokens, "labels": tokens.where(learned, -100), "attention_mask": torch.ones_like(tokens)}


def mean_loss(model: Any, step: list[Any]) -> torch.Tensor:
    """Of a global batch; all in one graph, so that PEFT counts one backward pass."""
    tokens, labels, weights = (torch.cat(parts) for parts in zip(*step, strict=True))
    losses = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@pytest.fixture(scope="module")
def wanted(home: Path) -> Any:
    return cache(lambda case, world_size: by_peft(home, case, world_size))


@pytest.fixture(scope="module")
def found(home: Path) -> Any:
    @cache
    def results(layout: str) -> dict[str, Any]:
        world_size, dims, settings = LAYOUTS[layout]
        payload = {"home": home, "world_size": world_size, "dims": dims, "settings": settings}
        payload["run"] = home / "runs" if layout == "cut over two" else None
        ranks = run_ranks(world_size, on_rank, payload)
        return {case: [rank[case] for rank in ranks] for case in CASES}

    return results


def on_rank(payload: Mapping[str, Any]) -> dict[str, Any]:
    """One rank: each case started, and one update after it."""
    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch
    from tests.support.engines import make_engine
    from tests.support.methods import _save

    dims, device = join(payload["world_size"], **payload["dims"])
    reader, found = WeightReader(payload["home"] / "model"), {}
    steps = [[Microbatch(*batch) for batch in step] for step in steps_of()]
    for case, (how, rank) in CASES.items():
        lora = LoraConfig.for_table(reader.table, rank=rank, alpha=32, target_modules=TARGETS, init=how.kind, seed=7)
        settings = {"backend": "fsdp", "lora": lora, "lr": 0.05, "optimizer": "sgd", **payload["settings"]}
        engine = make_engine(reader.table, dims, settings, device)
        engine.load_weights(reader)
        d, n = engine.coordinate.dp, dims.dp
        result: dict[str, Any] = {"before": engine.logits(steps[0][0].tokens).numpy()}
        result["said"] = engine.start_from_data([step[d::n] for step in steps], how)
        result["start"] = gather(engine.model_shards())
        result["after"] = engine.logits(steps[0][0].tokens).numpy()
        result["loss"] = [engine.train_step(step[d::n], 0.05).loss for step in steps]
        result["last"] = engine.logits(steps[0][0].tokens).numpy()
        if payload["run"] is not None:
            _save(engine, reader, payload["run"] / case.replace(" ", "-"))
        engine.close()
        found[case] = result
    return found


def apart(ours: NDArray[Any], theirs: NDArray[Any], axis: int) -> float:
    """max|a - b| / max|b| with the sign of every row (axis 1) or column (axis 0) as it fits."""
    signs = np.sign((ours * theirs).sum(axis, keepdims=True))
    return difference(ours * np.where(signs == 0, 1, signs), theirs)


SAMPLED = [name if name == "cut over two" else pytest.param(name, marks=pytest.mark.whole) for name in LAYOUTS]


@pytest.mark.parametrize("layout", SAMPLED)
@pytest.mark.parametrize("case", CASES)
def test_a_and_b_are_peft_s(home: Path, wanted: Any, found: Any, case: str, layout: str) -> None:
    ranks, (how, _) = found(layout)[case], CASES[case]
    arrays = {n.removeprefix("adapter."): a for n, a in assemble([rank["start"] for rank in ranks]).items()}
    world_size, dims, _ = LAYOUTS[layout]
    theirs = wanted(case, world_size // dims.get("cp", 1) if how.kind == "eva" else 1)
    ours = {name: array for name, array in arrays.items() if not name.endswith(".start")}
    assert ours.keys() == theirs.keys()
    worst = {n: apart(ours[n], theirs[n], 1 if ".lora_A." in n else 0) for n in ours}
    limit = TOLERANCES[how.kind] * (5 if how.scale == "weight_svd" else 1)  # which PEFT draws
    assert {name: value for name, value in worst.items() if not value <= limit} == {}
    if how.kind == "lora_ga":
        assert all(np.array_equal(arrays[n.replace(".weight", ".start")], a) for n, a in ours.items())
    base = base_of(home)
    with torch.no_grad():
        logits = base(steps_of()[0][0][0]).logits.numpy()
    for rank in ranks:
        assert difference(rank["before"], logits) < 1e-5
        assert difference(rank["after"], logits) < 1e-5
        assert rank["said"].startswith(how.kind)
    assert difference(ranks[0]["last"], ranks[0]["after"]) > 1e-3


@pytest.mark.parametrize("case", ["eva", "lora_ga"])
def test_peft_loads_what_is_exported(home: Path, found: Any, tmp_path: Path, case: str) -> None:
    from peft import PeftModel

    last = found("cut over two")[case][0]["last"]
    export_adapter(home / "runs" / case / "checkpoint-3", tmp_path / "adapter")
    peft = PeftModel.from_pretrained(base_of(home), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert difference(peft(steps_of()[0][0][0]).logits.numpy(), last) < 1e-5


def test_a_rank_of_too_few_directions_is_refused(home: Path) -> None:
    from mswift.errors import ConfigError

    for kind, text in (("eva", "of .*q_proj it takes 66 directions, 2 x --lora_rank 33, of 64"), ("lora_ga", "66")):
        with pytest.raises(ConfigError, match=text):
            LoraConfig.for_table(table_of(home / "model"), rank=33, alpha=32, target_modules=TARGETS, init=kind)
