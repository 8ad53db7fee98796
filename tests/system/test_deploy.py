"""`mswift deploy` as a process: its key, its stop, and what it refuses to start."""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from mswift.cli.main import main
from tests.support.deployed import Running
from tests.support.shared import shared_file
from tests.support.tiny import tiny_model, tiny_tokenizer

SOAK_SECONDS = 120 if os.environ.get("MSWIFT_ALL_FAULTS") else 0
"""How long 64 clients ask; 0: each twice."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_tokenizer(path)
    tiny_model(path, "qwen3", vocab_size=259, max_position_embeddings=100_000)
    return path


@pytest.fixture(scope="module")
def stories() -> Iterator[Running]:
    path = str(shared_file("data/weights/stories260K-hd32-hf"))
    server = Running("deploy", "--model", path, "--served_model_name", "stories", MSWIFT_API_KEY="a-long-secret")
    yield server
    assert server.stop() == (0, "")  # nothing said: no request, no key


def test_the_key_of_the_environment_is_asked_for_and_told_to_nobody(stories: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=stories.url, api_key="other", max_retries=0).models.list()
    with openai.OpenAI(base_url=stories.url, api_key="a-long-secret") as client:
        assert [model.id for model in client.models.list()] == ["stories"]
        assert client.completions.create(model="stories", prompt="Once", max_tokens=3, temperature=0).choices[0].text
    assert "secret" not in Path(f"/proc/{stories.process.pid}/cmdline").read_text()


def test_64_streams_side_by_side_lose_and_cross_nothing(stories: Running) -> None:
    """Each client asks again and again, hangs up now and then, and always gets the text that it got alone."""
    words = ("Once upon", "Tim had", "The big dog", "Lily saw", "One day", "A red ball", "Mom said", "They were")
    asked = [f"{words[index % 8]} {words[index // 8].lower()}" for index in range(64)]

    def ask(index: int, *, leave: bool = False) -> str:
        with openai.OpenAI(base_url=stories.url, api_key="a-long-secret", max_retries=0) as client:
            stream = client.completions.create(
                model="stories", prompt=asked[index], max_tokens=24, temperature=1, seed=index, stream=True
            )
            text = ""
            for chunk in stream:
                text += chunk.choices[0].text
                if leave:
                    break
            return text

    expected = [ask(index) for index in range(64)]
    assert len(set(expected)) == 64
    end = time.monotonic() + SOAK_SECONDS
    wrong: list[Any] = []
    barrier = threading.Barrier(64)

    def client(index: int) -> tuple[int, int]:
        barrier.wait()
        count = left = 0
        while count < 2 or time.monotonic() < end:
            leaves = (count + index) % 5 == 4
            text = ask(index, leave=leaves)
            if not (expected[index].startswith(text) if leaves else text == expected[index]):
                wrong.append((asked[index], text))
            count += 1
            left += leaves
        return count, left

    before = _told(stories, "/metrics")
    with ThreadPoolExecutor(64) as pool:
        counts = list(pool.map(client, range(64)))
    total, left = (sum(column) for column in zip(*counts, strict=True))
    assert wrong == []
    assert total >= 128
    assert left >= 20
    deadline = time.monotonic() + 60
    while json.loads(_told(stories, "/health")) != {"status": "ok", "running": 0, "waiting": 0}:
        assert time.monotonic() < deadline, "who hung up still has a place"
        time.sleep(0.05)
    after = _told(stories, "/metrics")
    answered = 'mswift_requests_total{route="/v1/completions",status="200"}'
    assert _number(after, answered) - _number(before, answered) == total  # none was refused, none is missing
    assert 0 < _number(after, "mswift_clients_left_total") - _number(before, "mswift_clients_left_total") <= left
    print(f"{total} streams, {left} of them left early, none lost, none crossed, no place held")


def _told(server: Running, path: str) -> str:
    request = urllib.request.Request(
        server.url.removesuffix("/v1") + path, headers={"authorization": "Bearer a-long-secret"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def _number(metrics: str, name: str) -> int:
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name)))


def test_sigterm_lets_the_answers_under_way_end(model_dir: Path) -> None:
    server = Running("deploy", "--model", str(model_dir), "--max_new_tokens", "90000")
    name = model_dir.name
    with openai.OpenAI(base_url=server.url, api_key="-", max_retries=0) as client:
        ask: dict[str, Any] = {"model": name, "prompt": "Hi", "stream": True, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(max_tokens=300, **ask)
        pieces = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason == "length"
        assert server.process.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_an_answer_that_is_too_long_for_the_time_to_stop_is_cut(model_dir: Path) -> None:
    server = Running("deploy", "--model", str(model_dir), "--max_new_tokens", "90000", "--shutdown_seconds", "1")
    with openai.OpenAI(base_url=server.url, api_key="-", max_retries=0) as client:
        stream = client.completions.create(
            model=model_dir.name, prompt="Hi", stream=True, max_tokens=90000, extra_body={"ignore_eos": True}
        )
        next(stream)
        status, said = server.stop()
        assert status == 0, said
        with pytest.raises(openai.APIConnectionError):
            for _ in stream:
                pass


def test_mistakes_are_one_line_and_status_2(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MSWIFT_API_KEY", raising=False)
    model = ("--model", str(model_dir))
    (tmp_path / "keys").write_text("\n")
    mistakes = {
        ("--model", str(tmp_path / "absent")): "no such directory",
        (*model, "--host", "0.0.0.0"): "there is no key: set MSWIFT_API_KEY",
        (*model, "--api_key_file", str(tmp_path / "none")): "no such file",
        (*model, "--api_key_file", str(tmp_path / "keys")): "it holds no key",
        (*model, "--port", "70000"): "--port 70000",
        (*model, "--host", "192.0.2.1", "--without_api_key"): "--host 192.0.2.1",
        (*model, "--infer_backend", "vllm", "--agent_template", "hermes"): "vLLM's server does not follow it",
        (*model, "--max_num_seqs", "0"): "--max_num_seqs 0",
        (*model, "--adapters", "a/x", "b/x"): "'x' names another one already",
        (*model, "--adapters", f"y={tmp_path}"): "no adapter_config.json",
        (*model, "--max_model_len", "1000000"): "at most the model's max_position_embeddings, 100000",
    }
    for argv, message in mistakes.items():
        assert main(["deploy", *argv]) == 2, argv
        captured = capsys.readouterr()
        assert message in captured.err, (argv, captured.err)
        assert captured.err.count("\n") == 1


@pytest.mark.skipif(not os.environ.get("MSWIFT_ALL_FAULTS"), reason="tests/cpu/test_infer_prompts.py has the engine")
def test_adapters_of_several_methods_are_deployed_side_by_side(tmp_path: Path) -> None:
    """Each by its name, all at a time; what PEFT answers with it alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.support.methods import method_of, random_peft
    from tests.support.prompts import Behind, peft_model, prompt_of

    tiny_tokenizer(tmp_path / "model")
    tiny_model(tmp_path / "model", "qwen3", vocab_size=259)
    for method in ("ia3", "loha", "vera"):
        random_peft(tmp_path, method_of(tmp_path, method), 0.3)
    peft_model(tmp_path, prompt_of(tmp_path, "prompt")).save_pretrained(tmp_path / "prompt")
    names = ["ia3", "loha", "vera", "prompt"]
    adapters = [f"{name}={tmp_path / name}" for name in names]
    server = Running(
        "deploy", "--model", str(tmp_path / "model"), "--served_model_name", "base", "--adapters", *adapters
    )
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client, ThreadPoolExecutor(5) as pool:

        def ask(name: str) -> str:
            return client.completions.create(model=name, prompt="say it", max_tokens=6, temperature=0).choices[0].text

        answers = dict(zip(["base", *names], pool.map(ask, ["base", *names]), strict=True))
    assert server.stop()[0] == 0
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    for name, answer in answers.items():
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        if name != "base":
            model = PeftModel.from_pretrained(model, str(tmp_path / name))
        tokens, count = torch.tensor([tokenizer("say it")["input_ids"]]), 0
        with torch.no_grad():
            while count < 6 and int(tokens[0, -1]) != tokenizer.eos_token_id:
                tokens = torch.cat([tokens, Behind(model.eval())(tokens).logits[:, -1:].argmax(-1)], dim=1)
                count += 1
        assert answer == tokenizer.decode(tokens[0, -count:], skip_special_tokens=True), name
    assert len(set(answers.values())) >= 4
