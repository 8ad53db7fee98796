"""One LoRA training twice: PEFT on transformers in one process, mswift on some ranks; the differences by tensor."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from tests.support.adapters import load_peft, random_adapter, short_name, trained_parameters
from tests.support.engines import is_megatron, make_engine
from tests.support.parity import Batch, model_of, random_model, random_steps, reference
from tests.support.ranks import join, load, run_ranks
from tests.support.spaces import assemble, gather

SETTINGS = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}


def peft_run(
    home: Path,
    model: str | Mapping[str, Any],
    targets: Sequence[str],
    saved: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    **flags: Any,
) -> dict[str, Any]:
    """Write model and random adapter under `home`; three steps of PEFT: logits, loss, norms, gradients, weights.

    model: a name of `parity.MODELS` or a config.json; settings: of the optimizer, beside SETTINGS; flags: of
    `LoraConfig.for_table`.
    """
    base = random_model(model) if isinstance(model, str) else model_of(model)
    base.save_pretrained(home / "model")  # type: ignore[operator]
    adapter = random_adapter(home / "adapter", home / "model", targets, saved, **flags)
    return peft_steps(home, load_peft(home / "model", adapter, trainable=True), settings)


def peft_steps(
    home: Path, peft: Any, settings: Mapping[str, Any] | None = None, steps: Sequence[Sequence[Batch]] | None = None
) -> dict[str, Any]:
    """Three steps of a PeftModel; `steps`: other ones."""
    names = {name for name, _ in trained_parameters(peft)}
    result = reference(peft, steps or random_steps(), SETTINGS | dict(settings or {}))
    for part in ("gradients", "weights", "momentum_buffer"):
        result[part] = {short_name(n): v for n, v in result[part].items() if short_name(n) in names}
        assert result[part].keys() == names
    return result | {"trainable": peft.get_nb_trainable_parameters()[0], "home": home}


def mswift_run(home: Path, world_size: int, layout: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The same job on `world_size` ranks.

    Options: broken (a rule left out, or "file:function"), dtype, fresh (neither load nor train), run (save there, five
    times), resume (a checkpoint to load in place of training), lora (a LoraConfig to train from its start), settings,
    documents (lengths of what is packed in a row; the same in every one).
    """
    payload = {"home": home, "world_size": world_size, "layout": dict(layout), "options": options}
    ranks = run_ranks(world_size, "tests/support/lora_parity.py:on_rank", payload)
    result = {
        name: ranks[0].get(name) for name in ("logits", "loss", "grad_norm", "trained_logits", "trainable", "dtypes")
    }
    for part, prefix in (("gradients", "gradient."), ("weights", ""), ("optimizer", "")):
        arrays = assemble([rank[part] for rank in ranks])
        result[part] = {name.removeprefix(prefix).removeprefix("adapter."): _flat(a) for name, a in arrays.items()}
    prefix = "optimizer.momentum_buffer.adapter."
    momentum = {n.removeprefix(prefix): a for n, a in result["optimizer"].items() if n.startswith(prefix)}
    return result | {"momentum_buffer": momentum, "ranks": ranks}


def _flat(array: Any) -> Any:
    """PEFT has no third axis for experts."""
    return array.reshape(len(array), -1) if array.ndim == 3 else array


def on_rank(payload: Mapping[str, Any]) -> dict[str, Any]:
    """One rank of `mswift_run`."""
    dims, device = join(payload["world_size"], **payload["layout"])
    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch
    from mswift.tuners.adapter import PeftAdapter

    home, options = payload["home"], payload["options"]
    reader = WeightReader(home / "model")
    adapter = None if "lora" in options else PeftAdapter(home / "adapter")
    lora, saved = (options["lora"], ()) if adapter is None else adapter.lora_config(reader.table, seed=7)
    numbers = SETTINGS | dict(options.get("settings", {}))
    settings = {"lora": lora, "trainable_modules": saved, "dtype": options.get("dtype", "F32")} | numbers
    if settings.get("four_bit_base") == "codes":
        from mswift.parallel.held_codes import held_codes

        settings["four_bit_base"] = held_codes(reader)
    result: dict[str, Any] = {"gradients": {}, "optimizer": {}}
    with broken_rule(options.get("broken")):
        engine = make_engine(reader.table, dims, settings, device)
        engine.load_weights(reader, resumed="resume" in options)
        if "resume" in options:
            from torch.distributed import get_rank

            from mswift.train import checkpoint

            checkpoint.load(engine, options["resume"], get_rank(), dims.world_size)
            result["optimizer"] = gather(engine.optimizer_shards())
        elif not options.get("fresh"):
            if adapter is not None:
                engine.load_adapter(adapter)
            if is_megatron := "backend" not in settings:
                _break_model(engine, options.get("broken"))
            before = _frozen_hashes(engine) if is_megatron else None
            steps = [[Microbatch(*batch) for batch in step] for step in random_steps()]
            if "documents" in options:
                steps = [[_packed(b, number, options["documents"]) for number, b in enumerate(step)] for step in steps]
            result |= _train(engine, steps, dims.dp)
            result |= _save(engine, reader, options.get("run"))
            result["base_untouched"] = _frozen_hashes(engine) == before if is_megatron else None
        result["weights"] = gather(engine.model_shards())
        result["trainable"] = engine.trainable_parameters
        result |= _held(engine) if "backend" not in settings else {"held": engine.held_bytes()}
        engine.close()
    return result


def _packed(batch: Any, number: int, documents: tuple[int, ...]) -> Any:
    """Microbatch `number` of the global batch with documents in each of its rows."""
    size = len(batch.tokens)
    return replace(batch, documents=documents * size, rows=tuple(range(number * size, (number + 1) * size)))


def _train(engine: Any, steps: Sequence[Sequence[Any]], dp: int) -> dict[str, Any]:
    result: dict[str, Any] = {"logits": engine.logits(steps[0][0].tokens).float().numpy()}
    results = []
    for step in steps:
        results.append(engine.train_step(step[engine.coordinate.dp :: dp], SETTINGS["lr"]))
        if "gradients" not in result:
            result["gradients"] = gather(engine.gradients())
            result["replicated"] = _replicated_gradients(engine) if is_megatron(engine) else {}
    result["optimizer"] = gather(engine.optimizer_shards())
    return result | {"loss": [r.loss for r in results], "grad_norm": [r.grad_norm for r in results]}


def _save(engine: Any, reader: Any, run: Path | None) -> dict[str, Any]:
    """Five checkpoints, and the logits of what they hold."""
    if run is None:
        return {}
    from torch.distributed import get_rank

    from mswift.train import checkpoint
    from mswift.train.save import save_state
    from mswift.train.side_files import side_files

    files = side_files(reader, engine.config, "base")
    for step in range(1, 6):
        state = checkpoint.RunState(
            step, 0, engine.optimizer_step, engine.dims.world_size, checkpoint.engine_layout(engine), "none", 0, {}
        )
        save_state(engine, run, state, get_rank(), files)
    return {"trained_logits": engine.logits(random_steps()[0][0][0]).float().numpy()}


def _frozen_hashes(engine: Any) -> dict[int, str]:
    from mswift.parallel.megatron.four_bit import packed

    frozen = [p.parameter for p in engine._base if not p.parameter.requires_grad]
    frozen = [p if packed(p) is None else packed(p)._codes for p in frozen]
    return {i: hashlib.sha256(p.detach().view(torch.uint8).numpy().tobytes()).hexdigest() for i, p in enumerate(frozen)}


def _replicated_gradients(engine: Any) -> dict[str, Any]:
    """Gradients of what every tensor-parallel rank holds whole, by name."""
    return {
        placed.key: placed.parameter.main_grad.clone().numpy()
        for placed in engine._trained
        if not placed.is_buffer and not getattr(placed.parameter, "tensor_model_parallel", False)
    }


def _held(engine: Any) -> dict[str, Any]:
    """What this rank keeps beside the weights: elements of gradient buffers, of masters; frozen ones with either."""
    trained = {id(p.parameter) for p in engine._trained}
    frozen = [p.parameter for p in engine._base if id(p.parameter) not in trained]
    groups = engine._optimizer._chained.param_groups
    return {
        "coordinate": engine.coordinate,
        "dtypes": {str(p.parameter.dtype) for p in engine._trained},
        "master_dtypes": {str(p.dtype) for group in groups for p in group["params"]},
        "buffered_frozen": sum(hasattr(p, "main_grad") or p.requires_grad for p in frozen),
        "num_frozen": len(frozen),
        "trained_elements": sum(p.parameter.numel() for p in engine._trained if not p.is_buffer),
        "master_elements": sum(p.numel() for group in groups for p in group["params"]),
        "gradient_elements": sum(p.parameter.main_grad.numel() for p in engine._trained if not p.is_buffer),
        "held": engine.held_bytes(),
    }


def _pass(x: torch.Tensor, **_: Any) -> torch.Tensor:
    return x


@contextmanager
def broken_rule(name: str | None) -> Iterator[None]:
    """Leave out one collective or rule of mswift.parallel.adapters on this rank."""
    from mswift.parallel import adapters, fused_lora

    places: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "copy to ranks": (fused_lora, "copy_to_tensor_model_parallel_region", _pass),
        "sum over ranks": (fused_lora, "reduce_from_tensor_model_parallel_region", _pass),
        "kv groups": (adapters, "kv_groups", lambda *_: 1),
    }
    if name is not None and ":" in name:
        with load(name)():
            yield
        return
    if name not in places:
        yield
        return
    with patch.object(*places[name]):
        yield


@torch.no_grad()
def _break_model(engine: Any, name: str | None) -> None:
    if name == "cut marks":  # on the masters, of which the gradient norm is taken
        for group in engine._optimizer._chained.param_groups:
            for parameter in group["params"]:
                parameter.tensor_model_parallel = False
    for module in engine._chunks[0].modules():
        pairs = module.pairs() if hasattr(module, "pairs") else {}
        if name == "A of k for q" and "q_proj" in pairs:
            pairs["q_proj"].lora_A.copy_(pairs["k_proj"].lora_A)
        for pair in pairs.values():
            if name == "sequence marks":
                pair.lora_A.sequence_parallel = pair.lora_B.sequence_parallel = False


def bitwise_equal(arrays: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all mappings hold the same arrays."""
    first = arrays[0]
    return all(a.keys() == first.keys() and all(np.array_equal(a[n], first[n]) for n in first) for a in arrays)
