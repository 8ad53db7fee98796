"""Liger's kernels on a CPU, by triton's interpreter, which has to be chosen before triton is imported: a program.

`python -m tests.support.liger TYPE ...` prints one JSON object: for each kind of model what changed in an instance, and
how far loss and gradients are from transformers'. `... run WORDS` is an mswift command in such a process.
The interpreter lacks two things of a GPU's compiler: numbers are no tensors, and libdevice is not there.
"""

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"


def complete_the_interpreter() -> None:
    """Numbers become fp32, as on a GPU; functions of libdevice are triton's own."""
    import importlib

    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    convert = interpreter._implicit_cvt

    def with_numbers(value: Any) -> Any:
        if type(value) is not float:
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = with_numbers
    importlib.import_module("liger_kernel.ops.rms_norm").rsqrt = lambda x: tl.math.rsqrt(x)
    importlib.import_module("liger_kernel.ops.geglu").tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def compared(model_type: str) -> dict[str, Any]:
    """A random model with and without Liger's kernels, and another instance afterwards."""
    import torch

    from mswift.parallel.fsdp.liger import use_liger
    from tests.support.family_configs import family_config
    from tests.support.parity import MODELS, VOCAB, model_of, random_model

    def made() -> Any:
        torch.manual_seed(3)
        if model_type in MODELS:
            return random_model(model_type, num_hidden_layers=2)
        return model_of(family_config(model_type, vocab_size=VOCAB))

    tokens = torch.randint(0, VOCAB, (1, 6), generator=torch.Generator().manual_seed(5))

    def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = made().train()
    loss, gradients = step(model)
    use_liger(model, model_type)
    ours, found = step(model)
    untouched, again = step(made().train())
    return {
        "changed": sorted({type(m).__name__ for m in model.modules() if "forward" in vars(m)}),
        "loss": abs(ours - loss) / loss,
        "gradients": max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in gradients.items()),
        "others": untouched == loss and all(torch.equal(again[n], g) for n, g in gradients.items()),
    }


def main(words: list[str]) -> int:
    """As the head says."""
    complete_the_interpreter()
    if words[0] == "run":
        from mswift.cli.main import main as command

        return command(words[1:])
    print(json.dumps({name: compared(name) for name in words}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
