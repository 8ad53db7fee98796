"""X-LoRA on a tiny model: trained by PEFT and torch by hand, and by the engine on some ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mswift.tuners.xlora import CLASSIFIER, STORED_CLASSIFIER, XloraConfig, xlora_config
from mswift.tuners.xlora_modules import first_classifier
from tests.support import prompts
from tests.support.adapters import table_of
from tests.support.parity import backward
from tests.support.prompts import SETTINGS, Behind, steps_of

LORAS: Sequence[dict[str, Any]] = (
    {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
    {"r": 3, "lora_alpha": 9, "target_modules": r"model\.layers\.1\..*(o_proj|v_proj)"},
)
"""Of different modules and ranks."""
CASES: Mapping[str, dict[str, Any]] = {
    "one scale": {},
    "deep": {
        "xlora_depth": 3, "xlora_size": 12, "xlora_dropout_p": 0.0, "layerwise_scalings": True,
        "softmax_temperature": 0.5, "top_k_lora": 2,
    },
    "trained": {
        "xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0, "layerwise_scalings": True,
        "use_trainable_adapters": True, "scaling_pass_value": 0.3, "global_scaling_weight": 1.5,
    },
    "softmax of the largest": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
}  # fmt: skip
"""Fields of --tuner_config."""


def make_loras(model: Any, home: Path, dropout: float = 0.0) -> list[str]:
    """Random LoRAs of `LORAS` as PEFT saves them, in `home`/lora-<number>."""
    from peft import LoraConfig, get_peft_model

    paths = []
    for number, fields in enumerate(LORAS):
        own = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=dropout, **fields)
        torch.manual_seed(number)
        peft: Any = get_peft_model(model, own)
        paths.append(str(home / f"lora-{number}"))
        peft.save_pretrained(paths[-1])
        model = peft.unload()
    return paths


def lora_paths(home: Path) -> list[str]:
    """Those that `make_loras` made."""
    return [str(home / f"lora-{number}") for number in range(len(LORAS))]


def mixed_of(home: Path, fields: Mapping[str, Any]) -> XloraConfig:
    """X-LoRA of the LoRAs in `home`."""
    return xlora_config(table_of(home / "model"), fields, lora_paths(home), 7)


def peft_model(home: Path, config: XloraConfig) -> Any:
    """PEFT's model, its classifier as it starts here."""
    from peft import XLoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32, attn_implementation="eager")
    base.config.use_cache = False
    adapters = {str(number): path for number, path in enumerate(lora_paths(home))}
    fields = {**config.fields, "top_k_lora": config.fields["top_k_lora"] or None}
    settings = XLoraConfig(task_type="CAUSAL_LM", hidden_size=config.hidden_size, adapters=adapters, **fields)
    model: Any = get_peft_model(base, settings)
    start = first_classifier(table_of(home / "model"), config)
    own = {name.removeprefix(STORED_CLASSIFIER): tensor for name, tensor in start.items()}
    getattr(model.base_model, CLASSIFIER).load_state_dict(own)
    return model


def trained_names(peft: Any) -> dict[str, Any]:
    """Name in checkpoints -> trained parameter of PEFT's model."""
    found = {}
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            module, lora, end = name.removeprefix("base_model.lora_model.model.").rpartition(".lora_")
            letter, _, number = end.removesuffix(".weight").partition(".")
            found[f"{number}.{module}.lora_{letter}.weight" if lora else name] = parameter
    return found


def peft_steps(home: Path, config: XloraConfig, documents: Sequence[int] | None = None) -> dict[str, Any]:
    """PEFT and torch by hand: logits, losses, norms, the first step's gradients, weights, the logits at the end."""
    peft = peft_model(home, config)
    model, steps, names = Behind(peft, documents), steps_of(), trained_names(peft)
    optimizer = torch.optim.SGD(names.values(), SETTINGS["lr"], momentum=0.9)
    result: dict[str, Any] = {"loss": [], "grad_norm": []}
    with torch.no_grad():
        result["logits"] = peft(steps[0][0][0]).logits.numpy()
    for step in steps:
        optimizer.zero_grad()
        result["loss"].append(backward(model, step))
        result["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(names.values(), SETTINGS["clip_grad"])))
        if "gradients" not in result:
            result["gradients"] = {n: p.grad.clone().numpy() for n, p in names.items()}
        optimizer.step()
    result["weights"] = {n: p.detach().clone().numpy() for n, p in names.items()}
    with torch.no_grad():
        result["last"] = peft(steps[0][0][0]).logits.numpy()
    return result | {"trainable": sum(p.numel() for p in names.values())}


def on_rank(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As `tests.support.prompts.on_rank`, from the LoRAs in `home`."""

    def begin(engine: Any, table: Any, config: XloraConfig) -> None:
        from mswift.tuners.xlora_adapter import XloraStart

        engine.load_adapter(XloraStart(table, config, [Path(path) for path in lora_paths(payload["home"])]))

    return prompts.on_rank(payload, begin)
