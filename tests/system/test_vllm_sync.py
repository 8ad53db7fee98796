"""Weights of a live Megatron engine into a live vLLM of the same process, and what is refused on the way."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from mswift.converters.arrays import to_hf
from mswift.converters.reader import WeightReader
from mswift.errors import CheckpointError, MswiftError
from mswift.infer.backends import EngineConfig, open_engine
from mswift.infer.request import BASE_MODEL, Request, Sampling
from mswift.train.proof_tensors import assemble, gather
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.support.vllm import needs_vllm

pytestmark = needs_vllm
QUESTION = Sampling(max_new_tokens=20, logprobs=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sync")
    tiny_model(path / "model", head_dim=32, vocab_size=259, use_cache=True, tie_word_embeddings=True)
    tiny_tokenizer(path / "model")
    return path


@pytest.fixture(scope="module")
def trainer() -> Iterator[Any]:
    """Makes Megatron engines on one rank, one at a time."""
    from mswift.launchers.environment import RankInfo
    from mswift.parallel import device, groups
    from mswift.parallel.megatron.engine import EngineConfig as TrainConfig
    from mswift.parallel.megatron.engine import MegatronEngine
    from mswift.topology import ParallelDims

    chosen, dims = device.prepare("cpu"), ParallelDims()
    groups.init(dims, chosen, RankInfo.single())
    engines: list[Any] = []

    def make(model: Path, lora: Any = None) -> Any:
        reader = WeightReader(model)
        while engines:
            engines.pop().close()
        engines.append(MegatronEngine(reader.table, dims, TrainConfig(lora=lora, lr=0.05, optimizer="sgd"), chosen))
        engines[-1].load_weights(reader)
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    groups.destroy()


def step(engine: Any, seed: int) -> None:
    """One update on random tokens."""
    from mswift.parallel.megatron.engine import Microbatch

    tokens = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(seed))
    batch = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(2, 16))
    engine.train_step([batch], 0.05)


def test_answers_become_those_of_the_exported_model(home: Path, trainer: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from mswift.infer.weight_sync import update_engine
    from mswift.train.weight_stream import hf_tensors

    live = trainer(home / "model")
    served: Any = open_engine("vllm", EngineConfig(home / "model", max_num_seqs=4))
    requests = [Request(prompt=prompt, sampling=QUESTION) for prompt in ("Hello", "abc abc abc abc " * 12)]
    before = served.generate(requests)
    for number in range(2):
        step(live, number)
        report = update_engine(served, hf_tensors(live), live.table.hf)
        found = served.generate(requests)
        copy = tmp_path / f"exported-{number}"
        arrays = to_hf(assemble([gather(live.model_shards())]), live.table)  # as the proofs of layouts do it
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        assert report.hashes == {name: blake3(array.tobytes()).hexdigest() for name, array in arrays.items()}
        copy.mkdir()
        for file in (home / "model").iterdir():
            if file.suffix == ".json" or file.suffix == ".jinja":
                (copy / file.name).write_bytes(file.read_bytes())
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        expected = open_engine("transformers", EngineConfig(copy)).generate(requests)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        assert all(mine.logprobs != old.logprobs for mine, old in zip(found, before, strict=True))
        for mine, theirs in zip(found, expected, strict=True):
            for a, b in zip(mine.logprobs or (), theirs.logprobs or (), strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=5e-5)
        before = found

    tensors.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"half-way: 1 tensors of the model did not come \(model.norm.weight\)"):
        update_engine(served, iter(tensors.items()), live.table.hf)
    with pytest.raises(MswiftError, match="answers no more: an update of its weights failed half-way"):
        served.generate(requests)
    served.close()
    assert torch.distributed.is_initialized(), "the trainer's process groups ended with vLLM"
    step(live, 9)


def test_an_adapter_alone_is_sent(home: Path, trainer: Any, tmp_path: Path) -> None:
    from mswift.infer.weight_sync import update_adapter
    from mswift.train.weight_stream import write_live_adapter
    from mswift.tuners.lora import LoraConfig

    table = WeightReader(home / "model").table
    live = trainer(
        home / "model", LoraConfig.for_table(table, rank=4, alpha=64, target_modules=("all-linear",), seed=1)
    )
    write_live_adapter(live, tmp_path / "start")
    served: Any = open_engine("vllm", EngineConfig(home / "model", {"policy": tmp_path / "start"}, max_num_seqs=4))
    text = "abc abc abc abc " * 12  # longer than a block of the prefix cache
    asked = {name: Request(prompt=text, adapter=name, sampling=QUESTION) for name in (BASE_MODEL, "policy")}
    base, start = served.generate(list(asked.values()))
    assert base.token_ids == start.token_ids  # B is zero
    seen = {start.logprobs}
    for number in range(2):
        for seed in range(6):
            step(live, 10 * number + seed)
        directory = tmp_path / f"adapter-{number}"
        write_live_adapter(live, directory)
        update_adapter(served, "policy", directory)
        found_base, found = served.generate(list(asked.values()))
        assert found_base == base
        reference = open_engine("transformers", EngineConfig(home / "model", {"policy": directory}))
        expected = reference.generate([asked["policy"]])[0]
        assert found.token_ids == expected.token_ids
        for a, b in zip(found.logprobs or (), expected.logprobs or (), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=5e-5)
        seen.add(found.logprobs)
    assert len(seen) == 3, "the adapter did not change the answers"
    served.close()
    content = json.loads((directory / "adapter_config.json").read_text())
    assert content["r"] == 4
