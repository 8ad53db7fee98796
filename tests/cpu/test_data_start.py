"""EVA and LoRA-GA against PEFT's own preparation from the same batches: A and B, the model's function, files.

One rank, cut over two with recomputation, whole on two, sequences shared by two; experts that all tokens share, on two
with the parameters in host memory. Directions are told up to their sign.
"""

import weakref
from collections.abc import Mapping
from dataclasses import replace
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
from tests.support.family_configs import FAMILY_CONFIGS
from tests.support.parity import VOCAB, difference, model_of, random_model, random_steps
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
OFFLOADED: tuple[int, dict[str, int], dict[str, Any]] = (2, {}, {"shard_size": 2, "cpu_offload": True})


def steps_of() -> list[list[Any]]:
    """Three steps of four microbatches of two rows of 24 positions."""
    return random_steps(3, 4)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    model: Any = random_model("qwen3", num_hidden_layers=2, vocab_size=VOCAB)
    model.save_pretrained(folder / "model")
    changes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": VOCAB}
    experts: Any = model_of(FAMILY_CONFIGS["qwen2_moe"] | {"model_type": "qwen2_moe"} | changes)
    experts.save_pretrained(folder / "experts" / "model")
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
    for name, module in model.named_modules():
        if name.endswith(".shared_expert"):
            in_rows(module)
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


def in_rows(module: Any) -> None:
    """Have it computed on [b, 24, i] where it is given [b 24, i]: PEFT's EVA takes no tokens without rows."""
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].unflatten(0, (-1, 24)),))
    module.register_forward_hook(lambda _, _inputs, output: output.flatten(0, 1))


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
        run = home / "runs" if layout == "cut over two" else None
        return by_mswift(home, LAYOUTS[layout], tuple(CASES), run)

    return results


def by_mswift(
    home: Path, layout: tuple[int, dict[str, int], dict[str, Any]], cases: tuple[str, ...], run: Path | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank found; run: where a checkpoint of each is left."""
    world_size, dims, settings = layout
    payload = {"home": home, "world_size": world_size, "dims": dims, "settings": settings, "cases": cases, "run": run}
    ranks = run_ranks(world_size, on_rank, payload)
    return {case: [rank[case] for rank in ranks] for case in cases}


def on_rank(payload: Mapping[str, Any]) -> dict[str, Any]:
    """One rank: each case started, and one update after it."""
    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch
    from tests.support.engines import make_engine
    from tests.support.methods import _save

    dims, device = join(payload["world_size"], **payload["dims"])
    reader, found = WeightReader(payload["home"] / "model"), {}
    steps = [[Microbatch(*batch) for batch in step] for step in steps_of()]
    for case in payload["cases"]:
        how, rank = CASES[case]
        lora = LoraConfig.for_table(reader.table, rank=rank, alpha=32, target_modules=TARGETS, init=how.kind, seed=7)
        settings = {"backend": "fsdp", "lora": lora, "lr": 0.05, "optimizer": "sgd", **payload["settings"]}
        engine = make_engine(reader.table, dims, settings, device)
        engine.load_weights(reader)
        d, n = engine.coordinate.dp, dims.dp
        result: dict[str, Any] = {"before": engine.logits(steps[0][0].tokens).numpy()}
        result["held"] = watch_inputs(engine)
        result["said"] = engine.start_from_data([step[d::n] for step in steps], how)
        result["held"] = tuple(result["held"])
        result["start"] = gather(engine.model_shards())
        result["after"] = engine.logits(steps[0][0].tokens).numpy()
        result["loss"] = [engine.train_step(step[d::n], 0.05).loss for step in steps]
        result["last"] = engine.logits(steps[0][0].tokens).numpy()
        if payload["run"] is not None:
            _save(engine, reader, payload["run"] / case.replace(" ", "-"))
        engine.close()
        found[case] = result
    return found


def watch_inputs(engine: Any) -> list[int]:
    """After every pass through the layers one number more: how many inputs of adapted linears are in memory."""
    seen: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []
    inner = engine._tuned.model.inner

    def at_the_end(*_: Any) -> None:
        held.append(sum(each() is not None for each in seen))
        seen.clear()

    for module in inner.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda _module, inputs, _output: seen.append(weakref.ref(inputs[0])))
    inner.model.norm.register_forward_hook(at_the_end)
    return held


def apart(ours: NDArray[Any], theirs: NDArray[Any], axis: int) -> float:
    """max|a - b| / max|b| with the sign of every row (axis 1) or column (axis 0) as it fits."""
    signs = np.sign((ours * theirs).sum(axis, keepdims=True))
    return difference(ours * np.where(signs == 0, 1, signs), theirs)


SAMPLED = [name if name == "cut over two" else pytest.param(name, marks=pytest.mark.whole) for name in LAYOUTS]


@pytest.mark.parametrize("layout", SAMPLED)
@pytest.mark.parametrize("case", CASES)
def test_a_and_b_are_peft_s(home: Path, wanted: Any, found: Any, case: str, layout: str) -> None:
    world_size, dims, _ = LAYOUTS[layout]
    theirs = wanted(case, world_size // dims.get("cp", 1) if case == "eva" else 1)
    check(home, case, found(layout)[case], theirs)


@pytest.mark.parametrize("case", ["eva", "lora_ga"])
def test_linears_of_experts_that_all_share_are_given_tokens_without_rows(home: Path, case: str) -> None:
    found = by_mswift(home / "experts", OFFLOADED, (case,))[case]
    assert any("shared_expert.down_proj" in name for name in assemble([rank["start"] for rank in found]))
    check(home / "experts", case, found, by_peft(home / "experts", case, 2))


def test_layers_that_are_computed_again_let_go_of_inputs(found: Any) -> None:
    for rank in found("cut over two")["lora_ga"]:
        assert rank["held"] == (0,) * 6  # three steps of two microbatches


def check(home: Path, case: str, ranks: list[dict[str, Any]], theirs: Mapping[str, NDArray[Any]]) -> None:
    """A and B of all ranks are PEFT's, and the model computes what it did."""
    how, _ = CASES[case]
    arrays = {n.removeprefix("adapter."): a for n, a in assemble([rank["start"] for rank in ranks]).items()}
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


def test_neither_noise_nor_what_is_not_finite_goes_into_a_start(home: Path) -> None:
    """And a run that is resumed looks for no tokens to start from: this model has no tokenizer."""
    ranks = run_ranks(2, odd_on_rank, home)
    quiet, noisy = (assemble([found[name] for found in ranks]) for name in ("quiet", "noisy"))
    assert quiet.keys() == noisy.keys()
    assert all(np.array_equal(noisy[name], array) for name, array in quiet.items())
    for found in ranks:
        assert "no token of global batch 2 of 2 is learned" in found["nothing learned"]
        assert found["lora_ga"].startswith("--init_weights lora_ga: loss (nan) or gradients of global batch 1 of 2")
        assert found["eva"].startswith("--init_weights eva: inputs of linears are not finite")
        assert "tokenizer" in found["new"]
        assert found["resumed"] == "built"


def odd_on_rank(home: Path) -> dict[str, Any]:
    """What starts with noise, without learned tokens, and from broken weights come to; prompts, new and resumed."""
    from mswift.config.train import TrainConfig
    from mswift.converters.reader import WeightReader
    from mswift.errors import MswiftError
    from mswift.parallel.batch import Microbatch
    from mswift.train.engines import built_engine
    from tests.support.engines import make_engine

    dims, device = join(2)
    reader, found = WeightReader(home / "model"), {}
    steps = [[Microbatch(*batch) for batch in step] for step in random_steps(2)]
    unlearned = [replace(batch, loss_weights=torch.zeros_like(batch.loss_weights)) for batch in steps[1]]

    def start(kind: str, steps: list[Any], *, broken: bool = False, **settings: Any) -> Any:
        lora = LoraConfig.for_table(reader.table, rank=4, alpha=8, target_modules=("q_proj",), init=kind, seed=7)
        engine = make_engine(reader.table, dims, {"backend": "fsdp", "lora": lora, "shard_size": 2, **settings}, device)
        try:
            engine.load_weights(reader)
            if broken:
                with torch.no_grad():
                    engine._tuned.model.inner.model.norm.weight.to_local().fill_(torch.nan)
                    engine._tuned.model.inner.model.embed_tokens.weight.to_local().fill_(torch.nan)
            engine.start_from_data([step[engine.coordinate.dp :: 2] for step in steps], DataStart(kind))
            return gather(engine.model_shards())
        except MswiftError as error:
            return str(error)
        finally:
            engine.close()

    found["quiet"], found["noisy"] = start("lora_ga", steps), start("lora_ga", steps, neftune_alpha=20.0)
    found["nothing learned"] = start("lora_ga", [steps[0], unlearned])
    found["lora_ga"], found["eva"] = start("lora_ga", steps, broken=True), start("eva", steps, broken=True)
    text = '{"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "say it", "num_virtual_tokens": 3}'
    config = TrainConfig(model=str(home / "model"), backend="fsdp", tuner_type="prompt", tuner_config=text)
    for name in ("new", "resumed"):
        try:
            with built_engine(config, reader, dims, device, 1, resumed=name == "resumed"):
                found[name] = "built"
        except MswiftError as error:
            found[name] = str(error)
    return found


def test_a_rank_of_too_few_directions_is_refused(home: Path) -> None:
    from mswift.errors import ConfigError

    for kind, text in (("eva", "of .*q_proj it takes 66 directions, 2 x --lora_rank 33, of 64"), ("lora_ga", "66")):
        with pytest.raises(ConfigError, match=text):
            LoraConfig.for_table(table_of(home / "model"), rank=33, alpha=32, target_modules=TARGETS, init=kind)
