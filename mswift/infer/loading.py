"""Model, tokenizer and adapter from files, strictly: every tensor expected and none extra."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mswift.converters.catalog import read_config
from mswift.converters.plan import table_for
from mswift.errors import CheckpointError, ConfigError
from mswift.infer.dequantised import from_codes, is_dequantised
from mswift.infer.model_dir import check_model_dir
from mswift.tuners.adapter import open_adapter
from mswift.tuners.hidden import HiddenConfig, is_hidden, layer_prefix
from mswift.tuners.hidden_modules import Bottleneck, LoReft, attach, set_active
from mswift.tuners.method_adapter import OtherAdapter
from mswift.tuners.peft_config import check_adapter_dir
from mswift.tuners.prompts import is_prompt
from mswift.tuners.xlora import check_fits
from mswift.tuners.xlora_adapter import XloraAdapter
from mswift.tuners.xlora_files import is_xlora
from mswift.tuners.xlora_modules import Mixer, mixer_of

_REFUSALS = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the names of adapters that were trained with transformers 4: a LoRA for each linear of each expert."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here. Raises ConfigError when there is no such device."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("--device cuda: this machine has no usable GPU; use --device auto or --device cpu")
    return torch.device("cuda" if has_gpu and device != "cpu" else "cpu")


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; code of the directory is never run. Raises ConfigError."""
    check_model_dir(model_dir)
    try:
        return cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False),
        )
    except _REFUSALS as error:
        raise ConfigError(f"--model {model_dir}: its tokenizer cannot be loaded: {_brief(error)}") from error


def load_model(model_dir: Path, dtype: str | None, device: torch.device) -> PreTrainedModel:
    """The model of a Hugging Face directory, in evaluation mode on `device`.

    Raises ConfigError (not a model that transformers knows) and CheckpointError (tensors missing, extra or of another
    shape, or a damaged file).
    """
    check_model_dir(model_dir)
    try:
        load: Any = from_codes if is_dequantised(model_dir) else AutoModelForCausalLM.from_pretrained
        loaded: Any = load(
            model_dir,
            dtype=_DTYPES[dtype] if dtype else "auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **_attention(model_dir),
        )
    except SafetensorError as error:
        raise CheckpointError(f"--model {model_dir}: a safetensors file is damaged: {error}") from error
    except OSError as error:
        raise CheckpointError(f"--model {model_dir}: {_brief(error)}") from error
    except _REFUSALS as error:
        raise ConfigError(f"--model {model_dir}: transformers cannot load it: {_brief(error)}") from error
    model, info = loaded
    _refuse_differences(model_dir, info)
    return cast(PreTrainedModel, model.to(device).eval())


def _attention(model_dir: Path) -> dict[str, str]:
    """Eager attention for models that cap its logits (Gemma 2): transformers' default leaves the cap out, silently."""
    config = read_config(model_dir)
    return {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}


def _refuse_differences(model_dir: Path, info: dict[str, Any]) -> None:
    problems = []
    if info["missing_keys"]:
        problems.append(f"missing: {_some(info['missing_keys'])}")
    if info["unexpected_keys"]:
        problems.append(f"not part of the model: {_some(info['unexpected_keys'])}")
    problems += [
        f"{name} has shape {tuple(found)} where config.json says {tuple(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])[:5]
    ]
    if problems:
        raise CheckpointError(f"--model {model_dir}: tensors do not fit config.json: " + "; ".join(problems))


def load_adapters(model: PreTrainedModel, adapters: Mapping[str, Path]) -> PreTrainedModel:
    """The model with PEFT adapters (name -> directory) on it, not merged; the model itself where there are none.

    Those of prompt learning are left out (`mswift.infer.virtual`).

    Raises ConfigError (no adapter there, or one for other modules) and CheckpointError (tensors missing, extra or of
    another shape: an adapter of another base model).
    """
    adapted: Any = model
    adapters = {name: path for name, path in adapters.items() if not is_prompt(check_adapter_dir(path))}
    hidden = [path for path in adapters.values() if is_hidden(check_adapter_dir(path))]
    if hidden:
        if len(adapters) > 1:
            raise ConfigError(
                f"--adapters: {hidden[0]} changes hidden states, and a model takes one such adapter and no other: give "
                "it alone"
            )
        _attach_hidden(model, hidden[0])
        return model.eval()
    mixed = [path for path in adapters.values() if is_xlora(check_adapter_dir(path))]
    if mixed:
        if len(adapters) > 1:
            raise ConfigError(
                f"--adapters: {mixed[0]} mixes LoRAs of its own by a pass before every pass, and no other adapter is "
                "computed beside it: give it alone"
            )
        _attach_mixed(model, mixed[0])
        return model.eval()
    by_method: dict[str, dict[str, Path]] = {}
    for name, path in adapters.items():
        by_method.setdefault(str(check_adapter_dir(path).get("peft_type")), {})[name] = path
    for method in sorted(by_method, key=lambda method: method != "VERA"):  # which looks for linears without layers
        # a PeftModel has adapters of one method; those of others go around its layers
        own: Any = None
        for name, path in by_method[method].items():
            own = _load_adapter(model, own, name, path)
        adapted = own
    return cast(PreTrainedModel, adapted.eval())


def _load_adapter(model: PreTrainedModel, adapted: Any, name: str, adapter_dir: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    config = check_adapter_dir(adapter_dir)
    _, stored = open_adapter(adapter_dir)
    base = model.config._name_or_path
    try:
        if adapted is None:
            adapted = PeftModel.from_pretrained(model, str(adapter_dir), adapter_name=name, is_trainable=False)
        else:
            adapted.load_adapter(str(adapter_dir), adapter_name=name, is_trainable=False)
    except RuntimeError as error:  # torch's load_state_dict: sizes differ
        raise CheckpointError(
            f"--adapters {adapter_dir}: it does not fit --model {base}: {_mismatch(error)}; "
            f"give the base model that it was trained on"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        targets = config.get("target_modules")
        raise ConfigError(f"--adapters {adapter_dir} (target_modules {targets!r}): peft: {error}") from error
    if any(_ONE_EXPERT.search(name) for name in stored):
        _check_converted(adapted, name, adapter_dir)
        return adapted
    state = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
    missing, extra = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    if extra:  # PEFT saves an embedding that carries an adapter together with it
        extra -= {key for key in adapted.state_dict() if key.endswith(".base_layer.weight")}
    if missing or extra:
        raise CheckpointError(
            f"--adapters {adapter_dir}: its {len(stored)} tensors are not the {len(expected)} that "
            f"adapter_config.json means on --model {base}"
            + (f"; missing: {_some(missing)}" if missing else "")
            + (f"; not used: {_some(extra)}" if extra else "")
        )
    return adapted


def _check_converted(adapted: Any, name: str, adapter_dir: Path) -> None:
    """CheckpointError where PEFT did not find a place for all of one LoRA an expert, which it stacks in memory.

    Names cannot be compared with the file's, so that PEFT is asked again, and tells what it left.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same in words
        result = adapted.load_adapter(str(adapter_dir), name, is_trainable=False)
    wanted = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or wanted:
        base = adapted.config._name_or_path
        raise CheckpointError(
            f"--adapters {adapter_dir}: PEFT does not place its LoRAs of single experts ({len(wanted)} tensors stay "
            f"empty, {wanted[0] if wanted else result.unexpected_keys[0]} is the first); mswift merge --model {base} "
            f"--adapters {adapter_dir} --output_dir MERGED folds them into a copy of the model"
        )


def _attach_hidden(model: PreTrainedModel, path: Path) -> None:
    """Houlsby's adapters or LoReFT, from files."""
    table = table_for(model.config.to_dict())
    adapter = OtherAdapter(path, table.spec.num_layers)
    assert isinstance(adapter.config, HiddenConfig)
    adapter.check(adapter.config.shapes(table))
    parameters = attach(model, layer_prefix(table), adapter.config, table.spec.hidden_size)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapter.tensor(name))
    for module in model.modules():
        if isinstance(module, Bottleneck | LoReft):
            module.to(model.device)


def _attach_mixed(model: PreTrainedModel, path: Path) -> None:
    """X-LoRA, from files."""
    table = table_for(model.config.to_dict())
    adapter = XloraAdapter(path)
    check_fits(adapter.config, table, path)
    adapter.check(adapter.config.shapes(table))
    mixer = Mixer(model, table, adapter.config)
    with torch.no_grad():
        for name, parameter in mixer.tensors.items():
            parameter.copy_(adapter.tensor(name))
    mixer.classifier.to(model.device)
    with torch.no_grad():
        model(
            input_ids=torch.zeros(2, 3, dtype=torch.long, device=model.device), use_cache=False
        )  # refuses what cannot be


class ActiveAdapter:
    """Which adapter of a model is in use; changed only where another one is asked for. names: of those on the model."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self._model = model
        self._names = names
        self._now: str | object | None = self  # unknown: the first `use` sets it

    def use(self, name: str | None) -> None:
        """Answer with this adapter from now on; None, or a name that is not on the model: with the model itself."""
        name = name if name in self._names else None
        if name == self._now or not self._names:
            return
        self._now = self  # should the next lines fail
        mixer = mixer_of(self._model)
        if mixer is not None:
            mixer.disabled = name is None
        elif not set_active(self._model, name is not None):
            _switch_layers(self._model, name)
        self._now = name


def _switch_layers(model: Any, name: str | None) -> None:
    """Of PEFT's layers, which may stand around each other, let those with this adapter compute, and no others."""
    from peft.tuners.tuners_utils import BaseTunerLayer, set_adapter
    from peft.utils.other import AuxiliaryTrainingWrapper

    if name is not None:
        set_adapter(model, name, inference_mode=True)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            parts = (getattr(module, part, None) for part in module.adapter_layer_names)
            module.enable_adapters(any(part is not None and name in part for part in parts))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module.enable_adapters(name is not None)


def _brief(error: Exception) -> str:
    """The first paragraph of a library's message, in one line."""
    return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__


def _mismatch(error: RuntimeError) -> str:
    """The first tensor that torch names with two shapes, and how many it names."""
    found = re.findall(r"size mismatch for (\S+): .*?Size\((\[.*?\])\).*?Size\((\[.*?\])\)", str(error))
    if not found:
        return _brief(error)
    name, stored, wanted = found[0]
    return f"{name} has shape {stored}, the model needs {wanted} ({len(found)} such tensors)"


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
