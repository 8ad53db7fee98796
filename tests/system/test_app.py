"""`mswift app` as a process before a real `mswift deploy`: its page run by Node.js, what it refuses, how it ends."""

import contextlib
import http.client
import json
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from mswift.cli.main import main
from tests.support import page
from tests.support.deployed import Running
from tests.support.tiny import tiny_model, tiny_tokenizer

KEY = "the-servers-own-key"
PAGE_KEY = "the-key-of-the-page"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_tokenizer(path)
    tiny_model(path, "qwen3", vocab_size=259, max_position_embeddings=100_000, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Running]:
    found = Running("deploy", "--model", str(model_dir), "--max_new_tokens", "90000", MSWIFT_API_KEY=KEY)
    yield found
    assert found.stop() == (0, "")


@pytest.fixture(scope="module")
def app(server: Running) -> Iterator[Running]:
    found = Running("app", "--url", server.url, "--system", "Be brief.", OPENAI_API_KEY=KEY)
    yield found
    assert found.stop() == (0, "")  # nothing said: no request, no key


def _get(url: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, Any, bytes]:
    """Status, headers and body; the path and the host are sent as they stand."""
    with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)) as line:
        line.putrequest(method, path, skip_host="host" in headers)
        for name, value in headers.items():
            line.putheader(name.replace("_", "-"), value)
        if body is not None:
            line.putheader("content-length", str(len(body)))
        line.endheaders(body)
        answer = line.getresponse()
        return answer.status, answer.headers, answer.read()


def _until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _running(server: Running) -> int:
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/health") as answer:
        return int(json.loads(answer.read())["running"])


@page.needs_node
def test_the_page_asks_streams_stops_and_forgets(server: Running, app: Running, model_dir: Path) -> None:
    options = [["set", "max_tokens", "30"], ["set", "temperature", "1"], ["set", "seed", "7"]]
    long = [["set", "max_tokens", "80000"], ["set", "prompt", "More"], ["interrupt", "stop"], ["look"]]
    seen = page.run(
        "drive.mjs",
        [["look"], *options, ["set", "prompt", "Hi"], ["submit", "form"], ["look"],
         ["set", "prompt", "And?"], ["enter", "prompt", {"shiftKey": False}], ["look"],
         *long, ["click", "clear"], ["look"], ["set", "temperature", "-1"], ["set", "prompt", "Hi"], ["submit", "form"],
         ["look"]],
        app.url,
    )  # fmt: skip
    first, asked, again, stopped, cleared, refused = seen
    assert (first["models"], first["system"], first["locked"], first["status"]) == (
        [model_dir.name], "Be brief.", False, "",
    )  # fmt: skip
    messages: list[Any] = [{"role": "system", "content": "Be brief."}]
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        for log, text in ((asked, "Hi"), (again, "And?")):
            messages.append({"role": "user", "content": text})
            told = client.chat.completions.create(
                model=model_dir.name, messages=messages, max_tokens=30, temperature=1, seed=7
            ).choices[0]
            messages.append({"role": "assistant", "content": told.message.content})
            assert log["log"][-2] == ["user", text]
            (paragraph,) = page.run("render.mjs", [told.message.content])["found"]
            assert log["log"][-1] == ["assistant", paragraph["text"]]
            assert log["status"] == ("cut: max_tokens" if told.finish_reason == "length" else "")
    assert stopped["status"] == "stopped"
    assert len(stopped["log"]) == 6
    _until(lambda: _running(server) == 0)  # its place is free
    assert cleared["log"] == []
    assert refused["log"][:1] == [["user", "Hi"]]
    assert "temperature" in refused["status"]


@page.needs_node
def test_the_key_of_the_page_is_asked_for(server: Running, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "server-key").write_text(KEY + "\n")
    flags = ("--url", server.url, "--api_key_file", str(tmp_path / "server-key"), "--host", "0.0.0.0")
    app = Running("app", *flags, MSWIFT_APP_KEY=PAGE_KEY)
    url = app.url.replace("0.0.0.0", "127.0.0.1")
    seen = page.run(
        "drive.mjs",
        [["look"], ["set", "key", "wrong"], ["submit", "unlock"], ["look"], ["set", "key", PAGE_KEY],
         ["submit", "unlock"], ["look"], ["set", "max_tokens", "3"], ["set", "prompt", "Hi"], ["submit", "form"],
         ["look"]],
        url,
    )  # fmt: skip
    assert [one["locked"] for one in seen] == [True, True, False, False]
    assert seen[2]["models"] == [model_dir.name]
    assert len(seen[3]["log"]) == 2
    for path in ("/v1/models", "/settings", "/nowhere"):
        assert _get(url, path)[0] == 401
        assert _get(url, path, authorization=f"Bearer {KEY}")[0] == 401
    assert _get(url, "/v1/models", authorization=f"Bearer {PAGE_KEY}")[0] == 200
    assert _get(url, "/", host="rebound.example")[0] == 421
    assert _get(url, "/", host="192.0.2.7:80")[0] == 200  # an address in digits is no name that can be pointed here
    assert app.stop() == (0, "")


def test_every_answer_has_the_policy_and_none_has_the_key(app: Running) -> None:
    paths = ["/", "/page/main.js", "/page/chat.js", "/page/stream.js", "/page/markdown.js", "/page/style.css"]
    for path in [*paths, "/settings", "/v1/models", "/nowhere"]:
        status, headers, body = _get(app.url, path)
        assert status == (404 if path == "/nowhere" else 200)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
        assert KEY not in str(headers) + body.decode()
    assert KEY not in Path(f"/proc/{app.process.pid}/cmdline").read_text()


ASK = json.dumps({"model": "none", "messages": [{"role": "user", "content": "Hi"}]}).encode()
JSON = "application/json"


@pytest.mark.parametrize(
    ("status", "path", "headers"),
    [
        (421, "/", {"host": "evil.example"}),
        (421, "/", {"host": "evil.example:80@127.0.0.1"}),
        (421, "/", {"host": "127.0.0.1.evil.example"}),
        (421, "/v1/models", {"host": ""}),
        (421, "/v1/models", {"host": "192.0.2.7"}),
        (421, "/v1/models", {"host": "[::1"}),
        (200, "/v1/models", {"host": "LOCALHOST:80"}),
        (200, "/v1/models", {"host": "[::1]:80"}),
        (403, "/v1/models", {"origin": "https://evil.example"}),
        (403, "/v1/models", {"origin": "null"}),
        (403, "/v1/models", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}),
        (200, "/", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}),
        (415, "POST /v1/chat/completions", {}),
        (415, "POST /v1/chat/completions", {"content_type": "text/plain"}),
        (403, "POST /v1/chat/completions", {"content_type": JSON, "origin": "http://127.0.0.1:1"}),
        (404, "POST /v1/chat/completions", {"content_type": JSON}),  # the server's own: no such model
        (404, "POST /v1/completions", {"content_type": JSON}),
        (404, "/metrics", {}),
        (404, "/v1/../metrics", {}),
        (404, "/v1/models/x", {}),
        (404, "/v1/%2e%2e/metrics", {}),
        (404, "/page/../run.py", {}),
        (404, "/page/..%2frun.py", {}),
        (404, "//v1/models", {}),
        (421, "http://evil.example/v1/models", {}),
        (404, "/openapi.json", {}),
        (405, "DELETE /v1/models", {"content_type": JSON}),
        (405, "OPTIONS /v1/chat/completions", {"content_type": JSON}),
    ],
)
def test_what_is_not_the_pages_own_is_refused(app: Running, status: int, path: str, headers: dict[str, str]) -> None:
    method, _, path = path.rpartition(" ")
    found, _, body = _get(app.url, path, method or "GET", ASK if method else None, **headers)
    assert found == status, body
    if status >= 400:
        assert json.loads(body)["error"]["message"]


def test_the_server_of_model_ends_with_the_page_and_the_page_with_it(model_dir: Path) -> None:
    def child(app: Running) -> psutil.Process:
        (found,) = psutil.Process(app.process.pid).children()
        assert "deploy" in found.cmdline()
        return found

    app = Running("app", "--model", str(model_dir), "--torch_dtype", "float32")
    own = child(app)
    environ = own.environ()
    assert _get(app.url, "/v1/models")[0] == 200
    port = own.cmdline()[own.cmdline().index("--port", 5) + 1]
    assert _get(f"http://127.0.0.1:{port}", "/v1/models")[0] == 401  # the page has the only key
    assert environ["MSWIFT_API_KEY"] not in " ".join(own.cmdline())
    assert app.stop()[0] == 0
    assert not own.is_running()

    app = Running("app", "--model", str(model_dir))
    own = child(app)
    app.process.kill()  # it cannot end its child, and the child ends all the same
    app.process.wait()
    _until(lambda: not own.is_running() or own.status() == psutil.STATUS_ZOMBIE)

    app = Running("app", "--model", str(model_dir))
    with openai.OpenAI(base_url=f"{app.url}/v1", api_key="-", max_retries=0) as client:
        stream = client.chat.completions.create(
            model=model_dir.name, messages=[{"role": "user", "content": "Hi"}], stream=True, max_tokens=4096,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        next(stream)
        child(app).kill()
        with pytest.raises(openai.APIError, match="the server broke off its answer"):
            list(stream)
    out, err = app.process.communicate(timeout=60)
    assert app.process.returncode == 1, out + err
    assert f"mswift deploy ended with status {-signal.SIGKILL}" in err


def test_mistakes_are_one_line_and_status_2(
    model_dir: Path,
    tmp_path: Path,
    server: Running,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MSWIFT_APP_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "none").write_text("\n")
    (tmp_path / "two").write_text("a\nb\n")
    url = ("--url", server.url)
    mistakes = {
        (): "give --url",
        (*url, "--model", str(model_dir)): "give --url",
        ("--url", "127.0.0.1:8000"): "an address such as",
        ("--url", "http://127.0.0.1:9/v1"): "no server answers there",
        ("--url", "http://[::1/v1"): "no server answers there",
        url: "status 401 for its models; its key goes into OPENAI_API_KEY",
        (*url, "--adapters", "x"): "--adapters is for the server that --model starts",
        ("--model", str(tmp_path / "absent")): "no such directory",
        ("--model", str(model_dir), "--adapters", str(tmp_path)): "no adapter_config.json",
        ("--model", str(model_dir), "--api_key_file", "x"): "is for --url",
        (*url, "--host", "0.0.0.0"): "it has no key: set MSWIFT_APP_KEY",
        (*url, "--app_key_file", str(tmp_path / "none")): "--app_key_file",
        (*url, "--api_key_file", str(tmp_path / "two")): "it holds 2 keys",
        (*url, "--port", "70000"): "--port 70000",
    }
    for argv, message in mistakes.items():
        assert main(["app", *(("--port", "0") if "--port" not in argv else ()), *argv]) == 2, argv
        captured = capsys.readouterr()
        assert message in captured.err, (argv, captured.err)
        assert captured.err.count("\n") == 1
