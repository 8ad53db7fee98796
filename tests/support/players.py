"""Interpreters whose SGLang, LMDeploy or vLLM is played by `mswift deploy`: their flags, HTTP and processes are real,
the engines behind are not. They show how mswift starts, asks and ends such a server; nothing of the engines themselves.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PLAY = """
import argparse, json, os, subprocess, sys, time
from pathlib import Path

def play(parse):
    if os.environ.get("PLAYER") == "dies":
        print("CUDA out of memory", flush=True)
        sys.exit(3)
    if os.environ.get("PLAYER") == "stubborn":
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code])
        time.sleep(600)
    parser = argparse.ArgumentParser()
    for name in parse["names"].values():
        parser.add_argument(name, nargs="*" if "lora" in name or "adapters" in name or "keys" in name else None)
    parser.add_argument("words", nargs="*")
    given, unknown = parser.parse_known_args()
    got = {name: getattr(given, flag[2:].replace("-", "_")) for name, flag in parse["names"].items()}
    assert "--trust-remote-code" not in sys.argv
    print(json.dumps(unknown), flush=True)
    model = got.get("model") or given.words[-1]
    argv = ["deploy", "--model", model, "--host", got["host"], "--port", got["port"]]
    argv += ["--served_model_name", got["name"], "--torch_dtype", got["dtype"]]
    if got["adapters"]:
        prefix = parse["adapter"].format(model=got["name"])
        argv += ["--adapters", *(prefix + one for one in got["adapters"])]
    key = os.environ.pop("VLLM_API_KEY", None) or (got.get("keys") or [None])[0]
    if got.get("config"):
        key = json.loads(Path(got["config"]).read_text())["api-key"]
        assert Path(got["config"]).parent.stat().st_mode & 0o077 == 0
    assert key and key not in Path("/proc/self/cmdline").read_text()
    os.environ["MSWIFT_API_KEY"] = key
    os.execv(sys.executable, [sys.executable, "-m", "mswift.cli.main", *argv])
"""
_COMMON = {"host": "--host", "port": "--port", "name": "--served-model-name", "dtype": "--dtype"}
_SERVERS = {
    "sglang": ("sglang/launch_server.py", "play(PARSE)", "{model}:",
               {**_COMMON, "model": "--model-path", "adapters": "--lora-paths", "config": "--config"}),
    "vllm": ("vllm/entrypoints/openai/api_server.py", "play(PARSE)", "",
             {**_COMMON, "model": "--model", "adapters": "--lora-modules"}),
    "lmdeploy": ("lmdeploy/cli/__init__.py", "def run():\n    play(PARSE)", "",
                 {"host": "--server-name", "port": "--server-port", "name": "--model-name", "dtype": "--dtype",
                  "adapters": "--adapters", "keys": "--api-keys"}),
}  # fmt: skip


def python_with(home: Path, package: str) -> str:
    """Path of an interpreter in `home` that has mswift's own packages and a played `package`."""
    home.mkdir(parents=True)
    file, code, adapter, names = _SERVERS[package]
    path = home / "modules" / file
    path.parent.mkdir(parents=True)
    for folder in [path.parent, *path.parent.relative_to(home / "modules").parents][1:-1]:
        (home / "modules" / folder / "__init__.py").touch()
    (home / "modules" / package / "__init__.py").touch()
    parse = {"names": names, "adapter": adapter}
    path.write_text(f"from player import play\nPARSE = {parse!r}\n{code}\n")
    (home / "modules" / "player.py").write_text(_PLAY)
    told = home / "modules" / f"{package}-9.9.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")
    python = home / "python"
    paths = f"{home / 'modules'}:{ROOT}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={paths} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)
