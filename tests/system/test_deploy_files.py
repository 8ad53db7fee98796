"""No request makes a server read a file or call anybody: what the process touched while it was asked is looked at."""

import contextlib
import http.client
import itertools
import json
import os
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.adapters import random_adapter
from tests.support.audited import Audited, is_code
from tests.support.tiny import tiny_model, tiny_tokenizer

SECRET = "what-no-request-may-see"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter, and files that must not be read."""
    path = tmp_path_factory.mktemp("home")
    tiny_tokenizer(path / "tiny")
    tiny_model(path / "tiny", "qwen3", vocab_size=259, max_position_embeddings=2048, num_hidden_layers=1)
    random_adapter(path / "mine", path / "tiny", ["q_proj"])
    random_adapter(path / "other", path / "tiny", ["q_proj"])
    (path / "secret.txt").write_text(SECRET)
    (path / "secret.jinja").write_text(SECRET)
    return path


FIELDS = (
    "model", "chat_template", "adapter", "lora_path", "lora", "adapters", "tokenizer", "response_format", "file",
    "files", "image", "images", "prompt_file", "store", "metadata", "user", "tools", "stop", "name", "guided_json",
    "extra_body", "chat_template_kwargs", "documents", "base_model",
)  # fmt: skip


class Canary:
    """A port that nobody may call."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.calls = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._socket.accept()[0].close()
                self.calls += 1

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    found = Canary()
    yield found
    found.close()


def hostile_texts(home: Path, port: int) -> list[str]:
    """Names of files and addresses, in every spelling that some library follows."""
    secret = home / "secret.txt"
    return [
        str(secret), f"file://{secret}", f"file:{secret}", f"FILE://localhost{secret}", str(home / "other"),
        f"../{home.name}/secret.txt", "../" * 12 + "etc/passwd", "/etc/passwd", "/proc/self/environ", "~/.ssh/id_rsa",
        f"http://127.0.0.1:{port}/x", f"https://localhost:{port}/x.png", f"ftp://127.0.0.1:{port}/x",
        f"//127.0.0.1:{port}/x",
        "\\\\127.0.0.1\\share", "hf://meta/x", "s3://bucket/key", f"@{secret}", f"<{secret}", f"{secret}\x00.png",
        "data:text/plain;base64,aGk=", f"{{% include '{home / 'secret.jinja'}' %}}",
        f"{{{{ lipsum.__globals__.os.popen('cat {secret}').read() }}}}", f"${{jndi:ldap://127.0.0.1:{port}/a}}",
        f"$(cat {secret})", f"`cat {secret}`", f"; cat {secret} |", f"!!python/object/apply:os.system ['cat {secret}']",
        "__import__('os').system('id')", f'<!ENTITY x SYSTEM "file://{secret}">',
    ]  # fmt: skip


def bodies(texts: list[str]) -> Iterator[tuple[str, Any]]:
    """Route and body: each text in each place."""
    for text in texts:
        user = [{"role": "user", "content": text}]
        chat: dict[str, Any] = {"model": "tiny", "messages": user, "max_tokens": 2}
        for kind in ("image_url", "input_audio", "video_url", "file", "audio_url"):
            part = {"type": kind, kind: {"url": text, "file_id": text, "data": text, "path": text}}
            yield "chat/completions", chat | {"messages": [{"role": "user", "content": [part]}]}
            yield "chat/completions", chat | {"messages": [{"role": "user", "content": [{"type": kind, kind: text}]}]}
        for name in FIELDS:
            yield "chat/completions", chat | {name: text}
            yield "completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 2, name: text}
        yield "chat/completions", chat
        yield "chat/completions", chat | {"stream": True}
        yield "chat/completions", chat | {"messages": [{"role": text, "content": text}]}
        yield "chat/completions", chat | {"messages": [{"role": "system", "content": text, "name": text}, *user]}
        called = {"id": text, "type": "function", "function": {"name": text, "arguments": json.dumps({"path": text})}}
        tool = {"type": "function", "function": {"name": text, "description": text, "parameters": {"$ref": text}}}
        turns = [*user, {"role": "assistant", "content": text, "tool_calls": [called]},
                 {"role": "tool", "tool_call_id": text, "content": text}]  # fmt: skip
        yield "chat/completions", chat | {"messages": turns, "tools": [tool]}
        yield "completions", {"model": "mine", "prompt": [text, text], "max_tokens": 2, "echo": True, "logprobs": 1}


def _send(
    line: http.client.HTTPConnection, method: str, path: str, body: bytes | None, **headers: str
) -> tuple[int, str]:
    """Status and text; `path` as it stands."""
    line.putrequest(method, path)
    for name, value in ({"content-type": "application/json"} | headers).items():
        line.putheader(name.replace("_", "-"), value)
    if body is not None:
        line.putheader("content-length", str(len(body)))
    line.endheaders(body)
    answer = line.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def _ask_everything(url: str, texts: list[str]) -> Counter[int]:
    statuses: Counter[int] = Counter()
    line = http.client.HTTPConnection(url.removesuffix("/v1").removeprefix("http://"), timeout=60)
    requests: list[tuple[str, str, bytes | None]] = [
        ("POST", f"/v1/{route}", json.dumps(body).encode()) for route, body in bodies(texts)
    ]
    for text, prefix in itertools.product(texts, ("/v1/models/", "/", "/page/", "/v1/")):
        path = re.sub(r"[\x00-\x20]", "", text)
        for spelled in (path, path.replace("/", "%2f"), path.replace("..", "%2e%2e")):
            requests.append(("GET", (prefix + spelled).encode("ascii", "ignore").decode(), None))
    for path in ("/health", "/metrics", "/openapi.json", "/docs", "/static/../../etc/passwd", "/v1/models"):
        requests.append(("GET", path, None))
    for method, path, body in requests:
        status, told = _send(line, method, path, body)
        statuses[status] += 1
        assert status < 500, (path, body, told)
        assert SECRET not in told, (path, body)
        assert "root:x:0" not in told, (path, body)
    line.close()
    return statuses


def _probe_with_schemathesis(url: str) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{url.removesuffix('/v1')}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        modes = schemathesis.GenerationMode if operation.method == "post" else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:

            @settings(
                max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
                database=None,
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def probe(case: Any) -> None:
                assert case.call().status_code < 500

            probe()


_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_QUIET = ("close", "exit", "futex", "clone", "clone3", "wait4", "exit_group", "kill", "tgkill", "rt_sigreturn", "vfork",
          "getcwd")  # fmt: skip
_OWN = ("accept", "accept4", "recvfrom", "sendto", "getsockname", "getpeername", "shutdown", "setsockopt", "getsockopt",
        "recvmsg", "sendmsg", "listen", "bind", "socketpair")  # fmt: skip
_SYSTEM = ("/etc/localtime", "/dev/urandom", "/proc/self/", "/sys/devices/system/cpu", "/proc/cpuinfo", "/proc/meminfo",
           "/proc/stat", "/sys/fs/cgroup", "/etc/mime.types", "/dev/null", "/proc/version_signature")  # fmt: skip


def _is_own(path: str) -> bool:
    """Code, folders that are looked through for it, and what the system tells of itself."""
    return is_code(path) or is_code(f"{path}/x.py") or path == str(Path.cwd()) or path.startswith(_SYSTEM)


def _foreign(server: Audited) -> list[Any]:
    """What was touched and is neither code nor the answers' own sockets."""
    events, calls = server.touched()
    found: list[Any] = []
    for event, argument in events:
        path = argument.strip("'\"")
        if event in ("open", "os.listdir", "os.scandir") and (is_code(path) or is_code(f"{path}/x.py")):
            continue
        found.append((event, argument))
    if calls is None:
        return found
    assert any(name.startswith("accept") for name, _ in calls)  # the trace is of this process
    for name, rest in calls:
        if name in _QUIET or name in _OWN or "AT_EMPTY_PATH" in rest:  # of a file that is open
            continue
        paths = _QUOTED.findall(rest)
        if name not in ("connect", "execve", "socket") and paths and all(map(_is_own, paths)):
            continue
        found.append((name, rest[:200]))
    return found


@pytest.fixture(scope="module")
def server(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    flags = ("--model", str(home / "tiny"), "--adapters", str(home / "mine"), "--agent_template", "hermes")
    found = Audited(tmp_path_factory.mktemp("server") / "log", "deploy", *flags)
    yield found
    assert found.stop()[0] == 0


def test_no_request_reads_a_file_or_calls_anybody(home: Path, server: Audited, canary: Canary) -> None:
    before = server.begin()
    assert any(event == "open" and "tokenizer_config.json" in name for event, name in before)  # the audit sees files
    statuses = _ask_everything(server.url, hostile_texts(home, canary.port))
    if "MSWIFT_ALL_FAULTS" in os.environ:
        _probe_with_schemathesis(server.url)
    assert statuses[200] > 50
    assert statuses[400] > 500
    assert _foreign(server) == []
    assert canary.calls == 0


def test_no_request_makes_the_page_read_a_file(home: Path, server: Audited, tmp_path: Path, canary: Canary) -> None:
    """The page's server calls the one that it stands before, and nobody else."""
    app = Audited(tmp_path / "log", "app", "--url", server.url)
    app.begin()
    port = server.url.removesuffix("/v1").rsplit(":", 1)[1]
    _ask_everything(app.url, hostile_texts(home, canary.port)[:6])
    to_server = (f"sin_port=htons({port})", f"('127.0.0.1', {port})")
    found = [one for one in _foreign(app) if one[0] not in ("socket", "socket.getaddrinfo")]
    assert [one for one in found if not any(words in one[1] for words in to_server)] == []
    assert found  # the connection to the server is seen
    assert canary.calls == 0
    assert app.stop() == (0, "")


READER = """
import http.server
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


def test_a_server_that_reads_files_would_be_seen(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    server = Audited(tmp_path / "log", "serve", code=READER)
    server.begin()
    line = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    assert _send(line, "GET", "/secret.txt", None) == (200, SECRET)
    line.close()
    assert [name for name, argument in _foreign(server) if "secret.txt" in argument]
    server.stop()
