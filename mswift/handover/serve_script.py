"""serve.sh: the command that serves a proved directory with vLLM, for any shell. Torch-free."""

import shlex
from pathlib import Path

from mswift.infer.backends import EngineConfig
from mswift.infer.vllm_options import vllm_environment, vllm_python
from mswift.infer.vllm_server import ServerOptions, server_argv

_PORT = 8000


def write_serve_script(path: Path, model: Path, adapter: Path | None) -> None:
    """An executable script; it finds its own directory, so that the directory may move (the base of an adapter not)."""
    python, installed = vllm_python()
    adapters = {} if adapter is None else {adapter.resolve().name: adapter}
    options = ServerOptions(served_model_name=model.resolve().name)
    argv = server_argv(EngineConfig(model.resolve(), adapters), options, _PORT)[1:]
    replaced = {
        str(path.parent.resolve()): '"$here"',
        options.host: '"${HOST:-127.0.0.1}"',
        str(_PORT): '"${PORT:-8000}"',
    }
    replaced |= {f"{name}={path.parent.resolve()}": f'{shlex.quote(name)}="$here"' for name in adapters}
    words = [replaced.get(word) or shlex.quote(word) for word in argv]
    variables = vllm_environment(installed, in_process=False)
    lines = [
        "#!/bin/sh",
        "# Serves this directory with vLLM: HOST, PORT and VLLM_API_KEY are read, arguments are passed on.",
        "set -eu",
        'here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)',
        f"python=${{MSWIFT_VLLM_PYTHON:-{shlex.quote(python)}}}",
        '[ -x "$python" ] || python=python3',
        'export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"',
        *(f'export {name}="${{{name}:-{value}}}"' for name, value in variables.items()),
        f'exec "$python" {" ".join(words)} "$@"',
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(0o755)
