"""vLLM's own server, over two tensor-parallel ranks: published text, key, new weights while it lives, and its end."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mswift.converters.reader import WeightReader
from mswift.errors import CheckpointError, ConfigError, MswiftError
from mswift.infer import weight_sync
from mswift.infer.backends import EngineConfig, open_engine
from mswift.infer.request import Request, Sampling
from mswift.infer.vllm_server import ServerOptions, VllmServer
from tests.support.shared import shared_file
from tests.support.vllm import needs_vllm

pytestmark = needs_vllm
KEY = "a key of this test"


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    model = EngineConfig(
        shared_file("data/weights/stories260K-hd32-hf"), max_num_seqs=8, options={"tensor_parallel_size": 2}
    )
    with VllmServer(model, ServerOptions(api_key=KEY, served_model_name="stories", weight_updates=True)) as running:
        yield running


def ask(server: VllmServer, num_tokens: int, key: str = KEY) -> str:
    """The greedy story."""
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        return str(
            client.completions.create(model="stories", prompt=[1], max_tokens=num_tokens, temperature=0).choices[0].text
        )


def test_the_published_text_for_who_has_the_key(server: VllmServer) -> None:
    from openai import AuthenticationError

    golden = json.loads(shared_file("data/weights/stories260K-golden.json").read_text(encoding="utf-8"))["greedy"]
    assert ask(server, golden["max_new_tokens"]) == golden["text"]
    with pytest.raises(AuthenticationError):
        ask(server, 1, "another key")
    command = Path(f"/proc/{server.pid}/cmdline").read_text()
    assert "127.0.0.1" in command
    assert KEY not in command


def test_new_weights_are_served_and_the_old_ones_again(server: VllmServer, tmp_path: Path) -> None:
    source = shared_file("data/weights/stories260K-hd32-hf")
    table = WeightReader(source).table
    old = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if name in table.hf}
    generator = torch.Generator().manual_seed(3)
    new = {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in old.items()}
    other = tmp_path / "other"
    other.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (other / file.name).write_bytes(file.read_bytes())
    save_file(new, other / "model.safetensors", metadata={"format": "pt"})
    reference = open_engine("transformers", EngineConfig(other))
    expected = reference.generate([Request(prompt_ids=(1,), sampling=Sampling(max_new_tokens=60))])[0].text
    before = ask(server, 60)
    assert expected != before
    report = weight_sync.update_server(server, new.items(), table.hf, bucket_bytes=1 << 18, num_workers=2)
    assert report.num_buckets > 3
    assert ask(server, 60) == expected
    weight_sync.update_server(server, old.items(), table.hf, num_workers=2)
    assert ask(server, 60) == before


def test_a_bucket_that_arrives_damaged_ends_the_server(
    server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shared_file("data/weights/stories260K-hd32-hf")
    table = WeightReader(source).table
    tensors = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if name in table.hf}
    written = Path.write_bytes

    def damaged(path: Path, data: bytes) -> int:
        return written(path, data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(Path, "write_bytes", damaged)
    with pytest.raises(CheckpointError, match=r"half-way: .*it is not what was sent(.|\n)*is given up"):
        weight_sync.update_server(server, tensors.items(), table.hf, num_workers=2, spool=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)
    with pytest.raises(MswiftError, match="did not answer /resume"):
        server.post("/resume")


def test_a_server_that_does_not_start_says_why() -> None:
    model: dict[str, Any] = {"model": shared_file("data/weights/stories260K-hd32-hf"), "max_model_len": 100_000}
    with pytest.raises(MswiftError, match=r"ended with status 1 before it was ready:(.|\n)*100000"):
        VllmServer(EngineConfig(**model))
    with pytest.raises(ConfigError, match="whoever reaches the server could replace its model"):
        VllmServer(EngineConfig(model["model"]), ServerOptions(host="0.0.0.0", weight_updates=True))
