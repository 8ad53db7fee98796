"""The experts of a rank as one autograd step: the numbers of megatron-core's own modules, in less memory."""

from typing import Any

from tests.support.family_configs import family_config
from tests.support.parity import VOCAB, difference, model_of, random_steps
from tests.support.ranks import join, run_ranks
from tests.support.spaces import MemoryReader, assemble, gather, weights_of

FAMILY = "qwen2_moe"
TOLERANCE = 5e-6


def both_ways(_payload: object) -> dict[str, Any]:
    """Two steps of a model by our experts and dispatcher, and by megatron-core's: losses and gradients."""
    from unittest.mock import patch

    dims, device = join(1)
    from mswift.parallel.megatron import experts
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine, Microbatch

    model = model_of(family_config(FAMILY, vocab_size=VOCAB, num_hidden_layers=2))
    reader: Any = MemoryReader(model.config.to_dict(), {n: w.copy() for n, w in weights_of(model).items()})

    def steps() -> dict[str, Any]:
        engine = MegatronEngine(reader.table, dims, EngineConfig(lr=1e-3), device)
        engine.load_weights(reader)
        losses = [engine.train_step([Microbatch(*batch) for batch in step], 1e-3).loss for step in random_steps()]
        gradients = gather(engine.gradients())
        engine.close()
        return {"losses": losses, "gradients": gradients}

    ours = steps()
    with (
        patch.object(experts, "_is_plain", lambda *_: False),
        patch.object(experts.LocalDispatcher, "fits", staticmethod(lambda *_: False)),
    ):
        return {"ours": ours, "megatron-core's": steps()}


def test_the_numbers_are_megatron_cores() -> None:
    (found,) = run_ranks(1, both_ways)
    ours, theirs = found["ours"], found["megatron-core's"]
    expected, computed = assemble([theirs["gradients"]]), assemble([ours["gradients"]])
    assert max(abs(a / b - 1) for a, b in zip(ours["losses"], theirs["losses"], strict=True)) < 1e-6
    apart = {name: difference(computed[name], value) for name, value in expected.items()}
    assert {name: d for name, d in apart.items() if not d <= TOLERANCE} == {}


def alone(_payload: object) -> dict[str, Any]:
    """One step of the experts function: its numbers, those of a loop in fp64, and the bytes that it keeps."""
    join(1)
    import torch

    from mswift.parallel.activations import Swiglu
    from mswift.parallel.megatron.experts import _Experts

    counts, hidden, columns = [3, 0, 5], 8, 6
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).requires_grad_()

    x, scale = random(8, hidden), random(8)
    ups, downs = [random(2 * columns, hidden) for _ in counts], [random(hidden, columns) for _ in counts]
    given = (x, scale, *ups, *downs)
    for weight in ups[1:]:
        weight.main_grad, weight.gradient_is_added = torch.ones(2 * columns, hidden), True
    kept: list[int] = []

    def keep(tensor: Any) -> Any:
        if all(tensor is not leaf for leaf in given):
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _Experts.apply(x, scale, counts, Swiglu(), *ups, *downs)  # type: ignore[no-untyped-call]
    out = _Experts.apply(x, scale, counts, Swiglu(), *ups, *downs)  # type: ignore[no-untyped-call]
    gradient = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, given, gradient)

    doubles = [tensor.detach().double().requires_grad_() for tensor in given]
    rows = zip(doubles[0].split(counts), doubles[1].split(counts), doubles[2:5], doubles[5:], strict=True)
    parts = []
    for part, weight, up, down in rows:
        gate, value = (part @ up.t()).chunk(2, dim=-1)
        parts.append((torch.nn.functional.silu(gate) * value * weight[:, None]) @ down.t())
    truth = torch.cat(parts)
    wanted = torch.autograd.grad(truth, doubles, gradient.double())
    buffers = {3: ups[1].main_grad, 4: ups[2].main_grad}  # where there is one, it has the gradient
    taken = [buffers[n] - 1 if n in buffers else value for n, value in enumerate(found)]
    return {
        "apart": [float((a - b).detach().abs().max()) for a, b in zip([out, *taken], [truth, *wanted], strict=True)],
        "kept": sum(kept),
        "marked": [getattr(weight, "grad_added_to_main_grad", False) for weight in ups],
        "rows_kept": 8 * 4 * 2 * columns,
    }


def test_one_step_equals_a_loop_in_fp64_and_keeps_the_first_product_alone() -> None:
    (found,) = run_ranks(1, alone)
    assert max(found["apart"]) < 1e-5
    assert found["kept"] == found["rows_kept"]
    assert found["marked"] == [False, True, True]
