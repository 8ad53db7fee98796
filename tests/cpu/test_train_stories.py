"""The whole way round with real weights: laid out by Megatron-core, saved, exported, and the published text comes out.

stories260K (MIT, karpathy/tinyllamas), at head size 8 and 32; text and losses are published with it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mswift.config.export import ExportConfig
from mswift.handover import export
from tests.support.ranks import join, run_ranks
from tests.support.shared import shared_file

MODELS = ("stories260K-hf", "stories260K-hd32-hf")
LAYOUTS: dict[int, list[dict[str, int]]] = {
    4: [{"tp": 4}],
    10: [{"tp": 2}, {"pp": 5}, {"tp": 2, "pp": 5}],
}
"""World size -> degrees; what is left of the ranks is data parallel. Ten processes serve three layouts."""


def on_rank(payload: Mapping[str, Any]) -> dict[str, float]:
    """For every layout and model: load, evaluate the golden tokens, save without training. Losses by output."""
    losses = {}
    for output, model, degrees in payload["cases"]:
        dims, device = join(payload["world_size"], **degrees)
        from mswift.converters.reader import WeightReader
        from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine
        from mswift.train import checkpoint
        from mswift.train.save import save_state
        from mswift.train.side_files import side_files

        reader = WeightReader(Path(model))
        engine = MegatronEngine(reader.table, dims, EngineConfig(), device)
        engine.load_weights(reader)
        losses[output] = _mean_loss(engine, payload["tokens"])
        rank = dims.rank(engine.coordinate)
        layout = checkpoint.engine_layout(engine)
        state = checkpoint.RunState(0, 0, 0, dims.world_size, layout, "none", 1, {})
        save_state(engine, Path(output), state, rank, side_files(reader, engine.config, model))
        engine.close()
    return losses


def _mean_loss(engine: Any, tokens: list[int]) -> float:
    """Mean loss of predicting each token from those before it; only one data-parallel rank has them."""
    import torch

    from mswift.parallel.megatron.engine import Microbatch

    ids = torch.tensor([tokens])
    weights = torch.ones(1, len(tokens) - 1) * (engine.coordinate.dp == 0)
    (loss, weight), _ = engine.evaluate([Microbatch(ids[:, :-1], ids[:, 1:].contiguous(), weights)])
    return loss / weight


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_zero_steps_at_every_layout(world_size: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    golden = json.loads(shared_file("data/weights/stories260K-golden.json").read_text(encoding="utf-8"))
    models = [shared_file(f"data/weights/{name}") for name in MODELS]
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    tokens = tokenizer(golden["teacher_forced"]["text"])["input_ids"]
    assert len(tokens) == golden["teacher_forced"]["num_tokens"]
    cases = [
        (str(tmp_path / f"{model.name}-{index}"), str(model), degrees)
        for model in models
        for index, degrees in enumerate(LAYOUTS[world_size])
    ]
    payload = {"world_size": world_size, "cases": cases, "tokens": tokens}
    losses = run_ranks(world_size, on_rank, payload, timeout=400)
    for output, model, degrees in cases:
        for rank in losses:
            assert rank[output] == pytest.approx(golden["teacher_forced"]["mean_loss"], abs=1e-5), degrees
        exported = Path(output) / "hf"
        assert export.main(ExportConfig(model=output, output_dir=str(exported))) == 0
        assert (exported / "config.json").read_bytes() == (Path(model) / "config.json").read_bytes()
        text = _greedy(AutoModelForCausalLM.from_pretrained(exported), tokenizer, golden["greedy"])
        assert len(text) == 565
        assert text == golden["greedy"]["text"], degrees


def _greedy(model: Any, tokenizer: Any, golden: Mapping[str, Any]) -> str:
    """transformers' own greedy continuation, without the prompt."""
    import torch

    prompt = torch.tensor([golden["prompt_ids"]])
    output = model.generate(prompt, max_new_tokens=golden["max_new_tokens"], do_sample=False)
    return str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
