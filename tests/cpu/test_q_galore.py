"""Q-GaLore: codes against torch's own quantisation, its parts against GaLore, when a projection is found anew."""

from typing import Any

import pytest
import torch

from mswift.config.optimizers import QUANTIZED, LowRank, state_bytes, state_of

pytest.importorskip("bitsandbytes", reason="pip install 'mswift[optim]'")

LR, DECAY, RANK, GAP = 1e-2, 0.1, 4, 2
VALUES = {
    "around zero": lambda: torch.randn(7, 37),
    "positive": lambda: torch.rand(5, 16) + 3,
    "negative": lambda: -torch.rand(5, 16) - 3,
    "far from each other": lambda: torch.randn(8, 32) * 10.0 ** torch.arange(-6.0, 2.0)[:, None],
    "zeros": lambda: torch.zeros(2, 16),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", VALUES)
def test_codes_are_torchs_and_the_nearest(kind: str, bits: int) -> None:
    from mswift.parallel.fsdp.projection import Codes

    torch.manual_seed(1)
    values, group = VALUES[kind](), 16
    codes = Codes.of(values, bits, group)
    found = codes.values(tuple(values.shape), bits)
    assert codes.codes.numel() == len(codes.scale) * group * bits // 8
    by_group = torch.zeros(len(codes.scale) * group)
    by_group[: values.numel()] = values.flatten()
    wanted = torch.fake_quantize_per_channel_affine(
        by_group.view(-1, group), codes.scale, codes.zero.int(), 0, 0, 2**bits - 1
    ).flatten()[: values.numel()]
    assert torch.allclose(found.flatten(), wanted, rtol=1e-6, atol=0)
    scale = codes.scale.repeat_interleave(group)[: values.numel()].view_as(values)
    assert bool(((found - values).abs() <= scale * (0.5 + 1e-4)).all())
    spread = by_group.view(-1, group).amax(1).clamp(min=0) - by_group.view(-1, group).amin(1).clamp(max=0)
    assert torch.allclose(codes.scale, spread / (2**bits - 1), rtol=1e-6, atol=1e-11)


def _rule(kind: str, **flags: Any) -> tuple[Any, list[Any]]:
    """(the library, its two stand-ins [6, 24] and [24, 6]); flags of the quantised rule."""
    from mswift.parallel.fsdp.config import HfSettings
    from mswift.parallel.fsdp.libraries import GaLore
    from mswift.parallel.fsdp.q_galore import QGaLore

    quantized = kind == QUANTIZED
    config = HfSettings(
        optimizer="galore", lr=LR, galore_rank=RANK, galore_update_proj_gap=GAP, galore_quantization=quantized, **flags
    )
    torch.manual_seed(2)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 24), (24, 6))]
    settings = [{"params": matrices, "weight_decay": DECAY}]
    return (QGaLore if quantized else GaLore)(config, settings, [1, 2]), matrices


def _train(rule: Any, matrices: list[Any], steps: int, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        rule.step()


def test_without_codes_and_without_waiting_it_is_galore() -> None:
    """Moments of so few elements are in fp32."""
    pytest.importorskip("galore_torch", reason="pip install 'mswift[optim]'")
    (ours, mine), (theirs, wanted) = (
        _rule(QUANTIZED, galore_proj_quant=False, galore_cos_threshold=2.0), _rule("galore"),
    )  # fmt: skip
    for steps in (1, 1, 5):
        _train(ours, mine, steps)
        _train(theirs, wanted, steps)
        for a, b in zip(mine, wanted, strict=True):
            assert float((a - b).detach().abs().max() / b.detach().abs().max()) < 1e-6
    start = _rule("galore")[1]
    assert all(float((a - b).detach().abs().max()) > 5 * LR / 4 for a, b in zip(mine, start, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_projection_in_codes_is_near_the_leading_directions(bits: int) -> None:
    """Of values spread over six of their deviations, evenly rounded: 6 / 15 / sqrt(12) of one, or 6 / 255 / sqrt(12).

    The gradient's projection is as near.
    """
    from mswift.parallel.fsdp.projection import Projection

    torch.manual_seed(7)
    for shape in ((96, 64), (64, 96)):
        gradient = torch.randn(shape)
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        wanted = right[:RANK] if shape[0] >= shape[1] else left[:, :RANK]
        small = gradient @ wanted.t() if shape[0] >= shape[1] else wanted.t() @ gradient
        projection = Projection(LowRank(RANK, True, bits), GAP)
        projection.renew(gradient, 0, 0.4, 2)
        for found, exact in ((projection.matrix, wanted), (projection.project(gradient), small)):
            assert 0 < float((found - exact).norm() / exact.norm()) < 6 / (2**bits - 1) / 12**0.5 * 1.2
        assert torch.allclose(projection.back(projection.project(gradient)).norm(), small.norm(), rtol=0.1)


def test_a_projection_that_stays_is_found_anew_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap doubles once two similarities are known, and at every search from then on: 0 2 4 8 16 32."""
    from mswift.parallel.fsdp.projection import Projection

    searches: list[int] = []
    svd = torch.linalg.svd
    torch.manual_seed(4)
    fixed = torch.randn(12, 8)
    for threshold, wanted in ((0.4, [0, 2, 4, 8, 16, 32]), (1.5, list(range(0, 40, 2)))):
        projection = Projection(LowRank(RANK, True, 4, 16, 2), GAP)
        searches.clear()
        for step in range(40):

            def counted(*args: Any, step: int = step, **named: Any) -> Any:
                searches.append(step)
                return svd(*args, **named)

            monkeypatch.setattr(torch.linalg, "svd", counted)
            projection.renew(fixed * (-1) ** step, step, threshold, 2)
        assert searches == wanted
    assert projection.similarities == pytest.approx([1, 1], abs=0.05)


def test_directions_that_change_keep_the_gap() -> None:
    from mswift.parallel.fsdp.projection import Projection

    torch.manual_seed(5)
    projection = Projection(LowRank(RANK, True, 4, 16, 5), GAP)
    for step in range(40):
        projection.renew(torch.randn(64, 48), step, 0.4, 2)
    assert projection.gap == GAP
    assert len(projection.similarities) == 5
    assert max(projection.similarities) < 0.6


@pytest.mark.parametrize("flags", [{}, {"galore_proj_bits": 8}, {"galore_proj_quant": False}])
def test_what_is_saved_is_all_there_is(flags: dict[str, Any]) -> None:
    whole, matrices = _rule(QUANTIZED, galore_queue_size=2, **flags)
    _train(whole, matrices, 5)
    halves, others = _rule(QUANTIZED, galore_queue_size=2, **flags)
    for other, matrix in zip(others, matrices, strict=True):
        other.data = matrix.data.clone()
        saved = {key: tensor.clone() for key, tensor in whole.tensors(matrix).items()}
        low_rank = LowRank(
            RANK, True, 32 if flags.get("galore_proj_quant") is False else flags.get("galore_proj_bits", 4), 256, 2
        )
        wanted = state_of(QUANTIZED, tuple(matrix.shape), low_rank)
        dtypes = {"U8": torch.uint8, "F32": torch.float32}
        assert {k: (tuple(t.shape), t.dtype) for k, t in saved.items()} == {
            k: (shape, dtypes[dtype]) for k, (shape, dtype) in wanted.items()
        }
        halves.restore(other, saved, 5)
    for rule, parameters in ((whole, matrices), (halves, others)):
        _train(rule, parameters, 9, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(matrices, others, strict=True))


def test_state_is_a_quarter_of_galores() -> None:
    """Of a layer of LLaMA 7B: 4 bits of 32 for the projection, 8 for moments, and their scales."""
    shape, rank = (4096, 11008), 1024
    ours = state_bytes(QUANTIZED, shape, LowRank(rank, True, 4))
    theirs = state_bytes("galore", shape, LowRank(rank))
    assert ours < 0.24 * theirs
