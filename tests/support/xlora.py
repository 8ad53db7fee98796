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


def make_loras(model: Any, home: Path, dropout: float = 0.0, leaves: Mapping[str, str] | None = None) -> list[str]:
    """Random LoRAs of `LORAS` as PEFT saves them, in `home`/lora-<number>; leaves: how the model calls its linears."""
    from peft import LoraConfig, get_peft_model

    paths = []
    for number, fields in enumerate(LORAS):
        if leaves and isinstance(fields["target_modules"], list):
            fields = {**fields, "target_modules": [leaves.get(name, name) for name in fields["target_modules"]]}
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


def engine_steps(
    home: Path,
    configs: Sequence[XloraConfig],
    world_size: int,
    dims: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    documents: Sequence[int] | None = None,
    run: Path | None = None,
) -> list[dict[str, Any]]:
    """The same of each by the engine: what the first rank has, tensors put together; `run`: as in `prompts`."""
    from tests.support.ranks import run_ranks
    from tests.support.spaces import assemble

    payload = {"home": home, "world_size": world_size, "layout": dims or {}, "settings": settings or {}}
    payload |= {"documents": documents, "configs": list(configs), "run": run}
    found = []
    for one in zip(*run_ranks(world_size, on_rank, payload), strict=True):
        result = dict(one[0])
        for part, prefix in (("gradients", "gradient.adapter."), ("weights", "adapter.")):
            arrays = assemble([rank[part] for rank in one])
            result[part] = {name.removeprefix(prefix): array for name, array in arrays.items()}
        result["each"] = [(rank["weights"], rank["state"], rank.get("resumed")) for rank in one]
        found.append(result)
    return found


def on_rank(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As `tests.support.prompts.on_rank`, from the LoRAs in `home`."""

    def begin(engine: Any, table: Any, config: XloraConfig) -> None:
        from mswift.tuners.xlora_adapter import XloraStart

        engine.load_adapter(XloraStart(table, config, [Path(path) for path in lora_paths(payload["home"])]))

    return prompts.on_rank(payload, begin)


def continued_on_rank(payload: Mapping[str, Any]) -> dict[str, Any]:
    """One rank: the third step behind the checkpoint `saved`, its loss and logits; then logits of `directory`."""
    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch
    from mswift.train import checkpoint
    from mswift.tuners.xlora_adapter import XloraAdapter
    from tests.support.engines import make_engine
    from tests.support.ranks import join

    dims, device = join(1)
    reader, steps = WeightReader(payload["home"] / "model"), steps_of()
    settings = SETTINGS | {"backend": "fsdp", "method": payload["config"]}
    engine = make_engine(reader.table, dims, settings, device)
    engine.load_weights(reader, resumed=True)
    checkpoint.load(engine, payload["saved"], 0, 1)
    done = engine.train_step([Microbatch(*batch) for batch in steps[2]], SETTINGS["lr"])
    result: dict[str, Any] = {"loss": done.loss, "last": engine.logits(steps[0][0][0]).numpy()}
    engine.close()
    adapter = XloraAdapter(payload["directory"])
    engine = make_engine(reader.table, dims, settings | {"method": adapter.config}, device)
    engine.load_weights(reader)
    engine.load_adapter(adapter)
    result["of directory"] = engine.logits(steps[0][0][0]).numpy()
    engine.close()
    return result


def load_xlora(home: Path, directory: Path) -> Any:
    """PEFT's model of a directory."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32, attn_implementation="eager")
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, str(directory)).eval()


def save_whole(peft: Any, folder: Path) -> None:
    """As PEFT saves it, with all of the classifier."""
    from safetensors.torch import save_file

    peft.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in peft.state_dict().items() if CLASSIFIER in name}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
