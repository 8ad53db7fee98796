"""vLLM's own server, of another environment's interpreter and over two tensor-parallel ranks: published text, key, new
weights while it lives, and its end.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mswift.converters.reader import WeightReader
from mswift.errors import CheckpointError, ConfigError, MswiftError
from mswift.infer import weight_sync
from mswift.infer.backends import EngineConfig, open_engine
from mswift.infer.loading import load_tokenizer
from mswift.infer.request import Request, Sampling
from mswift.infer.server_engine import ServerEngine, vllm_dialect
from mswift.infer.vllm_server import ServerOptions, VllmServer
from tests.support.shared import shared_file
from tests.support.vllm import needs_vllm

pytestmark = needs_vllm
KEY = "a key of this test"
MODEL = shared_file("data/weights/stories260K-hd32-hf")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """Its interpreter has the packages of this one, by another path and without this one's path of modules."""
    python = tmp_path_factory.mktemp("other") / "python"
    python.write_text(f'#!/bin/sh\nOTHER_ENVIRONMENT=1 exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSWIFT_VLLM_PYTHON", str(python))
        patch.setenv("PYTHONPATH", "/not/of/the/other/one", prepend=os.pathsep)
        config = EngineConfig(MODEL, max_num_seqs=8, options={"tensor_parallel_size": 2})
        with VllmServer(
            config, ServerOptions(api_key=KEY, served_model_name="stories", weight_updates=True)
        ) as running:
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
    environ = dict(
        one.split("=", 1) for one in Path(f"/proc/{server.pid}/environ").read_text().split("\0") if "=" in one
    )
    assert environ["OTHER_ENVIRONMENT"] == "1"
    assert "/not/of" not in environ["PYTHONPATH"]
    assert os.listdir(environ["PYTHONPATH"]) == ["mswift"]  # what takes new weights, and nothing else of here


def test_commands_ask_it_as_an_engine(server: VllmServer) -> None:
    """What `infer`, `sample` and `eval` do where MSWIFT_VLLM_PYTHON names an interpreter."""
    config = EngineConfig(MODEL, max_num_seqs=8)
    engine = ServerEngine(server, config, load_tokenizer(MODEL), vllm_dialect(config))
    reference = open_engine("transformers", EngineConfig(MODEL))
    greedy = [Request(prompt=text, sampling=Sampling(max_new_tokens=20)) for text in ("Once upon", "Tim had", "")]
    expected = reference.generate(greedy)
    assert [(one.text, one.finish_reason, one.completion_tokens) for one in engine.generate(greedy)] == [
        (one.text, one.finish_reason, one.completion_tokens) for one in expected
    ]
    pieces = list(engine.stream(greedy[0]))
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces) == expected[0].text
    drawn = engine.generate([Request(prompt="Once", sampling=Sampling(max_new_tokens=20, temperature=1, n=4))])
    assert len({one.text for one in drawn}) == 4
    pairs = [([1, 403], [407, 261, 378]), ([1], [403, 407])]
    for one, other in zip(engine.score(pairs), reference.score(pairs), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.is_greedy == other.is_greedy
    reference.close()


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


@pytest.mark.skipif(
    os.environ.get("MSWIFT_ALL_FAULTS") != "1", reason="tests/system/test_other_servers.py has the like"
)
def test_a_server_that_does_not_start_says_why() -> None:
    config = EngineConfig(MODEL, max_model_len=100_000)
    with pytest.raises(MswiftError, match=r"ended with status 1 before it was ready:(.|\n)*100000"):
        VllmServer(config)


def test_new_weights_from_anybody_are_refused() -> None:
    with pytest.raises(ConfigError, match="whoever reaches the server could replace its model"):
        VllmServer(EngineConfig(MODEL), ServerOptions(host="0.0.0.0", weight_updates=True))
