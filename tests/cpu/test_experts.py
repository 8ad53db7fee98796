"""The experts of a rank as one autograd step: the numbers of megatron-core's own modules, in less memory."""

from typing import Any

from tests.support.family_configs import family_config
from tests.support.parity import VOCAB, difference, differences, megatron_run, model_of, random_steps, reference
from tests.support.ranks import join, run_ranks
from tests.support.spaces import MemoryReader, assemble, gather, weights_of

FAMILY = "qwen2_moe"
TOLERANCE = 5e-6
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}


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
    """One step of the experts, some with adapters: how far from a loop in fp64, and the bytes that it keeps."""
    join(1)
    import torch
    import torch.nn.functional as F

    from mswift.parallel.activations import Swiglu
    from mswift.parallel.megatron.experts import _Experts, _Plan

    counts, factors, hidden, columns, rank = [3, 0, 5], [0.5, 0.0, 2.0, 0.0, 0.0, 1.5], 8, 6, 2
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).requires_grad_()

    sizes = [(2 * columns, hidden)] * 3 + [(hidden, columns)] * 3
    linears = [
        (random(o, i), *((random(rank, i), random(o, rank)) if factor else (None, None)))
        for factor, (o, i) in zip(factors, sizes, strict=True)
    ]
    added = [weight for weight, _, _ in linears[1:3]]  # the second expert has no tokens
    for weight in added:
        weight.main_grad, weight.gradient_is_added = torch.ones_like(weight), True
    x, scale, flat = random(8, hidden), random(8), [tensor for linear in linears for tensor in linear]
    leaves = [x, scale, *(tensor for tensor in flat if tensor is not None)]
    plan, kept = _Plan(counts, factors, Swiglu()), []

    def keep(tensor: Any) -> Any:
        if all(tensor is not leaf for leaf in leaves):
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _Experts.apply(x, scale, plan, *flat)  # type: ignore[no-untyped-call]
    out = _Experts.apply(x, scale, plan, *flat)  # type: ignore[no-untyped-call]
    gradient = torch.randn(out.shape, generator=generator)
    found = list(torch.autograd.grad(out, leaves, gradient))
    for number, leaf in enumerate(leaves):
        if any(leaf is weight for weight in added):  # the buffer has its gradient, beside what was in it
            found[number] = leaf.main_grad - 1

    doubles = {id(leaf): leaf.detach().double().requires_grad_() for leaf in leaves}

    def whole(linear: Any, factor: float) -> Any:
        weight, a, b = (doubles.get(id(tensor)) for tensor in linear)
        return weight if a is None else weight + factor * b @ a

    wholes = [whole(linear, factor) for linear, factor in zip(linears, factors, strict=True)]
    parts = []
    for rows, weights, up, down in zip(
        doubles[id(x)].split(counts), doubles[id(scale)].split(counts), wholes[:3], wholes[3:], strict=True
    ):
        gate, value = (rows @ up.t()).chunk(2, dim=-1)
        parts.append((F.silu(gate) * value * weights[:, None]) @ down.t())
    truth = torch.cat(parts)
    wanted = torch.autograd.grad(truth, list(doubles.values()), gradient.double())
    pairs = zip([out, *found], [truth, *wanted], strict=True)
    return {
        "apart": [float(((a - b).abs().max() / b.abs().max().clamp(min=1)).detach()) for a, b in pairs],
        "kept": sum(kept),
        "first product": 8 * 4 * 2 * columns,
        "marked": [getattr(weight, "grad_added_to_main_grad", False) for weight in added],
    }


def test_one_step_equals_a_loop_in_fp64_and_keeps_the_first_product_alone() -> None:
    (found,) = run_ranks(1, alone)
    assert max(found["apart"]) < TOLERANCE
    assert found["kept"] == found["first product"]
    assert found["marked"] == [True, True]


def onednn() -> Any:
    """The products of an AMD processor, whichever is at work."""
    from unittest.mock import patch

    from mswift.parallel.megatron import cpu_linear

    return patch.object(cpu_linear, "prefers_onednn", lambda: True)


def test_an_expert_without_rows_in_one_microbatch_keeps_its_gradient_of_the_others() -> None:
    """Experts with biases are modules of megatron-core; 8 tokens a microbatch leave some of 8 experts without any."""
    changes = {"num_local_experts": 8, "num_experts_per_tok": 1, "experts_per_token": 1, "num_hidden_layers": 2}
    config = family_config("gpt_oss", vocab_size=VOCAB, **changes)
    model, steps = model_of(config), random_steps(1, num_microbatches=4, batch=1, length=8)
    start = {name: weight.copy() for name, weight in weights_of(model).items()}
    wanted = reference(model, steps, SGD)
    found = megatron_run(model.config.to_dict(), start, steps, SGD, 1, {}, "tests/cpu/test_experts.py:onednn")
    apart = differences(found, wanted, ("loss", "grad_norm", "gradients"))
    assert {name: d for name, d in apart.items() if not d <= 1e-5} == {}
