"""Dropout of PEFT's layers that drops what the Megatron engine would drop, at any layout and after a resume."""

from torch import Tensor, nn

from mswift.parallel.dropout import dropped


class CountedDropout(nn.Module):
    """In place of PEFT's: drops what the Megatron engine drops, at any layout. x [b, s, i]."""

    def __init__(self, name: str, probability: float) -> None:
        super().__init__()
        self._name, self._probability = name, probability

    def forward(self, x: Tensor) -> Tensor:
        """As `mswift.parallel.dropout.dropped`."""
        rows = dropped(x.transpose(0, 1), self._name, self._probability, first_token=0, first_feature=0)
        return rows.transpose(0, 1)


def count_dropouts(model: nn.Module, layer: type[nn.Module]) -> bool:
    """Replace torch's dropout in PEFT's layers of that class; whether there was any."""
    found = False
    for name, module in list(model.named_modules()):
        if not isinstance(module, layer):
            continue
        for child in [c for c in module.modules() if isinstance(c, nn.ModuleDict)]:
            for key, inner in list(child.items()):
                if type(inner) is nn.Dropout and inner.p:
                    child[key] = CountedDropout(name, inner.p)
                    found = True
    return found
