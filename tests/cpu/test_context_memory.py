"""What autograd holds after a forward pass shrinks with the number of ranks that share a sequence."""

from typing import Any

import pytest

from tests.cpu.test_parity_context import DENSE, LATENT, start
from tests.support.ranks import join, run_ranks
from tests.support.spaces import MemoryReader

LENGTH = 512
KINDS = ("p2p", "all_gather", "a2a")


def held(payload: tuple[str, int, tuple[str, ...]]) -> dict[str, int]:
    """On a rank: bytes held by kind."""
    name, size, kinds = payload
    dims, device = join(size, cp=size)
    from benchmarks.context_parallel import held_bytes
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine

    reader: Any = MemoryReader(*start(name))
    result = {}
    for kind in kinds:
        engine = MegatronEngine(reader.table, dims, EngineConfig(cp_comm_type=kind), device)  # type: ignore[arg-type]
        engine.load_weights(reader)
        result[kind] = held_bytes(engine, LENGTH)
        engine.close()
    return result


@pytest.mark.parametrize("name", [DENSE, LATENT])
def test_each_rank_holds_its_part(name: str) -> None:
    alone = run_ranks(1, held, (name, 1, ("p2p",)))[0]["p2p"]
    for size in (2, 4):
        for rank in run_ranks(size, held, (name, size, KINDS)):
            assert {kind: b for kind, b in rank.items() if not b <= 1.15 * alone / size} == {}


SHARED = {1: ("p2p",), 2: ("a2a", "p2p"), 4: ("a2a",)}
"""Ranks -> how they share sequences: by heads (Ulysses), in a ring."""


def held_by_transformers_model(size: int) -> dict[str, int]:
    """On a rank of the engine of transformers models: bytes held by kind, parameters left out."""
    import torch

    dims, device = join(size, cp=size)
    from mswift.parallel.batch import Microbatch, rank_batches
    from tests.support.engines import make_engine

    reader: Any = MemoryReader(*start(DENSE))
    result = {}
    for kind in SHARED[size]:
        engine = make_engine(reader.table, dims, {"backend": "fsdp", "shard_size": size, "cp_comm_type": kind}, device)
        engine.load_weights(reader)
        tokens = torch.arange(LENGTH).remainder(reader.table.spec.vocab_size)[None]
        batch = rank_batches([Microbatch(tokens, tokens, torch.ones(1, LENGTH))], dims, engine.coordinate.cp)[0]
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor, engine: Any = engine, found: dict[int, int] = found) -> torch.Tensor:
            storage = tensor.untyped_storage()
            parameters = _plain(engine._tuned.model.parameters())
            if storage.data_ptr() not in {p.untyped_storage().data_ptr() for p in parameters}:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = engine._passes.forward(batch, 0)
        result[kind] = sum(found.values())
        del loss
        engine.close()
    return result


def _plain(parameters: Any) -> Any:
    """As they are in memory: the shards, or inside a layer what was gathered."""
    for parameter in parameters:
        yield parameter.to_local() if hasattr(parameter, "to_local") else parameter


def test_each_rank_of_transformers_model_holds_its_part() -> None:
    alone = run_ranks(1, held_by_transformers_model, 1)[0]["p2p"]
    for size in (2, 4):
        for rank in run_ranks(size, held_by_transformers_model, size):
            assert {kind: b for kind, b in rank.items() if not 0.8 * alone / size <= b <= 1.15 * alone / size} == {}
