"""X-LoRA on the engine of transformers models: LoRAs and classifier whole and fp32 on every rank.

Every position has scales of its own, out of its hidden state alone: packing and ranks that share sequences need nothing
more than that the first pass attends as the second one does.
"""

from typing import Any

from torch import Tensor, nn

from mswift.converters.plan import ModelTable
from mswift.parallel.fsdp.dropout import CountedDropout
from mswift.parallel.fsdp.methods import MethodAdapters
from mswift.parallel.mapped import whole
from mswift.tuners.xlora import CLASSIFIER, XloraConfig
from mswift.tuners.xlora_modules import Mixer

_STORED = "adapter."


class XloraAdapters(MethodAdapters):
    """As adapters of PEFT's methods are; LoRAs that are not trained are constants."""

    adds_in_place = True

    def __init__(self, model: nn.Module, table: ModelTable, config: XloraConfig) -> None:
        before = {id(parameter): name for name, parameter in model.named_parameters()}
        mixer = Mixer(model, table, config)
        self.drops = _count_dropouts(model, mixer.classifier.layers)
        parameters = dict(model.named_parameters())
        self.base_names = {name: before[id(p)] for name, p in parameters.items() if id(p) in before}
        self.replicated = {name: p for name, p in parameters.items() if name not in self.base_names}
        shapes = {name: tuple(tensor.shape) for name, tensor in mixer.tensors.items()}
        assert shapes == config.shapes(table), shapes.keys() ^ config.shapes(table).keys()
        own, trained = {id(p): name for name, p in self.replicated.items()}, config.trained_shapes(table)
        self.saved = {own[id(mixer.tensors[n])]: whole(n, _STORED + n, shape) for n, shape in trained.items()}
        self._frozen = {name: tensor for name, tensor in mixer.tensors.items() if name not in trained}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.saved)
        self._constants, self._budget = {}, None

    def constants(self) -> dict[str, Tensor]:
        """The LoRAs, where they are not trained."""
        return dict(self._frozen)


def _count_dropouts(model: nn.Module, classifier: Any) -> bool:
    """Replace torch's dropout of LoRAs and classifier, each of which drops for itself; whether there was any."""
    from peft.tuners.lora import LoraLayer

    places = [(f"{CLASSIFIER}.layers", classifier, key, inner) for key, inner in classifier._modules.items()]
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            dropouts: Any = module.lora_dropout
            places += [(f"{name}.lora_dropout", dropouts, key, inner) for key, inner in dropouts.items()]
    found = [(name, owner, key, inner.p) for name, owner, key, inner in places if isinstance(inner, nn.Dropout)]
    for name, owner, key, probability in found:
        owner._modules[key] = CountedDropout(f"{name}.{key}", probability)
    return any(probability for *_, probability in found)
