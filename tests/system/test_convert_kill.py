"""kill -9 at random moments of a conversion: the bytes are the same each time, and few are copied twice."""

import random
from pathlib import Path

import pytest

from benchmarks.conversion.processes import command, run_until
from mswift.converters.verify import verify
from tests.support.checkpoints import random_model
from tests.system.test_convert_process import weights

WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "head_dim": 512, "vocab_size": 32000, "num_hidden_layers": 2}
MOST_LOST_BYTES = 56 << 20
"""32 MiB may be unrecorded, 8 workers may be inside a span of 1 MiB; the rest is start, frames and chance."""


@pytest.mark.parametrize("moments", [range(4), pytest.param(range(4, 14), marks=pytest.mark.whole)], ids=["4", "10"])
def test_random_moments(tmp_path: Path, moments: range) -> None:
    total = sum(t.nbytes for t in random_model(tmp_path / "hf", shards=3, **WIDE).values())
    assert run_until(command(tmp_path / "hf", tmp_path / "whole", "megatron"), None)[0] is False
    expected = weights(tmp_path / "whole")
    for moment in moments:
        generator = random.Random(moment)
        out = tmp_path / f"out{moment}"
        argv = command(tmp_path / "hf", out, "megatron", "--hash_source", "true" if moment % 2 else "false")
        killed, first = run_until(argv, generator.randrange(total // 20, total * 19 // 20))
        assert killed
        again, second = run_until(argv, None)
        assert not again
        assert first + second - total < MOST_LOST_BYTES
        assert weights(out) == expected
    assert verify(tmp_path / "hf", out).equal
