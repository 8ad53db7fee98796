"""Each mend for mixtures of experts, and what happens without it."""

from typing import Any

import pytest

from tests.support.ranks import join, leaving_groups, run_ranks


def router_without_transformer_engine(_payload: object) -> tuple[str, list[float]]:
    """The error without the mend, the logits with it."""
    join(1)
    import torch
    from megatron.core.transformer.moe import moe_utils

    from mswift.parallel.megatron import no_te

    x, weight = torch.ones(2, 1, 3), torch.arange(6.0).view(2, 3)
    del moe_utils.te_general_gemm
    try:
        moe_utils.router_gating_linear(x, weight, None, torch.float32)
        error = ""
    except NameError as caught:
        error = str(caught)
    no_te.name_missing_kernels(moe_utils)
    return error, moe_utils.router_gating_linear(x, weight, None, torch.float32)[0, 0].tolist()


def test_the_router_needs_the_name_of_a_missing_kernel() -> None:
    ((error, logits),) = run_ranks(1, router_without_transformer_engine)
    assert "te_general_gemm" in error
    assert logits == [3.0, 12.0]


def exchange(_payload: object) -> tuple[str, list[float]]:
    """The error of all_to_all with tensors for counts, and what arrives with the mended counts."""
    join(2, ep=2)
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    rank = dist.get_rank()
    give, take = torch.tensor([1, 2]), torch.full((2,), rank + 1)
    x, out = torch.arange(3.0) + 10 * rank, torch.zeros(int(take.sum()))
    original = moe_utils.maybe_move_tensor_to_cpu(give, as_numpy=True)
    try:
        dist.all_to_all_single(out, x, take, original)
        error = ""
    except TypeError as caught:
        error = str(caught)
    counts = [token_dispatcher.maybe_move_tensor_to_cpu(t, as_numpy=True) for t in (take, give)]
    dist.all_to_all_single(out, x, *counts)
    return error, out.tolist()


def test_all_to_all_takes_numpy_counts() -> None:
    ranks = run_ranks(2, exchange)
    assert all("incompatible function arguments" in error for error, _ in ranks)
    assert [out for _, out in ranks] == [[0.0, 10.0], [1.0, 2.0, 11.0, 12.0]]


@leaving_groups
def uneven(_payload: object) -> dict[str, Any]:
    """Parts of one and of three rows: gloo's error, then gathered and reduced with their gradients."""
    dims, _ = join(2, etp=2)
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings

    from mswift.parallel.megatron import world

    world.enter(dims, 1)
    group, rank = parallel_state.get_expert_tensor_parallel_group(), dist.get_rank()
    sizes = [1, 3]
    x = (torch.arange(sizes[rank] * 2.0).view(-1, 2) + 100 * rank).requires_grad_()
    try:
        dist.all_gather([torch.empty(n, 2) for n in sizes], x.detach(), group=group)
        error = ""
    except RuntimeError as caught:
        error = str(caught)
    whole = mappings.gather_from_sequence_parallel_region(x, group=group, output_split_sizes=sizes)
    (whole * (rank + 1)).sum().backward()
    mine = mappings.reduce_scatter_to_sequence_parallel_region(whole.detach(), group=group, input_split_sizes=sizes)
    assert x.grad is not None
    return {"error": error, "whole": whole.tolist(), "gradient": x.grad.tolist(), "mine": mine.tolist()}


def test_parts_of_unequal_length_are_gathered_and_reduced() -> None:
    first, second = run_ranks(2, uneven)
    assert "invalid tensor size" in first["error"]
    rows = [[0.0, 1.0], [100.0, 101.0], [102.0, 103.0], [104.0, 105.0]]
    assert first["whole"] == second["whole"] == rows
    assert first["gradient"] == [[3.0, 3.0]]
    assert second["gradient"] == [[3.0, 3.0]] * 3
    assert first["mine"] + second["mine"] == [[2 * a, 2 * b] for a, b in rows]


def no_rows(_payload: object) -> tuple[str, float]:
    """oneDNN's error for no rows, and the sum of our products of no rows and of some."""
    join(1)
    from unittest.mock import patch

    import torch

    from mswift.parallel.megatron import cpu_linear

    x, weight = torch.empty(0, 4), torch.ones(3, 4)
    try:
        cpu_linear.onednn_product(x, weight)
        error = ""
    except RuntimeError as caught:
        error = str(caught)
    with patch.object(cpu_linear, "prefers_onednn", lambda: True):
        products = cpu_linear.product(x, weight), cpu_linear.product(weight.t(), x.new_ones(2, 3))
    return error, sum(float(product.sum()) for product in products)


def test_the_product_of_no_rows_is_torch_s() -> None:
    ((_, total),) = run_ranks(1, no_rows)
    assert total == 24.0


def cpu_linear(onednn: bool) -> list[float]:
    """Largest differences of output and gradients between CpuLinear, by either product, and torch's linear."""
    join(1)
    from unittest.mock import patch

    import torch
    import torch.distributed as dist

    from mswift.parallel.megatron import cpu_linear

    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((5, 2, 8), (6, 8), (6,))]
    theirs = torch.nn.functional.linear(*leaves)
    weights = torch.randn(theirs.shape, generator=generator)
    with patch.object(cpu_linear, "prefers_onednn", lambda: onednn):
        ours = cpu_linear.CpuLinear.apply(*leaves, False, True, False, None, 0, dist.group.WORLD)
        gradients = [torch.autograd.grad((out * weights).sum(), leaves) for out in (ours, theirs)]
    pairs = [(ours, theirs), *zip(*gradients, strict=True)]
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]


@pytest.mark.parametrize("onednn", [False, True])
def test_the_linear_is_torch_s_on_any_processor(onednn: bool) -> None:
    (differences,) = run_ranks(1, cpu_linear, onednn)
    assert max(differences) < 1e-6
