"""Prompt learning against PEFT on transformers in one process: counts, loss, gradients, weights, files.

fp32; at most 1e-5 from PEFT (max|a - b| / max|b| per tensor): one rank, cut over two with recomputation, packed, packed
on two ranks that share sequences.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mswift.tuners.export import export_adapter
from mswift.tuners.prompt_modules import Keys, PrefixKeys, PromptEmbeddings
from tests.support.parity import VOCAB, difference, differences, random_model
from tests.support.prompts import CASES, DOCUMENTS, Behind, on_rank, peft_steps, prompt_of, steps_of
from tests.support.ranks import run_ranks
from tests.support.spaces import assemble

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], tuple[int, ...] | None]] = {
    "one": (1, {}, {}, None),
    "cut over two": (2, {}, {"shard_size": 2, "recompute_blocks": 2}, None),
    "packed": (1, {}, {}, DOCUMENTS),
    "packed, shared": (2, {"cp": 2}, {"shard_size": 2}, DOCUMENTS),
}
WHAT = ("logits", "loss", "grad_norm", "gradients", "weights", "last")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    random_model("qwen3", num_hidden_layers=2, vocab_size=VOCAB).save_pretrained(folder / "model")  # type: ignore[operator]
    return folder


@pytest.fixture(scope="module")
def wanted(home: Path) -> Any:
    """(case, packed) -> what PEFT computes."""
    return cache(lambda case, packed: peft_steps(home, prompt_of(home, case), DOCUMENTS if packed else None))


@pytest.fixture(scope="module")
def found(home: Path) -> Any:
    """Layout -> case -> what the engine computes."""

    @cache
    def results(layout: str) -> dict[str, Any]:
        world_size, dims, settings, documents = LAYOUTS[layout]
        payload = {
            "home": home, "world_size": world_size, "layout": dims, "settings": settings, "documents": documents,
            "configs": [prompt_of(home, case) for case in CASES],
            "run": home / "runs" if layout == "cut over two" else None,
        }  # fmt: skip
        by_case = {}
        for case, one in zip(CASES, zip(*run_ranks(world_size, on_rank, payload), strict=True), strict=True):
            result = dict(one[0])
            for part, prefix in (("gradients", "gradient.adapter."), ("weights", "adapter.")):
                arrays = assemble([rank[part] for rank in one])
                result[part] = {name.removeprefix(prefix): array for name, array in arrays.items()}
            result["each"] = [(rank["weights"], rank["state"], rank.get("resumed")) for rank in one]
            by_case[case] = result
        return by_case

    return results


SAMPLED = [pytest.param(name, marks=pytest.mark.whole) if name in ("one", "packed") else name for name in LAYOUTS]


@pytest.mark.parametrize("layout", SAMPLED)
@pytest.mark.parametrize("case", CASES)
def test_equals_peft(home: Path, wanted: Any, found: Any, case: str, layout: str) -> None:
    theirs, ours = wanted(case, LAYOUTS[layout][3] is not None), dict(found(layout)[case])
    made = dict(ours["weights"]).pop("prompt_embeddings")
    if prompt_of(home, case).has_network:
        ours["weights"] = {name: array for name, array in ours["weights"].items() if name != "prompt_embeddings"}
        assert made.shape == prompt_of(home, case).shapes()["prompt_embeddings"]
    assert ours["trainable"] == theirs["trainable"]
    apart = differences(ours, theirs, WHAT)
    assert {name: value for name, value in apart.items() if not value <= 1e-5} == {}
    assert difference(theirs["last"], theirs["logits"]) > 1e-4


@pytest.mark.parametrize("name", ["gemma2", "starcoder2"])
def test_models_with_windows_and_scaled_embeddings(tmp_path: Path, name: str) -> None:
    model: Any = random_model(name, num_hidden_layers=2, vocab_size=VOCAB)
    model.save_pretrained(tmp_path / "model")
    configs = [prompt_of(tmp_path, case) for case in ("prompt", "prefix")]
    payload = {"home": tmp_path, "world_size": 1, "layout": {}, "settings": {}, "documents": None, "run": None}
    (found,) = run_ranks(1, on_rank, payload | {"configs": configs})
    for config, ours in zip(configs, found, strict=True):
        theirs = peft_steps(tmp_path, config)
        apart = differences(ours, theirs, ("logits", "loss", "grad_norm", "last"))
        assert {what: value for what, value in apart.items() if not value <= 1e-5} == {}, config.kind


@pytest.fixture
def threads() -> Iterator[None]:
    """Several in torch's kernels, also on a machine of one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_gradients_are_the_same_bits_each_time(kind: str) -> None:
    """On tensors that are large enough for torch to share out among threads."""
    rows, length, hidden, count, heads = 16, 256, 64, 8, 2
    ids = torch.randint(0, 50, (rows, length))
    ids[:, :count] = -1 - torch.arange(count)
    out, weight = torch.randn(rows, length, hidden), torch.randn(rows, heads, length, hidden)

    def gradient() -> bytes:
        vectors = torch.ones(count, hidden if kind == "prompt" else 2 * heads * hidden, requires_grad=True)
        if kind == "prompt":
            (PromptEmbeddings(lambda: vectors).embedded(ids, out) * weight[:, 0]).sum().backward()
        else:
            told: list[Keys] = []
            PrefixKeys(lambda: vectors, 1, told.append).embedded(ids, out)
            key, value = told[0](0, torch.zeros_like(weight), torch.zeros_like(weight))
            ((key + value) * weight).sum().backward()
        assert vectors.grad is not None
        assert vectors.grad.abs().min() > 0
        return vectors.grad.numpy().tobytes()

    assert len({gradient() for _ in range(20)}) == 1


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_run(found: Any, case: str) -> None:
    for weights, state, resumed in found("cut over two")[case]["each"]:
        for ours, theirs in ((weights, resumed["weights"]), (state, resumed["state"])):
            assert ours.keys() == theirs.keys()
            for key, (_, boxes) in ours.items():
                pairs = zip(boxes, theirs[key][1], strict=True)
                assert all(np.array_equal(one[-1], other[-1]) for one, other in pairs), key


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_exported(home: Path, found: Any, tmp_path: Path, case: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = found("cut over two")[case]
    export_adapter(home / "runs" / str(list(CASES).index(case)) / "checkpoint-3", tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32, attn_implementation="eager")
    peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        logits = Behind(peft)(steps_of()[0][0][0]).logits.numpy()
    assert difference(logits, result["last"]) <= 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "dtype", "count"),
    [
        ("qwen3", {}, torch.float32, 3),
        ("qwen3", {}, torch.float32, 12),
        ("gemma2", {}, torch.float32, 3),
        ("gemma2", {"hidden_size": 96}, torch.bfloat16, 12),
    ],
)
def test_a_start_of_real_tokens_is_peft_s(
    tmp_path: Path, name: str, changes: dict[str, Any], dtype: torch.dtype, count: int
) -> None:
    """A text that is cut, and one that is repeated; tokens that are drawn; embeddings that are scaled."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from mswift.converters.layout import Region
    from mswift.converters.reader import WeightReader
    from mswift.train.prompt_start import token_start
    from tests.support.tiny import tiny_tokenizer

    home = tmp_path
    model: Any = random_model(name, num_hidden_layers=2, vocab_size=VOCAB, **changes)
    model.to(dtype).save_pretrained(home / "model")
    tiny_tokenizer(home / "model")
    reader = WeightReader(home / "model")
    text = {"num_virtual_tokens": count, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "say it"}
    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=dtype)
    peft: Any = get_peft_model(
        base, PromptTuningConfig(task_type="CAUSAL_LM", tokenizer_name_or_path=str(home / "model"), **text)
    )
    start = token_start(prompt_of(home, "prompt", **text), reader)
    assert start is not None
    wanted = peft.prompt_encoder["default"].embedding.weight.detach()
    start.check({"prompt_embeddings": tuple(wanted.shape)})
    assert torch.equal(start.read("prompt_embeddings", Region.full(tuple(wanted.shape))), wanted)
    drawn = prompt_of(home, "prompt", num_virtual_tokens=count, prompt_tuning_init="SAMPLE_VOCAB")
    sampled = token_start(drawn, reader)
    assert sampled is not None
    rows = sampled.read("prompt_embeddings", Region.full(tuple(wanted.shape)))
    table = base.get_input_embeddings()(torch.arange(VOCAB)).float()
    assert (rows[:, None] == table[None]).all(-1).any(-1).all()
    assert len(rows.unique(dim=0)) == count
    assert token_start(prompt_of(home, "prompt"), reader) is None
