"""Promise 2 for context parallelism: ranks that share sequences compute what one rank computes, packed or not.

fp32; logits, loss, gradient norm, every gradient, and weights after three steps of SGD at most 5e-6 apart
(max|a - b| / max|b| per tensor).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.support.family_configs import family_config
from tests.support.lora_parity import mswift_run, peft_run
from tests.support.parity import MODELS, VOCAB, differences, megatron_run, model_of, random_model, random_steps
from tests.support.spaces import weights_of

SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
WHAT = ("logits", "loss", "grad_norm", "gradients", "weights")
TOLERANCE = 5e-6
MODELS["latent experts"] = {
    "model_type": "deepseek_v3", "num_hidden_layers": 2, "num_key_value_heads": 4, "q_lora_rank": 24,
    "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 40, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "cp2": (2, {"cp": 2}),
    "cp2-ep2": (2, {"cp": 2, "ep": 2}),
    "cp4": (4, {"cp": 4}),
    "cp4-2x2": (4, {"cp": 4, "cp_levels": (2, 2)}),
    "cp2-dp2": (4, {"cp": 2}),
    "cp2-dp2-ep2": (4, {"cp": 2, "ep": 2}),
    "tp2-cp2": (4, {"tp": 2, "cp": 2}),
    "tp2-sp-cp2": (4, {"tp": 2, "cp": 2, "sequence_parallel": True}),
    "cp2-pp2": (4, {"cp": 2, "pp": 2}),
    "pp2": (2, {"pp": 2}),
}
DENSE, LATENT = "llama-4-groups", "latent experts"
DOCUMENTS = ((5, 11, 1, 7), (24,), (9, 15), (2, 2, 20))
"""Lengths of what is packed in the rows of 24 positions; their padded lengths differ from row to row."""


@cache
def start(name: str) -> tuple[dict[str, Any], Any]:
    """(config.json, weights) of a random model."""
    if name in MODELS:
        model = random_model(name)
    else:
        model = model_of(family_config(name, vocab_size=VOCAB, num_hidden_layers=2))
    config = {k: v for k, v in model.config.to_dict().items() if v is not None or k == "q_lora_rank"}
    return config, {n: w.copy() for n, w in weights_of(model).items()}


def steps_of(packed: bool) -> Any:
    """Three steps of two microbatches of two rows."""
    steps: Any = random_steps()
    if packed:
        pairs = (DOCUMENTS[:2], DOCUMENTS[2:])
        steps = [[(*batch, rows[0] + rows[1]) for batch, rows in zip(step, pairs, strict=True)] for step in steps]
    return steps


def run(
    name: str,
    layout: str,
    kind: str,
    *,
    packed: bool = False,
    steps: Any = None,
    broken: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Three steps of training on a layout."""
    world_size, degrees = LAYOUTS[layout]
    settings = {**SGD, "cp_comm_type": kind, **more}
    return megatron_run(*start(name), steps or steps_of(packed), settings, world_size, degrees, broken)


@cache
def one_rank(name: str, packed: bool = False) -> dict[str, Any]:
    """What every layout must equal."""
    return run(name, "one", "p2p", packed=packed)


def too_far(found: dict[str, Any], truth: dict[str, Any]) -> dict[str, float]:
    """Tensors that differ by more than the tolerance."""
    return {n: d for n, d in differences(found, truth, WHAT).items() if not d <= TOLERANCE}


KINDS = ("p2p", "all_gather", "a2a")
CASES = [(name, "cp2", kind) for name in (DENSE, LATENT, "gemma2", "gpt_oss") for kind in KINDS]
CASES += [(DENSE, "cp4", kind) for kind in KINDS]
CASES += [(name, "cp4-2x2", "a2a+p2p") for name in (DENSE, LATENT)]
CASES += [(LATENT, "cp4", "p2p"), (LATENT, "cp2-ep2", "all_gather"), (LATENT, "cp2-dp2-ep2", "p2p")]
CASES += [(DENSE, "tp2-cp2", "a2a"), (DENSE, "tp2-sp-cp2", "p2p"), (LATENT, "tp2-sp-cp2", "all_gather")]
CASES += [(DENSE, "cp2-pp2", "p2p"), (DENSE, "cp2-dp2", "all_gather")]


@pytest.mark.parametrize(("name", "layout", "kind"), CASES)
def test_three_steps_equal_those_of_one_rank(name: str, layout: str, kind: str) -> None:
    found, truth = run(name, layout, kind), one_rank(name)
    assert too_far(found, truth) == {}
    assert found["evaluated"] == pytest.approx(truth["evaluated"], rel=1e-6)


PACKED = [(name, "cp2", kind) for name in (DENSE, LATENT) for kind in KINDS]
PACKED += [(DENSE, "cp4-2x2", "a2a+p2p"), (DENSE, "cp2-pp2", "p2p"), (DENSE, "tp2-sp-cp2", "a2a")]
PACKED += [("gemma2", "cp2", "p2p"), ("gpt_oss", "cp2", "all_gather"), (LATENT, "cp2-ep2", "p2p")]


@pytest.mark.parametrize(("name", "layout", "kind"), PACKED)
def test_packed_documents_equal_those_of_one_rank(name: str, layout: str, kind: str) -> None:
    """Padding to 2 * cp differs from layout to layout; what is learned does not."""
    found, truth = run(name, layout, kind, packed=True), one_rank(name, packed=True)
    assert too_far(found, truth) == {}
    assert found["evaluated"] == pytest.approx(truth["evaluated"], rel=1e-6)


def test_lora_equals_peft(tmp_path: Path) -> None:
    truth = peft_run(tmp_path, "qwen3", ("all-linear",), ())
    found = mswift_run(tmp_path, 2, {"cp": 2})
    assert {n: d for n, d in differences(found, truth, WHAT).items() if not d <= 1e-5} == {}
    assert found["trainable"] == truth["trainable"]


def one_by_one(steps: Any) -> Any:
    """Every document of packed microbatches as a microbatch of its own, in a row of 24 positions."""
    singles = []
    for step in steps:
        singles.append([])
        for *tensors, documents in step:
            parts = zip(*(x.flatten().split(documents) for x in tensors), strict=True)
            singles[-1] += [tuple(torch.nn.functional.pad(x, (0, 24 - len(x)))[None] for x in part) for part in parts]
    return singles


@pytest.mark.parametrize("name", [DENSE, LATENT, "gemma2", "gpt_oss"])
def test_packed_documents_equal_each_document_alone(name: str) -> None:
    apart = run(name, "one", "p2p", steps=one_by_one(steps_of(packed=True)))
    found = one_rank(name, packed=True)
    what = ("loss", "grad_norm", "gradients", "weights")
    assert {n: d for n, d in differences(found, apart, what).items() if not d <= TOLERANCE} == {}


@pytest.mark.parametrize(("layout", "kind"), [("one", "p2p"), ("pp2", "p2p"), *(("cp2", kind) for kind in KINDS)])
def test_a_changed_document_moves_no_gradient_of_another(layout: str, kind: str) -> None:
    """The documents have no token in common, so that rows of the embedding's gradient belong to one of them."""
    lengths, where = (7, 12, 5), slice(7, 19)
    generator = torch.Generator().manual_seed(8)
    rows = torch.cat([torch.randint(100 * d, 100 * d + 100, (n,), generator=generator) for d, n in enumerate(lengths)])
    labels, weights = torch.randint(0, VOCAB, (1, 24), generator=generator), torch.ones(1, 24)
    moved = rows.clone()
    moved[where] = rows[where] + 500
    results = [
        run(DENSE, layout, kind, steps=[[(tokens[None], labels, weights, lengths)]], clip_grad=0.0)["gradients"]
        for tokens in (rows, moved)
    ]
    first, second = (result["model.embed_tokens.weight"] for result in results)
    others = np.r_[0:100, 200:300]
    assert np.abs(first[others]).max() > 0
    assert np.array_equal(first[others], second[others])
    assert np.abs(first[100:200]).max() > 0
    assert not second[100:200].any()


BREAKS = {
    "keys_kept": ("cp2", "p2p"),
    "softmax_of_the_last_keys": ("cp2", "p2p"),
    "gradients_of_keys_not_summed": ("cp2", "all_gather"),
    "keys_as_gathered": ("cp2", "all_gather"),
    "heads_kept_in_the_backward_pass": ("cp2", "a2a"),
    "keys_kept_between_groups": ("cp4-2x2", "a2a+p2p"),
    "dp reduce": ("cp2", "p2p"),
    "positions_of_a_whole_row": ("cp2", "p2p"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rule_is_seen(broken: str) -> None:
    layout, kind = BREAKS[broken]
    name = (
        broken
        if broken == "dp reduce"
        else f"tests/cpu/test_parity_context.py:{broken.removesuffix('_between_groups')}"
    )
    found = run(DENSE, layout, kind, broken=name)
    assert max(differences(found, one_rank(DENSE), ("gradients",)).values()) > 10 * TOLERANCE


def test_documents_that_see_each_other_are_seen() -> None:
    steps = [[batch[:3] for batch in step] for step in steps_of(packed=True)]
    found = run(DENSE, "cp2", "p2p", steps=steps)
    assert max(differences(found, one_rank(DENSE, packed=True), ("gradients",)).values()) > 10 * TOLERANCE


@contextmanager
def keys_kept() -> Iterator[None]:
    """No rank passes its keys on."""
    from mswift.parallel.attention import functions
    from mswift.parallel.attention.exchange import Passing

    with patch.object(functions, "pass_on", lambda x, _group: Passing(x, x, [])):
        yield


@contextmanager
def softmax_of_the_last_keys() -> Iterator[None]:
    """The parts of a softmax are added without their log-sum-exps."""
    from mswift.parallel.attention import softmax

    with patch.object(softmax.torch, "logaddexp", lambda _old, new: new):
        yield


@contextmanager
def gradients_of_keys_not_summed() -> Iterator[None]:
    from mswift.parallel.attention import functions

    def own(x: Any, group: Any) -> Any:
        return x.chunk(group.size())[group.rank()]

    with patch.object(functions, "sum_rows", own):
        yield


@contextmanager
def keys_as_gathered() -> Iterator[None]:
    """Rank after rank, not in the order of their positions."""
    from mswift.parallel.attention import functions

    with patch.object(functions, "rows_in_order", lambda share, _device: torch.arange(sum(share.lengths))):
        yield


@contextmanager
def heads_kept_in_the_backward_pass() -> Iterator[None]:
    from mswift.parallel.attention.exchange import _AllToAll

    with patch.object(_AllToAll, "backward", staticmethod(lambda _ctx, gradient: (gradient, None))):
        yield


@contextmanager
def positions_of_a_whole_row() -> Iterator[None]:
    """Queries and keys rotated as if a rank's rows were the first ones."""
    from mswift.parallel import rotary

    rows = lambda share, device: torch.arange(sum(share.lengths) // share.size, device=device)  # noqa: E731
    with patch.object(rotary, "positions", rows):
        yield
