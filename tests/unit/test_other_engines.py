"""What other engines' servers are told, and what is refused before anything starts."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mswift.config.sample import SampleConfig
from mswift.errors import ConfigError
from mswift.eval.rewards import find_reward
from mswift.infer import backends
from mswift.infer.backends import EngineConfig
from mswift.infer.child_server import ChildServer, ServerOptions, free_port
from mswift.infer.engine_args import engine_args
from mswift.infer.other_servers import lmdeploy_argv, sglang_argv, sglang_python
from mswift.infer.request import Request
from mswift.infer.url_engine import UrlEngine

MODEL = Path("/models/m")


def _config(**changes: Any) -> EngineConfig:
    return EngineConfig(**{"model": MODEL, "torch_dtype": "bfloat16", "max_num_seqs": 8, **changes})


def _adapters(folder: Path, *names: str, peft_type: str = "LORA") -> dict[str, Path]:
    """Directories that say what kind of adapter they hold."""
    for name in names:
        (folder / name).mkdir()
        said = {"peft_type": peft_type, "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(said))
    return {name: folder / name for name in names}


def test_sglang_is_told_in_its_own_words(tmp_path: Path) -> None:
    """SGLang 0.5.23's own parser took this command line and read it so (a check by hand, not part of the tests)."""
    options = engine_args("sglang", ["tp_size=2", "mem_fraction_static=0.8", "disable-radix-cache=true"])
    config = _config(adapters=_adapters(tmp_path, "a", "b"), max_model_len=300, device="cpu", options=options)
    assert sglang_argv("python", config, ServerOptions(), 5) == [
        "python", "-m", "sglang.launch_server", "--model-path", "/models/m", "--host", "127.0.0.1", "--port", "5",
        "--served-model-name", "m", "--dtype", "bfloat16", "--max-running-requests", "8", "--context-length", "300",
        "--device", "cpu", "--max-loras-per-batch", "3", "--lora-paths", f"a={tmp_path}/a", f"b={tmp_path}/b",
        "--tp-size", "2",
        "--mem-fraction-static", "0.8", "--disable-radix-cache",
    ]  # fmt: skip


@pytest.mark.parametrize("peft_type", ["IA3", "PREFIX_TUNING"])
def test_adapters_that_are_no_lora_are_refused(tmp_path: Path, peft_type: str) -> None:
    config = _config(adapters=_adapters(tmp_path, "a", peft_type=peft_type))
    with pytest.raises(ConfigError, match=f"'{peft_type}'.* this takes LORA only.*--infer_backend transformers"):
        sglang_argv("python", config, ServerOptions(), 5)
    with pytest.raises(ConfigError, match=f"'{peft_type}'.* this takes LORA only"):
        lmdeploy_argv("python", config, ServerOptions(), 5, "http://127.0.0.1:5")


def test_fields_that_these_servers_would_lose_are_refused(tmp_path: Path) -> None:
    """SGLang reads r, lora_alpha and target_modules: with the others' meaning lost it would answer wrongly."""
    config = _config(adapters=_adapters(tmp_path, "a"))
    file = tmp_path / "a" / "adapter_config.json"
    said = json.loads(file.read_text())
    lost: dict[str, Any] = {"use_rslora": True, "use_dora": True, "lora_bias": True, "modules_to_save": ["lm_head"]}
    lost |= {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}, "target_parameters": ["experts.down_proj"]}
    lost |= {"alora_invocation_tokens": [3], "init_lora_weights": "pissa"}
    for field, value in lost.items():
        file.write_text(json.dumps({**said, field: value}))
        with pytest.raises(ConfigError, match=field):
            sglang_argv("python", config, ServerOptions(), 5)
        with pytest.raises(ConfigError, match=field):
            lmdeploy_argv("python", config, ServerOptions(), 5, "http://127.0.0.1:5")


def test_lmdeploy_is_told_in_its_own_words(tmp_path: Path) -> None:
    """LMDeploy 0.18.0's own parser took this command line and read it so (a check by hand, not part of the tests)."""
    options = engine_args("lmdeploy", ["tp=2", "cache_max_entry_count=0.5", "eager_mode=false"])
    config = _config(adapters=_adapters(tmp_path, "a"), max_model_len=300, options=options)
    argv = lmdeploy_argv("python", config, ServerOptions(served_model_name="n"), 5, "http://127.0.0.1:5")
    assert argv[:2] == ["python", "-c"]
    assert argv[3:] == [
        "serve", "api_server", "/models/m", "--server-name", "127.0.0.1", "--server-port", "5", "--model-name", "n",
        "--dtype", "bfloat16", "--max-batch-size", "8", "--allow-origins", "http://127.0.0.1:5", "--session-len", "300",
        "--adapters", f"a={tmp_path}/a", "--tp", "2", "--cache-max-entry-count", "0.5", "--backend", "pytorch",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_dtype": "float32"}, "--torch_dtype float32: LMDeploy computes in float16 or bfloat16"),
        ({"device": "cpu"}, "--device cpu: LMDeploy has no engine for it"),
        ({"chat_template": "t.jinja"}, "--chat_template t.jinja: LMDeploy takes the tokenizer's"),
        ({"adapters": {"a": Path("a")}, "options": {"backend": "turbomind"}}, "--engine_args backend=pytorch"),
    ],
)
def test_what_lmdeploy_does_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lmdeploy_argv("python", _config(**changes), ServerOptions(), 5, "url")


@pytest.mark.parametrize(
    ("backend", "given", "message"),
    [
        ("transformers", "tp=2", "--engine_args tp is no option of --infer_backend transformers: it takes none"),
        ("sglang", "tp_siz=2", "did you mean tp_size"),
        ("sglang", "trust_remote_code=true", "is no option of --infer_backend sglang"),
        ("sglang", "tp_size", "write NAME=VALUE"),
        ("sglang", "tp_size=two", "tp_size=two: it takes a whole number"),
        ("lmdeploy", "cache_max_entry_count=", "it takes a number"),
        ("vllm", "enforce_eager=1", "enforce_eager=1: it takes true or false"),
    ],
)
def test_engine_args_are_checked(backend: str, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_args(backend, [given])


def test_where_a_server_is_not_installed_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MSWIFT_SGLANG_PYTHON", raising=False)
    with pytest.raises(ConfigError, match=r"SGLang is not installed here: .*pip install 'sglang\[all\]', and MSWIFT_"):
        sglang_python()
    monkeypatch.setenv("MSWIFT_SGLANG_PYTHON", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match=r"MSWIFT_SGLANG_PYTHON=.*python: it cannot be run"):
        sglang_python()


def test_vllm_in_this_process_is_not_looked_for_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSWIFT_VLLM_PYTHON", str(tmp_path / "python"))
    opened = []

    def import_module(name: str) -> Any:
        opened.append(name)
        return SimpleNamespace(open_engine=lambda config: None, open_vllm=lambda config: None)

    monkeypatch.setattr(backends, "import_module", import_module)
    monkeypatch.setattr(backends, "find_spec", lambda name: True)
    monkeypatch.setattr(backends, "check_model_dir", lambda path: None)
    backends.open_engine("vllm", EngineConfig(tmp_path))
    backends.open_engine("vllm", EngineConfig(tmp_path), in_process=True)
    assert opened == ["mswift.infer.server_engine", "mswift.infer.vllm_engine"]


@contextmanager
def _answering(answer: dict[str, Any]) -> Iterator[tuple[int, list[str | None]]]:
    """A server's port, and the key of each request that it got."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, keys
        finally:
            server.shutdown()
            thread.join()


def test_a_proxy_is_not_asked_for_servers_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters set http_proxy, not always with no_proxy: it could not reach 127.0.0.1, and would be told the key."""
    monkeypatch.setenv("MSWIFT_JUDGE_API_KEY", "judge")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with (
        _answering({"data": []}) as (proxy, leaked),
        _answering({"data": [{"id": "m"}], "choices": [{"message": {"content": "7"}}]}) as (own, keys),
    ):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy}")
        assert UrlEngine(f"http://localhost:{own}/v1", None, None, 1, key="secret").model == "m"
        judge = SampleConfig(
            model="m", val_dataset=("d",), result_path="r", reward="judge", judge_url=f"http://127.0.0.1:{own}/v1",
            judge_model="m",
        )  # fmt: skip
        assert find_reward(judge)("question", ["answer"], None) == [7.0]
        assert keys == ["Bearer secret", "Bearer judge"]
        port = free_port("127.0.0.1")
        argv = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
        options = ServerOptions(api_key="secret", ready_seconds=60)
        with ChildServer("it", argv, {}, options, port, "m", "/LICENSE"):
            pass
        assert leaked == []
    assert "secret" not in str(options)


@pytest.mark.parametrize(
    "sent", [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", b"HTTP/1.1 200 OK\r\n\r\ndata: {\n", b"no HTTP\r\n\r\n"]
)
def test_a_server_that_breaks_off_is_one_line(sent: bytes) -> None:
    """Whole or streamed, in the middle of an answer or before it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            for _ in range(2):
                line, _ = listener.accept()
                with line:
                    line.recv(1 << 16)
                    line.sendall(sent)

        thread = threading.Thread(target=answer)
        thread.start()
        engine = UrlEngine(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", None, 1)
        for ask in (lambda: engine.generate([Request(prompt="Hi")]), lambda: list(engine.stream(Request(prompt="Hi")))):
            with pytest.raises(ConfigError, match="/completions: .*broke off|no answer from completions"):
                ask()
        thread.join()
