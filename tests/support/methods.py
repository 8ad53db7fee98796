"""PEFT's methods on a tiny model: trained by PEFT and torch by hand, and by the engine on some ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from mswift.tuners.method import MethodConfig, short_name
from tests.support.adapters import table_of
from tests.support.engines import make_engine
from tests.support.parity import VOCAB, Batch, backward, random_model, random_steps
from tests.support.ranks import join
from tests.support.spaces import gather

MODEL = "qwen3"
SETTINGS: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.0, "clip_grad": 1.0}
NUM_STEPS = 4
FIELDS: Mapping[str, dict[str, Any]] = {
    "adalora": {"total_step": NUM_STEPS, "tinit": 1, "tfinal": 1, "init_r": 6, "target_r": 2, "lora_alpha": 8.0},
    "ia3": {},
    "vera": {"r": 8},
    "boft": {"boft_block_size": 8},
    "oft": {"oft_block_size": 8},
    "fourierft": {"n_frequency": 50},
    "loha": {"r": 4, "alpha": 8.0},
    "lokr": {"r": 2, "alpha": 8.0, "decompose_both": True},
    "hra": {"r": 4},
    "vblora": {"r": 2, "vector_length": 16, "num_vectors": 20},
    "miss": {"r": 8},
}
"""Small ones for the tiny model, by method."""
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def tiny() -> torch.nn.Module:
    """The model that the methods are put on."""
    return random_model(MODEL, num_hidden_layers=2, vocab_size=VOCAB)


def short_steps() -> list[list[Batch]]:
    """Two microbatches of a short row in each step."""
    return random_steps(NUM_STEPS, batch=1, length=12)


def make_home(home: Path) -> Path:
    """`home`/model: the tiny model."""
    tiny().save_pretrained(home / "model")  # type: ignore[operator]
    return home


def method_of(home: Path, name: str, targets: Sequence[str] = TARGETS, **fields: Any) -> MethodConfig:
    """The adapter of the tests."""
    return MethodConfig.for_table(
        table_of(home / "model"), name, target_modules=targets, fields=FIELDS[name] | fields, seed=7
    )


def random_peft(home: Path, config: MethodConfig, noise: float = 0.05) -> Any:
    """PEFT's model with a random adapter of this configuration, saved in `home`/<method>."""
    import json

    from peft import PeftConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = home / f"{config.method.name}-config"
    folder.mkdir(exist_ok=True)
    content = config.content(table_of(home / "model"))
    (folder / "adapter_config.json").write_text(json.dumps(content))
    peft_config = PeftConfig.from_pretrained(str(folder))
    peft_config.inference_mode = False
    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(3)
    model = get_peft_model(base, peft_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=noise)
    model.save_pretrained(home / config.method.name)
    return model


def load_method(home: Path, adapter: Path) -> Any:
    """PEFT's model with an adapter from files, of which every tensor has its value."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, str(adapter))
    there = {short_name(name): tensor for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    loaded = stored_names(model)
    assert there.keys() == loaded.keys()
    assert all(torch.equal(there[name], loaded[name]) for name in there)
    return model.eval()


def peft_steps(model: Any, steps: Sequence[Sequence[Batch]], settings: Mapping[str, Any] = SETTINGS) -> dict[str, Any]:
    """PEFT and torch by hand: logits, losses, norms, the first step's gradients, weights at the end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], settings["lr"], momentum=0.9)
    names = stored_names(model)
    result: dict[str, Any] = {"loss": [], "grad_norm": []}
    with torch.no_grad():
        result["logits"] = model(steps[0][0][0]).logits.numpy()
    for number, step in enumerate(steps, 1):
        optimizer.zero_grad()
        loss = backward(model, step)
        tuner = model.base_model
        if hasattr(tuner, "rankallocator"):  # PEFT's own code for what AdaLoRA adds to a loss
            with patch.object(tuner.model, "forward", lambda: SimpleNamespace(loss=torch.zeros(()))):
                tuner.forward().loss.backward()
        result["loss"].append(loss)
        result["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_grad"])))
        if "gradients" not in result:
            result["gradients"] = {n: p.grad.clone().numpy() for n, p in names.items() if p.grad is not None}
        optimizer.step()
        if hasattr(tuner, "rankallocator"):
            tuner.update_and_allocate(number)
    result["weights"] = {n: p.detach().clone().numpy() for n, p in names.items()}
    return result | {"trainable": model.get_nb_trainable_parameters()[0]}


def stored_names(model: Any) -> dict[str, Any]:
    """Name in PEFT's file -> tensor of a PeftModel."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True), save_embedding_layers=False)
    return {short_name(name): tensor for name, tensor in state.items()}


def engine_steps(
    home: Path,
    configs: Sequence[MethodConfig],
    world_size: int,
    settings: Mapping[str, Any],
    run: Path | None = None,
) -> list[dict[str, Any]]:
    """The same of each method's adapter in `home`, by the engine: what the first rank has, tensors put together.

    run: save half way in `run`/<method>, and go on from there once more ("resumed").
    """
    from tests.support.ranks import run_ranks
    from tests.support.spaces import assemble

    payload = {"home": home, "world_size": world_size, "configs": list(configs), "settings": dict(settings)}
    payload["run"] = run
    ranks = run_ranks(world_size, "tests/support/methods.py:on_rank", payload)
    found = []
    for one in zip(*ranks, strict=True):
        result = dict(one[0])
        for part, prefix in (("gradients", "gradient.adapter."), ("weights", "adapter."), ("start", "adapter.")):
            arrays = assemble([rank[part] for rank in one])
            result[part] = {name.removeprefix(prefix): array for name, array in arrays.items()}
        result["all"] = [(rank["weights"], rank["state"]) for rank in one]
        result["all_resumed"] = [tuple(rank["resumed"].values()) for rank in one] if run is not None else None
        found.append(result)
    return found


def on_rank(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One rank of `engine_steps`."""
    dims, device = join(payload["world_size"])
    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch
    from mswift.tuners.method_adapter import MethodAdapter

    reader, results = WeightReader(payload["home"] / "model"), []
    steps = [[Microbatch(*batch) for batch in step] for step in short_steps()]
    for config in payload["configs"]:
        settings = SETTINGS | {"backend": "fsdp", "method": config} | payload["settings"]
        engine = make_engine(reader.table, dims, settings, device)
        engine.load_weights(reader)
        result: dict[str, Any] = {"start": gather(engine.model_shards())}
        result["first"] = engine.logits(steps[0][0].tokens).float().numpy()
        engine.load_adapter(MethodAdapter(payload["home"] / config.method.name))
        result["logits"] = engine.logits(steps[0][0].tokens).float().numpy()
        done = []
        for number, step in enumerate(steps, 1):
            done.append(engine.train_step(step[engine.coordinate.dp :: dims.dp], SETTINGS["lr"]))
            if "gradients" not in result:
                result["gradients"] = gather(engine.gradients())
            if number == NUM_STEPS // 2 and payload["run"] is not None:
                saved = _save(engine, reader, payload["run"] / config.method.name)
                result["saved_logits"] = engine.logits(steps[0][0].tokens).float().numpy()
        result |= {"loss": [d.loss for d in done], "grad_norm": [d.grad_norm for d in done]}
        result["weights"] = gather(engine.model_shards())
        result["state"] = gather(engine.optimizer_shards())
        result["trainable"] = engine.trainable_parameters
        engine.close()
        if payload["run"] is not None:
            result["resumed"] = _resumed(make_engine(reader.table, dims, settings, device), reader, saved, steps)
        results.append(result)
    return results


def _save(engine: Any, reader: Any, run: Path) -> Path:
    """A checkpoint of the engine in `run`."""
    from torch.distributed import get_rank

    from mswift import rundir
    from mswift.train import checkpoint
    from mswift.train.save import save_state
    from mswift.train.side_files import side_files

    step, layout = engine.optimizer_step, checkpoint.engine_layout(engine)
    state = checkpoint.RunState(step, 0, step, engine.dims.world_size, layout, "none", 0, {})
    save_state(engine, run, state, get_rank(), side_files(reader, engine.config, "base"))
    return rundir.checkpoint_dir(run, step)


def _resumed(engine: Any, reader: Any, saved: Path, steps: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Weights and state after the rest of the steps, from a checkpoint."""
    from torch.distributed import get_rank

    from mswift.train import checkpoint

    engine.load_weights(reader, resumed=True)
    checkpoint.load(engine, saved, get_rank(), engine.dims.world_size)
    for step in steps[engine.optimizer_step :]:
        engine.train_step(step[engine.coordinate.dp :: engine.dims.dp], SETTINGS["lr"])
    result = {"weights": gather(engine.model_shards()), "state": gather(engine.optimizer_shards())}
    engine.close()
    return result
