"""Prompt learning on a tiny model: trained by PEFT and torch by hand, and by the engine on some ranks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mswift.tuners.prompt_config import prompt_config
from mswift.tuners.prompt_modules import make_encoder, stored_names
from mswift.tuners.prompts import PromptConfig
from tests.support.adapters import table_of
from tests.support.engines import make_engine
from tests.support.parity import Batch, backward, random_steps
from tests.support.ranks import join
from tests.support.spaces import gather

SETTINGS: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.0, "clip_grad": 1.0}
NUM_STEPS = 3
NUM_TOKENS = 5
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("prompt", {}),
    "ptuning": ("ptuning", {"encoder_hidden_size": 12}),
    "ptuning lstm": (
        "ptuning",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_num_layers": 2},
    ),
    "prefix": ("prefix", {}),
    "prefix projected": ("prefix", {"prefix_projection": True, "encoder_hidden_size": 16}),
}
"""Name -> (--tuner_type, fields beside the number of virtual tokens)."""
DOCUMENTS = (7, 9, 8, 11, 13)
"""Of rows of 24 positions, two a microbatch."""


def prompt_of(home: Path, case: str, **fields: Any) -> PromptConfig:
    """The adapter of a case for the model in `home`/model."""
    kind, own = CASES[case]
    return prompt_config(table_of(home / "model"), kind, {"num_virtual_tokens": NUM_TOKENS, **own, **fields}, 7)


def steps_of() -> list[list[Batch]]:
    """Two microbatches of two rows of 24 positions in each step."""
    return random_steps(NUM_STEPS)


class Behind(nn.Module):
    """A PeftModel whose logits are those of the tokens it is given, without virtual ones; packed or not."""

    def __init__(self, peft: nn.Module, documents: Sequence[int] | None = None) -> None:
        super().__init__()
        self.peft, self._documents = peft, documents

    def forward(self, tokens: torch.Tensor) -> Any:
        """tokens [b, s] -> .logits [b, s, V]; a document is computed alone."""
        if self._documents is None:
            output = self.peft(tokens)
            output.logits = output.logits[:, -tokens.shape[1] :]
            return output
        parts = [self.peft(part[None]) for part in tokens.flatten().split(list(self._documents))]
        lengths = self._documents
        logits = [p.logits[0, -length:] for p, length in zip(parts, lengths, strict=True)]
        parts[0].logits = torch.cat(logits).unflatten(0, tokens.shape)
        return parts[0]


def peft_model(home: Path, config: PromptConfig) -> Any:
    """PEFT's model with the adapter as it starts here."""
    from peft import get_peft_config, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32, attn_implementation="eager")
    settings = get_peft_config(config.content("base") | {"inference_mode": False})
    model = get_peft_model(base, settings)
    encoder: Any = model.prompt_encoder["default"]
    encoder.load_state_dict(make_encoder(config).state_dict())
    return model


def peft_steps(home: Path, config: PromptConfig, documents: Sequence[int] | None = None) -> dict[str, Any]:
    """PEFT and torch by hand: logits, losses, norms, the first step's gradients, weights, the logits at the end."""
    peft = peft_model(home, config)
    model, steps = Behind(peft, documents), steps_of()
    encoder = peft.prompt_encoder["default"]
    names = {stored: encoder.get_parameter(name) for name, stored in stored_names(config, encoder).items()}
    optimizer = torch.optim.SGD(names.values(), SETTINGS["lr"], momentum=0.9)
    result: dict[str, Any] = {"loss": [], "grad_norm": []}
    with torch.no_grad():
        result["logits"] = Behind(peft)(steps[0][0][0]).logits.numpy()
    for step in steps:
        optimizer.zero_grad()
        result["loss"].append(backward(model, step))
        result["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(names.values(), SETTINGS["clip_grad"])))
        if "gradients" not in result:
            result["gradients"] = {n: p.grad.clone().numpy() for n, p in names.items() if p.grad is not None}
        optimizer.step()
    result["weights"] = {n: p.detach().clone().numpy() for n, p in names.items()}
    with torch.no_grad():
        result["last"] = Behind(peft)(steps[0][0][0]).logits.numpy()
    return result | {"trainable": peft.get_nb_trainable_parameters()[0]}


def on_rank(
    payload: Mapping[str, Any], begin: Callable[[Any, Any, Any], None] = lambda *_: None
) -> list[dict[str, Any]]:
    """One rank: every adapter of `configs` in turn; `run`: the last step's checkpoint, and the rest from the second.

    begin: what is done with (engine, table, adapter) before the first step.
    """
    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch
    from tests.support.methods import _resumed, _save

    dims, device = join(payload["world_size"], **payload["layout"])
    reader, documents, results = WeightReader(payload["home"] / "model"), payload["documents"], []
    steps = [[Microbatch(*batch, documents=documents) for batch in step] for step in steps_of()]
    for number, config in enumerate(payload["configs"]):
        settings = SETTINGS | {"backend": "fsdp", "method": config} | payload["settings"]
        engine = make_engine(reader.table, dims, settings, device)
        engine.load_weights(reader)
        begin(engine, reader.table, config)
        result: dict[str, Any] = {"logits": engine.logits(steps[0][0].tokens).float().numpy()}
        place, n = engine.coordinate.dp, dims.dp
        result["evaluated"] = engine.evaluate(steps[0][place::n])[0]
        done, saved = [], None
        for step in steps:
            done.append(engine.train_step(step[place::n], SETTINGS["lr"]))
            if "gradients" not in result:
                result["gradients"] = gather(engine.gradients())
            if len(done) == 2 and payload["run"] is not None:
                saved = _save(engine, reader, payload["run"] / str(number))
        result |= {"loss": [d.loss for d in done], "grad_norm": [d.grad_norm for d in done]}
        result["last"] = engine.logits(steps[0][0].tokens).float().numpy()
        result["weights"], result["state"] = gather(engine.model_shards()), gather(engine.optimizer_shards())
        result["trainable"] = engine.trainable_parameters
        if payload["run"] is not None:
            _save(engine, reader, payload["run"] / str(number))
        engine.close()
        if saved is not None:
            result["resumed"] = _resumed(make_engine(reader.table, dims, settings, device), reader, saved, steps)
        results.append(result)
    return results
