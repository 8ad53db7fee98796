"""The engine that some settings mean: `backend` "fsdp", "deepspeed", or megatron-core's."""

from collections.abc import Iterator, Mapping
from typing import Any


def make_engine(table: Any, dims: Any, settings: Mapping[str, Any], device: Any) -> Any:
    """Its other settings are fields of EngineConfig or FsdpConfig; with "deepspeed" `deepspeed` is as the flag."""
    own = dict(settings)
    backend = own.pop("backend", "megatron")
    if backend == "deepspeed":
        return _deepspeed_engine(table, dims, own, device)
    if backend == "fsdp":
        from mswift.parallel.fsdp.config import FsdpConfig
        from mswift.parallel.fsdp.engine import FsdpEngine

        return FsdpEngine(table, dims, FsdpConfig(**own), device)
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine

    return MegatronEngine(table, dims, EngineConfig(**own), device)


def is_megatron(engine: Any) -> bool:
    """Whether megatron-core computes in it."""
    return type(engine).__name__ == "MegatronEngine"


def _deepspeed_engine(table: Any, dims: Any, own: dict[str, Any], device: Any) -> Any:
    """With `gradients`, which the other engines keep: what torch's rule is given in each step, by its flat tensors."""
    from mswift.config.deepspeed import read_zero
    from mswift.parallel.deepspeed.config import DeepspeedConfig
    from mswift.parallel.deepspeed.engine import DeepspeedEngine
    from mswift.parallel.mapped import shards

    engine = DeepspeedEngine(table, dims, DeepspeedConfig(zero=read_zero(own.pop("deepspeed")), **own), device)
    seen: dict[int, Any] = {}

    def keep(rule: Any, *_: Any) -> None:
        flats = [flat for group in rule.param_groups for flat in group["params"]]
        seen.update({id(flat): flat.grad.clone() for flat in flats})

    def gradients() -> Iterator[Any]:
        for name, mapped, box in engine._weights.answered(engine._tuned.trained):
            fragment = engine._zero.fragment(name)
            yield from shards(mapped, box.region, box.of(fragment.of(seen[id(fragment.flat)])), "gradient.")

    engine._zero._rule.register_step_pre_hook(keep)
    engine.gradients = gradients
    return engine
