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
