"""The product of layouts, models and tuners against the one-rank run: what is in it, and how one case runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from mswift.topology import ParallelDims
from tests.support.family_configs import family_config
from tests.support.ranks import join, load, run_ranks

SMALL = {"vocab_size": 103, "num_hidden_layers": 4}  # 103: every layout of more than one rank has padding
MODELS: dict[str, dict[str, Any]] = {
    "dense": family_config("qwen3", **SMALL, tie_word_embeddings=True, max_window_layers=2),
    "moe": family_config("qwen2_moe", **SMALL),
    "mla": family_config("deepseek_v3", **SMALL, num_nextn_predict_layers=0),
    "mtp": family_config("deepseek_v3", **SMALL, num_nextn_predict_layers=1),
}
SP = {"sequence_parallel": True}
OPTIONS: dict[str, dict[str, Any]] = {  # of the ProofJob, for layouts whose name ends so
    "all_gather": {"cp_comm_type": "all_gather"},
    "a2a": {"cp_comm_type": "a2a"},
    "a2a+p2p": {"cp_comm_type": "a2a+p2p"},
    "packed": {"packed": True},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "tp4": (4, {"tp": 4}),
    "tp2-sp": (2, {"tp": 2, **SP}),
    "tp4-sp": (4, {"tp": 4, **SP}),
    "pp2": (2, {"pp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2-uneven": (2, {"pp": 2, "chunk_layers": (3, 1)}),
    "pp2-dp2-vpp2": (4, {"pp": 2, "vpp": 2}),
    "tp2-sp-pp2-vpp2": (4, {"tp": 2, "pp": 2, "vpp": 2, **SP}),
    "pp4": (4, {"pp": 4}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "tp2-dp2": (4, {"tp": 2}),
    "tp2-sp-dp2": (4, {"tp": 2, **SP}),
    "pp2-dp2": (4, {"pp": 2}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "tp2-sp-pp2": (4, {"tp": 2, "pp": 2, **SP}),
    "cp2": (2, {"cp": 2}),
    "cp2:all_gather": (2, {"cp": 2}),
    "cp2:a2a": (2, {"cp": 2}),
    "cp4": (4, {"cp": 4}),
    "cp4:a2a+p2p": (4, {"cp": 4, "cp_levels": (2, 2)}),
    "tp2-cp2": (4, {"tp": 2, "cp": 2}),
    "tp2-sp-cp2": (4, {"tp": 2, "cp": 2, **SP}),
    "pp2-cp2": (4, {"pp": 2, "cp": 2}),
    "pp2-cp2:packed": (4, {"pp": 2, "cp": 2}),
    "tp2-sp-pp2:packed": (4, {"tp": 2, "pp": 2, **SP}),
    "ep2-cp2": (2, {"ep": 2, "cp": 2}),
    "ep2": (2, {"ep": 2}),
    "ep4": (4, {"ep": 4}),
    "ep2-dp4": (4, {"ep": 2}),
    "etp2": (2, {"etp": 2}),
    "ep2-etp2": (4, {"ep": 2, "etp": 2}),
    "pp2-ep2": (4, {"pp": 2, "ep": 2}),
    "tp2-sp-etp1": (2, {"tp": 2, "etp": 1, **SP}),
    "tp2-sp-etp1-ep2": (2, {"tp": 2, "etp": 1, "ep": 2, **SP}),
    "tp2-sp-ep2": (4, {"tp": 2, "ep": 2, **SP}),
    "tp4-sp-etp1-ep4": (4, {"tp": 4, "etp": 1, "ep": 4, **SP}),
    "tp2-sp-pp2-etp1-ep2": (4, {"tp": 2, "pp": 2, "etp": 1, "ep": 2, **SP}),
}


def product() -> Iterator[tuple[str, str, str]]:
    """Every (model, layout, tuner) that can be: experts under TP need SP, and only experts have EP and ETP.

    Adapters leave multi-token-prediction layers out.
    """
    for model in MODELS:
        for name, (_, degrees) in LAYOUTS.items():
            of_experts = "ep" in degrees or "etp" in degrees
            needs_sp = model != "dense" and "tp" in degrees and "sequence_parallel" not in degrees
            if not needs_sp and not (of_experts and model == "dense"):
                yield from ((model, name, tuner) for tuner in (("full",) if model == "mtp" else ("full", "lora")))


def kinds(name: str) -> set[str]:
    """What a layout rests on: its axes, and the rules of its options. Each has a partner in `test_matrix.BREAKS`."""
    world_size, degrees = LAYOUTS[name]
    options = OPTIONS.get(name.partition(":")[2], {})
    dims = ParallelDims(world_size=world_size, **degrees)
    shares = {
        "tp": dims.tp, "sp": dims.sequence_parallel * 2, "pp": dims.pp, "vpp": dims.chunks, "dp": dims.dp,
        "ep": dims.ep, "etp": dims.etp or 1, "edp": dims.edp if dims.has_expert_axes else 1,
        f"cp {options.get('cp_comm_type', 'p2p')}": dims.cp,
    }  # fmt: skip
    found = {kind for kind, size in shares.items() if size > 1}
    return found | {f"packed {axis}" for axis in ("pp", "cp") if "packed" in options and shares.get(axis, dims.cp) > 1}


def job(model: str, tuner: str, **options: Any) -> dict[str, Any]:
    """Arguments of the ProofJob of a case."""
    targets = ("all-linear",) if tuner == "lora" else ()
    return {"config": MODELS[model], "target_modules": targets, **options}


@cache
def one_rank(model: str, tuner: str, packed: bool) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(what one rank computes, the same with sums in another order)."""
    return references(job(model, tuner, packed=packed))


def references(arguments: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The same of any ProofJob."""
    payloads = [{"job": {**arguments, "other_order": other}, "degrees": {}} for other in (False, True)]
    first, second = (run_ranks(1, on_rank, payload)[0] for payload in payloads)
    return first, second


def differences(model: str, layout: str, tuner: str, broken: str | None = None) -> Sequence[Any]:
    """Every `Difference` of a case; `broken`: a rule left out (`tests.support.parity.broken_rule`)."""
    world_size, degrees = LAYOUTS[layout]
    options = OPTIONS.get(layout.partition(":")[2], {})
    truth = one_rank(model, tuner, options.get("packed", False))
    return proof(job(model, tuner, **options), world_size, degrees, truth, broken)


def proof(
    arguments: Mapping[str, Any],
    world_size: int,
    degrees: Mapping[str, Any],
    truth: tuple[Mapping[str, Any], Mapping[str, Any]],
    broken: str | None = None,
) -> Sequence[Any]:
    """Every `Difference` of any ProofJob on any layout."""
    from mswift.train.proof import compare

    found = run_ranks(world_size, on_rank, {"job": arguments, "degrees": degrees, "broken": broken})[0]
    return compare(found, *truth)


def on_rank(payload: Mapping[str, Any]) -> Any:
    """One rank of a case."""
    import torch.distributed as dist

    from mswift.launchers.environment import current

    info = current()
    dims, device = join(info.world_size if info else 1, **payload["degrees"])
    assert dist.get_world_size() == dims.world_size
    from mswift.train.proof import ProofJob
    from mswift.train.prove import run

    with broken_rule(payload.get("broken")):
        return run(ProofJob(**payload["job"]), dims, device)


@contextmanager
def broken_rule(name: str | None) -> Iterator[None]:
    """A rule of the dense model or of the adapters left out on this rank, or "file:function", a context manager."""
    from tests.support import lora_parity, parity

    if name is not None and ":" in name:
        with load(name)():
            yield
        return
    with parity.broken_rule(name), lora_parity.broken_rule(name):
        yield
