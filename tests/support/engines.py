"""The engine that some settings mean: `backend` "fsdp", or megatron-core's."""

from collections.abc import Mapping
from typing import Any


def make_engine(table: Any, dims: Any, settings: Mapping[str, Any], device: Any) -> Any:
    """Its other settings are fields of EngineConfig or FsdpConfig."""
    own = dict(settings)
    if own.pop("backend", "megatron") == "fsdp":
        from mswift.parallel.fsdp.config import FsdpConfig
        from mswift.parallel.fsdp.engine import FsdpEngine

        return FsdpEngine(table, dims, FsdpConfig(**own), device)
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine

    return MegatronEngine(table, dims, EngineConfig(**own), device)


def is_megatron(engine: Any) -> bool:
    """Whether megatron-core computes in it."""
    return type(engine).__name__ == "MegatronEngine"
