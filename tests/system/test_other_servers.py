"""Engines that live in the servers of other environments: how those are started, asked and ended.

`mswift deploy` plays the servers (tests/support/players.py); SGLang and LMDeploy themselves were not run.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mswift.cli.main import main
from mswift.errors import ConfigError, MswiftError
from mswift.infer import child_server
from mswift.infer.backends import EngineConfig, open_engine
from mswift.infer.child_server import ServerOptions
from mswift.infer.other_servers import SglangServer
from mswift.infer.request import BASE_MODEL, Request, Sampling
from tests.support.adapters import random_adapter
from tests.support.deployed import PROGRAM, Running
from tests.support.players import python_with
from tests.support.tiny import tiny_model, tiny_tokenizer

MORE = "MSWIFT_ALL_FAULTS" in os.environ
more = pytest.mark.skipif(not MORE, reason="MSWIFT_ALL_FAULTS is not set")
VARIABLES = {name: f"MSWIFT_{name.upper()}_PYTHON" for name in ("vllm", "sglang", "lmdeploy")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, an adapter, and an interpreter for each server."""
    path = tmp_path_factory.mktemp("home")
    tiny_tokenizer(path / "tiny")
    tiny_model(path / "tiny", "qwen3", vocab_size=259, max_position_embeddings=512, num_hidden_layers=2)
    random_adapter(path / "mine", path / "tiny", ["q_proj", "v_proj"])
    before = {name: os.environ.get(name) for name in VARIABLES.values()}
    for name, variable in VARIABLES.items():
        os.environ[variable] = python_with(path / f"{name}-environment", name)
    yield path
    for variable, value in before.items():
        os.environ.pop(variable)
        if value is not None:
            os.environ[variable] = value


def _ask(text: str, adapter: str | None = BASE_MODEL, **sampling: Any) -> Request:
    own = Sampling(max_new_tokens=12, **sampling)
    return Request(messages=({"role": "user", "content": text},), adapter=adapter, sampling=own)


@pytest.mark.parametrize("backend", ["sglang", pytest.param("lmdeploy", marks=more), pytest.param("vllm", marks=more)])
def test_answers_are_those_of_the_model(home: Path, backend: str) -> None:
    config = EngineConfig(home / "tiny", {"mine": home / "mine"}, torch_dtype="bfloat16", device="auto")
    own: Any = open_engine("transformers", config)
    asked = [_ask("Hi"), _ask("Hi", "mine"), _ask("Ho", temperature=1.0, seed=5, n=3), Request(
        prompt="Once", adapter="mine", sampling=Sampling(max_new_tokens=5, stop=("a",)))]  # fmt: skip
    engine: Any = open_engine(backend, config)
    pid = engine.server.pid
    try:
        got, expected = engine.generate(asked), own.generate(asked)
        assert [one.text for one in got[:2]] == [one.text for one in expected[:2]]
        assert got[0].text != got[1].text
        assert [one.index for one in got[2:5]] == [0, 1, 2]
        assert len({one.text for one in got[2:5]}) == 3
        assert (got[5].text, got[5].finish_reason) == (expected[5].text, expected[5].finish_reason)
        assert got[0].prompt_tokens == expected[0].prompt_tokens == len(engine.prompt_tokens(asked[0]))
        pieces = list(engine.stream(asked[1]))
        assert "".join(piece.text for piece in pieces) == expected[1].text
        assert pieces[-1].completion == got[1]
        again = engine.stream(_ask("Hi", "mine", temperature=1.0))
        next(again)
        again.close()
        pairs = [([1, 2, 3], [4, 5]), ([7], [8, 9, 10])]
        if backend == "lmdeploy":
            with pytest.raises(ConfigError, match="LMDeploy's server echoes no log-probabilities"):
                engine.score(pairs)
            with pytest.raises(ConfigError, match="LMDeploy's server takes text and conversations, not tokens"):
                engine.generate([Request(prompt_ids=(1, 2), adapter=BASE_MODEL)])
        else:
            for one, other in zip(engine.score(pairs, BASE_MODEL), own.score(pairs, BASE_MODEL), strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=0.05)  # bfloat16
        with pytest.raises(ConfigError, match="no adapter 'other'"):
            engine.generate([_ask("Hi", "other")])
    finally:
        engine.close()
        own.close()
    assert not psutil.pid_exists(pid)


def test_infer_and_deploy_take_them(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--infer_backend", "sglang", "--torch_dtype", "float32")
    argv = ["infer", "--model", str(home / "tiny"), "--prompt", "Hi", "--max_new_tokens", "8"]
    assert main([*argv, "--temperature", "0"]) == 0
    expected = capsys.readouterr().out
    assert main([*argv, *model, "--temperature", "0", "--engine_args", "mem_fraction_static=0.5"]) == 0
    assert capsys.readouterr().out == expected
    flags = ("--model", str(home / "tiny"), "--infer_backend", "lmdeploy", "--torch_dtype", "bfloat16")
    pattern = r"serves tiny at (http://\S+)/v1 \(pid"
    server = Running("deploy", *flags, pattern=pattern, MSWIFT_API_KEY="a-key")
    child = psutil.Process(server.process.pid).children()[0]
    assert "a-key" not in " ".join(child.cmdline())
    assert server.stop() == (0, "")
    assert not child.is_running()


@more
def test_sample_and_eval_take_them(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", str(home / "tiny"), "--infer_backend", "sglang", "--torch_dtype", "float32")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "Hi", "response": "x"}\n{"query": "Ho", "response": "y"}\n')
    sampled = ["sample", *model, "--val_dataset", str(rows), "--result_path", str(tmp_path / "samples.jsonl")]
    assert main([*sampled, "--num_samples", "2", "--max_new_tokens", "4"]) == 0
    assert "2 rows, 4 answers" in capsys.readouterr().out
    evaluated = ["eval", *model, "--eval_dataset", f"match={rows}", "--eval_output_dir", str(tmp_path / "eval")]
    rows.write_text('{"question": "Once upon a time", "answer": "there"}\n')
    assert main([*evaluated, "--max_new_tokens", "4"]) == 0


def test_a_server_that_dies_while_it_starts_says_why(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLAYER", "dies")
    argv = ["infer", "--model", str(home / "tiny"), "--prompt", "Hi", "--infer_backend", "sglang"]
    assert main(argv) == 1
    assert "SGLang's server ended with status 3 before it was ready:\nCUDA out of memory" in capsys.readouterr().err


def test_a_server_that_hears_nothing_is_ended_with_its_children(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAYER", "stubborn")
    monkeypatch.setattr(child_server, "_STOP_SECONDS", 0.3)
    before = {child.pid for child in psutil.Process().children()}
    left: list[psutil.Process] = []

    def seen(*_: Any) -> None:
        left.extend(child for child in psutil.Process().children(recursive=True) if child.pid not in before)

    monkeypatch.setattr(child_server.ChildServer, "output", lambda self: seen() or "nothing")
    with pytest.raises(MswiftError, match=r"SGLang's server was not ready after 2 seconds:\nnothing"):
        SglangServer(EngineConfig(home / "tiny"), ServerOptions(ready_seconds=2))
    assert len(left) == 2  # it and its child
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in left)


@more
def test_a_server_ends_with_a_command_that_is_killed(home: Path) -> None:
    argv = [*PROGRAM, "infer", "--model", str(home / "tiny"), "--infer_backend", "sglang", "--torch_dtype", "float32"]
    chat = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write("Hi\n")
    chat.stdin.flush()
    assert chat.stdout.readline()
    (server,) = psutil.Process(chat.pid).children()
    chat.send_signal(signal.SIGKILL)
    chat.wait()
    end = time.monotonic() + 60
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)
    chat.stdin.close()
    chat.stdout.close()
