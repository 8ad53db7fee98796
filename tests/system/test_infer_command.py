"""`mswift infer` as a user runs it: real processes, a real terminal, Ctrl-C, statuses and messages."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mswift.cli.main import main
from tests.support.shared import shared_file
from tests.support.tiny import tiny_model, tiny_tokenizer

INFER = (sys.executable, "-m", "mswift.cli.main", "infer")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that never ends an answer within 100,000 tokens."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer(path)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(path)
    tiny_model(path, num_hidden_layers=2, vocab_size=259, max_position_embeddings=100_000, bos_token_id=None)
    return path


class Terminal:
    """A process on a pseudo terminal."""

    def __init__(self, *argv: str) -> None:
        self._screen, inside = pty.openpty()
        self.process = subprocess.Popen(
            argv, stdin=inside, stdout=inside, stderr=inside, start_new_session=True, env={**os.environ, "TERM": "dumb"}
        )
        os.close(inside)
        self.seen = ""

    def type(self, line: str) -> None:
        os.write(self._screen, line.encode() + b"\n")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_until(self, pattern: str) -> None:
        """Ctrl-C every second: readline sees a signal only once it waits, shortly after its prompt is shown."""
        for _ in range(60):
            self.interrupt()
            with contextlib.suppress(TimeoutError):
                self.wait_for(pattern, seconds=1)
                return
        raise TimeoutError(f"no {pattern!r} after 60 interrupts")

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """Text up to the match of `pattern` in what appeared since the last wait."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._screen], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no {pattern!r} within {seconds} s; seen: {self.seen[-500:]!r}")
            self.seen += os.read(self._screen, 65536).decode(errors="replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.fixture
def chat(model_dir: Path) -> Iterator[Terminal]:
    terminal = Terminal(*INFER, "--model", str(model_dir), "--max_new_tokens", "90000")
    terminal.wait_for("/exit .*\n.*> ")
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_chat(chat: Terminal) -> None:
    chat.type("Hello")
    chat.wait_for(r"Hello\r\n[^\n]*?[^\s]")  # the first token is on the screen, 90,000 are to come
    chat.interrupt()
    chat.wait_for(r"\(stopped\)\r\n.*> ")
    chat.interrupt_until(r"\(/exit or Ctrl-D leaves\)\r\n.*> ")
    chat.type("Again")
    chat.wait_for(r"Again\r\n[^\n]*?[^\s]")
    chat.interrupt()
    chat.wait_for(r"\(stopped\)\r\n.*> ")
    chat.type("/exit")
    assert chat.process.wait(60) == 0


def test_history_is_kept_until_clear(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mswift.infer.chat import Chat
    from mswift.infer.request import Completion, Message, Piece, Request

    class Echo:
        """Answers with the number of messages that it was given."""

        def stream(self, request: Request):  # type: ignore[no-untyped-def]
            text = str(len(request.messages or ()))
            yield Piece(text)
            yield Piece("", Completion(text, "stop", 1, 1))

    def make_request(messages: list[Message]) -> Request:
        return Request(messages=tuple(messages))

    chat = Chat(Echo(), make_request, [{"role": "system", "content": "be brief"}])  # type: ignore[arg-type]
    for line in ("a", "b", "/clear", "c", "/nonsense"):
        chat.handle(line)
    assert capsys.readouterr().out.split("\n")[:4] == ["2", "4", "(conversation forgotten)", "2"]
    assert [message["content"] for message in chat.messages] == ["be brief", "c", "2"]
    for line in ("/system be kind", "d", "/clear", "/system"):
        chat.handle(line)
        contents = [message["content"] for message in chat.messages]
        assert contents == {"d": ["be kind", "d", "2"], "/system": []}.get(line, ["be kind"])


def test_a_chat_reads_a_pipe_and_leaves_at_its_end(model_dir: Path) -> None:
    result = subprocess.run(
        [*INFER, "--model", str(model_dir), "--max_new_tokens", "3"],
        input="Hello\n/clear\n", capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "(cut after 3 tokens; --max_new_tokens)\n(conversation forgotten)\n" in result.stdout
    assert "> " not in result.stdout
    assert result.stderr == ""


def test_prompt_is_the_published_text_and_says_that_it_is_a_continuation(capsys: pytest.CaptureFixture[str]) -> None:
    golden = json.loads(shared_file("data/weights/stories260K-golden.json").read_text(encoding="utf-8"))["greedy"]
    model = str(shared_file("data/weights/stories260K-hf"))
    assert main(["infer", "--model", model, "--prompt", "", "--max_new_tokens", "256"]) == 0
    captured = capsys.readouterr()
    assert captured.out == golden["text"] + "\n"
    assert "no chat template: text is continued as it stands" in captured.err


def test_a_killed_data_set_run_is_continued_to_the_same_file(model_dir: Path, tmp_path: Path) -> None:
    rows = [{"query": f"{number}?", "response": str(number)} for number in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    options = ("--max_new_tokens", "100", "--max_batch_size", "2", "--temperature", "1")
    argv = [*INFER, "--model", str(model_dir), "--val_dataset", str(data), *options, "--result_path"]
    subprocess.run([*argv, str(whole)], check=True, capture_output=True, timeout=300)
    process = subprocess.Popen([*argv, str(killed)], stdout=subprocess.DEVNULL)
    while not (killed.exists() and killed.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    there = killed.read_bytes().count(b"\n")
    assert 2 <= there < len(rows)
    result = subprocess.run([*argv, str(killed)], check=True, capture_output=True, text=True, timeout=300)
    assert f"12 rows ({there} were there, {12 - there} answered now)" in result.stdout
    assert result.stderr == ""  # no progress bar where there is no terminal
    assert killed.read_bytes() == whole.read_bytes()
    first = json.loads(whole.read_text().splitlines()[0])
    assert first["messages"] == [{"role": "user", "content": "0?"}]
    assert first["label"] == "0"
    assert {"response", "finish_reason", "prompt_tokens", "completion_tokens", "hash"} <= first.keys()


def test_the_models_generation_config_decides_unless_a_flag_does(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    sampling = Path(shutil.copytree(model_dir, tmp_path / "sampling"))
    (sampling / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9})
    )

    def answer(model: Path, *flags: str) -> str:
        assert main(["infer", "--model", str(model), "--prompt", "Hi", "--max_new_tokens", "30", *flags]) == 0
        return capsys.readouterr().out

    greedy = answer(model_dir)
    assert answer(sampling, "--temperature", "0") == greedy
    drawn = answer(sampling)
    assert drawn != greedy
    assert drawn == answer(model_dir, "--temperature", "1.5", "--top_k", "50", "--top_p", "0.9")
    assert drawn != answer(sampling, "--seed", "7")


def test_mistakes_are_one_line_and_status_2(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model", str(model_dir))
    (tmp_path / "rows.jsonl").write_text('{"query": "a"}\n')
    rows = ("--val_dataset", str(tmp_path / "rows.jsonl"))
    mistakes = {
        (): "--model is required",
        ("--model", str(tmp_path / "absent")): "no such directory",
        ("--model", str(tmp_path)): "no config.json",
        (*model, "--adapters", str(tmp_path)): "no adapter_config.json",
        (*model, "--adapters", "a", "b"): "one adapter at a time",
        (*model, *rows): "--val_dataset needs --result_path",
        (*model, "--result_path", "r.jsonl"): "--result_path needs --val_dataset",
        (*model, *rows, "--result_path", "r.jsonl", "--prompt", "a"): "give one of them",
        (*model, "--max_batch_size", "0"): "--max_batch_size 0",
        (*model, "--prompt", "a", "--top_p", "0.5"): "add --temperature 1",
        (*model, "--prompt", "a", "--use_chat_template", "false", "--system", "s"): "--system needs a chat template",
        (*model, "--prompt", "a", "--seed", "-1"): "--seed -1",
    }
    for argv, message in mistakes.items():
        assert main(["infer", *argv]) == 2, argv
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert (
        main(["infer", *model, "--prompt", "a", "--top_p", "0.5", "--temperature", "1", "--max_new_tokens", "2"]) == 0
    )
    assert (
        main(["infer", *model, *rows, "--result_path", str(tmp_path / "new" / "r.jsonl"), "--max_new_tokens", "2"]) == 0
    )
