"""SGLang's and LMDeploy's own servers as processes of this one (mswift.infer.child_server). Torch-free.

Both pin another torch than mswift's, so each lives in an environment of its own, whose interpreter a variable names.
Neither key is in an argv, which every user of the machine can read.
"""

import json
import tempfile
from pathlib import Path

from mswift.errors import ConfigError
from mswift.infer.backends import EngineConfig
from mswift.infer.child_server import ChildServer, ServerOptions, flag, free_port
from mswift.infer.interpreters import find_python, own_environment
from mswift.infer.model_dir import check_model_dir
from mswift.infer.vllm_options import checkpoint_dtype
from mswift.tuners.peft_config import read_peft_config

SGLANG_PYTHON = "MSWIFT_SGLANG_PYTHON"
LMDEPLOY_PYTHON = "MSWIFT_LMDEPLOY_PYTHON"
_KEY = "MSWIFT_CHILD_KEY"
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
_LMDEPLOY = (
    "import os, sys; key = os.environ.pop('MSWIFT_CHILD_KEY', '')\n"
    "sys.argv = ['lmdeploy', *sys.argv[1:], *(['--api-keys', key] if key else [])]\n"
    "from lmdeploy.cli import run; run()\n"
)


def sglang_python() -> str:
    """The interpreter that has SGLang. Raises ConfigError."""
    install = f"python3 -m venv sgl && sgl/bin/pip install 'sglang[all]', and {SGLANG_PYTHON}=sgl/bin/python"
    return find_python(SGLANG_PYTHON, ("sglang",), "SGLang", install)[0]


def lmdeploy_python() -> str:
    """The interpreter that has LMDeploy. Raises ConfigError."""
    install = f"python3 -m venv lmd && lmd/bin/pip install lmdeploy, and {LMDEPLOY_PYTHON}=lmd/bin/python"
    return find_python(LMDEPLOY_PYTHON, ("lmdeploy",), "LMDeploy", install)[0]


def sglang_argv(python: str, config: EngineConfig, options: ServerOptions, port: int) -> list[str]:
    """The command line without the key."""
    argv = [python, "-m", "sglang.launch_server", "--model-path", str(config.model.resolve())]
    argv += ["--host", options.host, "--port", str(port), "--served-model-name", model_name(config, options)]
    argv += ["--dtype", config.torch_dtype or checkpoint_dtype(config.model)]
    argv += ["--max-running-requests", str(config.max_num_seqs)]
    if config.max_model_len is not None:
        argv += ["--context-length", str(config.max_model_len)]
    if config.device != "auto":
        argv += ["--device", config.device]
    if config.chat_template is not None:
        argv += ["--chat-template", str(config.chat_template)]
    if config.adapters:
        _check_loras(config)
        argv += ["--max-loras-per-batch", str(len(config.adapters) + 1)]  # one place for the model without any
        argv += ["--lora-paths", *(f"{name}={path.resolve()}" for name, path in config.adapters.items())]
    for name, value in config.options.items():
        argv += flag(name, value, no="")
    return argv


def lmdeploy_argv(python: str, config: EngineConfig, options: ServerOptions, port: int, url: str) -> list[str]:
    """The command line without the key. Raises ConfigError for what LMDeploy does not have."""
    dtype = config.torch_dtype or checkpoint_dtype(config.model)
    if dtype == "float32":
        raise ConfigError("--torch_dtype float32: LMDeploy computes in float16 or bfloat16; choose one of them")
    if config.device == "cpu":
        raise ConfigError("--device cpu: LMDeploy has no engine for it; take --infer_backend transformers or vllm")
    if config.chat_template is not None:
        raise ConfigError(
            f"--chat_template {config.chat_template}: LMDeploy takes the tokenizer's; write it into the model directory"
        )
    own = dict(config.options)
    if config.adapters and own.setdefault("backend", "pytorch") != "pytorch":
        raise ConfigError("--adapters need LMDeploy's engine --engine_args backend=pytorch")
    argv = [python, "-c", _LMDEPLOY, "serve", "api_server", str(config.model.resolve())]
    argv += ["--server-name", options.host, "--server-port", str(port), "--model-name", model_name(config, options)]
    argv += ["--dtype", dtype, "--max-batch-size", str(config.max_num_seqs)]
    argv += ["--allow-origins", url]  # not those of every web page
    if config.max_model_len is not None:
        argv += ["--session-len", str(config.max_model_len)]
    if config.adapters:
        _check_loras(config)
        argv += ["--adapters", *(f"{name}={path.resolve()}" for name, path in config.adapters.items())]
    for name, value in own.items():
        argv += flag(name, value, no="")
    return argv


def _check_loras(config: EngineConfig) -> None:
    """ConfigError for adapters that are no LoRA, and for those that say more than these servers read.

    These are r, lora_alpha and target_modules: the scale is lora_alpha / r whatever else stands there, without a word.
    """
    for path in config.adapters.values():
        settings = read_peft_config(path)
        said = {
            "use_rslora": settings.rslora,
            "use_dora": settings.dora,
            "lora_bias": settings.lora_bias,
            "rank_pattern": settings.rank_pattern,
            "alpha_pattern": settings.alpha_pattern,
            "target_parameters": settings.target_parameters,
            "modules_to_save": settings.modules_to_save,
        }
        for field in (field for field, value in said.items() if value):
            raise ConfigError(
                f"--adapters {path}: SGLang and LMDeploy do not read {field} and would compute another adapter: fold "
                f"it into a copy of its base: mswift merge --model BASE --adapters {path} --output_dir MERGED"
            )


def model_name(config: EngineConfig, options: ServerOptions) -> str:
    """What clients call the model."""
    return options.served_model_name or config.model.resolve().name


class SglangServer(ChildServer):
    """A running server of SGLang."""

    def __init__(self, config: EngineConfig, options: ServerOptions | None = None) -> None:
        options = options or ServerOptions()
        check_model_dir(config.model)
        python = sglang_python()
        port = options.port or free_port(options.host)
        argv = sglang_argv(python, config, options, port)
        self._home = tempfile.TemporaryDirectory()  # nobody else's
        if options.api_key is not None:
            file = Path(self._home.name, "key.yaml")
            file.write_text(json.dumps({"api-key": options.api_key}), encoding="utf-8")  # JSON is YAML
            argv += ["--config", str(file)]
        try:
            super().__init__(
                "SGLang's server", argv, {**own_environment(), **_OFFLINE}, options, port, model_name(config, options)
            )
        finally:
            self._home.cleanup()


class LmdeployServer(ChildServer):
    """A running server of LMDeploy."""

    def __init__(self, config: EngineConfig, options: ServerOptions | None = None) -> None:
        options = options or ServerOptions()
        check_model_dir(config.model)
        python = lmdeploy_python()
        port = options.port or free_port(options.host)
        argv = lmdeploy_argv(python, config, options, port, f"http://{options.host}:{port}")
        key = {} if options.api_key is None else {_KEY: options.api_key}
        super().__init__(
            "LMDeploy's server",
            argv,
            {**own_environment(), **_OFFLINE, **key},
            options,
            port,
            model_name(config, options),
        )
