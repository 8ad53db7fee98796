"""Run by an interpreter that has GPTQModel: quantises a model, and writes its own weights and logits for tokens.

"dtype": of what is not quantised. With an adapter also the loss of PEFT's model on the quantised linears, and its
gradients.

    python gptqmodel_script.py SOURCE TARGET OUT '{"quant_method": "gptq", "bits": 4, ...}' [ADAPTER]
"""

import json
import sys
from pathlib import Path
from typing import Any


def weights(model: Any) -> dict[str, Any]:
    """Weights of the quantised linears as the library multiplies by them: what comes of the unit matrix, in F16."""
    import torch

    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            unit = torch.eye(module.in_features, dtype=torch.float16)
            product = module(unit)
            if module.bias is not None:
                product = product - module.bias
            found[f"{name}.weight"] = product.t().detach().contiguous().clone()
            assert product.dtype == torch.float16
    return found


def adapted(model: Any, adapter: str, tokens: Any) -> dict[str, Any]:
    """Of the mean loss of these tokens [1, s]: itself, and the gradients of the adapter by PEFT's names."""
    import torch
    from peft import PeftModel

    peft = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    logits = peft(input_ids=tokens).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    loss.backward()
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    found = {name.replace(".default", ""): p.grad.float().clone() for name, p in trained.items()}
    return {"loss": loss.detach(), **found}


def main(source: str, target: str, out: str, how: str, adapter: str = "") -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig

    if not Path(target).exists():
        generator = torch.Generator().manual_seed(0)
        vocabulary = AutoConfig.from_pretrained(source).vocab_size
        rows = torch.randint(0, vocabulary, (64, 100), generator=generator).tolist()
        fields = json.loads(how)
        dtype = getattr(torch, fields.pop("dtype", "bfloat16"))
        model = GPTQModel.load(source, QuantizeConfig(**fields), dtype=dtype)
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
        model.save(target)
    quantised = GPTQModel.load(target, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    with torch.no_grad():
        logits = quantised.model(input_ids=torch.arange(1, 33)[None]).logits.float().contiguous()
    found = {**weights(quantised.model), "logits": logits}
    if adapter:
        found |= adapted(quantised.model, adapter, torch.arange(1, 33)[None])
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
