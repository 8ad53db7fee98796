"""Virtual tokens in a transformers model: PEFT's encoders, and hooks that put what they make where it belongs.

Token ids below 0 are virtual: -1 is the first one, -2 the second. A row has them where its virtual tokens are to be;
whatever lays rows out (padding, packing, ranks that share a sequence) lays them out too. Shapes: b rows, s positions,
n virtual tokens, h hidden, L layers, g heads of keys, d their width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mswift.tuners.prompts import EMBEDDINGS, ENCODER, PEFT_TYPES, PromptConfig

ATTRIBUTE = ENCODER.removesuffix(".")
"""Under which a model has the encoder."""


def virtual_ids(count: int) -> Tensor:
    """int64 [count]: the token ids that mean virtual tokens, in their order."""
    return -1 - torch.arange(count)


def make_encoder(config: PromptConfig) -> nn.Module:
    """PEFT's module, fp32 on the CPU, with random first values: a function of the seed."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    kind = PeftType(PEFT_TYPES[config.kind])
    own = config.content(None) | {"inference_mode": False}
    own = {name: value for name, value in own.items() if name != "peft_type" and not name.startswith("prompt_tuning")}
    own.pop("tokenizer_name_or_path", None)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(config.seed)
        settings = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**own)
        extra = (None,) if config.kind == "prompt" else ()  # embeddings to start from, of which it needs none
        encoder: nn.Module = PEFT_TYPE_TO_TUNER_MAPPING[kind](settings, *extra)
    return encoder.float()


def stored_names(config: PromptConfig, encoder: nn.Module) -> dict[str, str]:
    """Parameter of the encoder -> its name in checkpoints."""
    if not config.has_network:
        return {"embedding.weight": EMBEDDINGS}
    return {name: ENCODER + name for name, _ in encoder.named_parameters()}


def made_by(encoder: nn.Module, count: int) -> Tensor:
    """What an encoder makes for each of its `count` virtual tokens, [n, h] (prefix: [n, 2 L g d])."""
    numbers = torch.arange(count, device=next(encoder.parameters()).device)
    made: Tensor = encoder(numbers[None])[0]
    return made


def placed(table: Tensor, ids: Tensor) -> Tensor:
    """table [n, w], ids int64 [b, s] -> [b, s, w]: the rows of virtual tokens where they are, zeros elsewhere.

    An embedding, since the gradient of advanced indexing is summed in the order in which threads of a CPU come.
    """
    n = len(table)
    return F.embedding(torch.where(ids < 0, -1 - ids, n), F.pad(table, (0, 0, 0, 1)), padding_idx=n)


class PromptEmbeddings:
    """Hooks on the embedding: of virtual tokens the vectors that `vectors` gives, [n, h], at each forward pass."""

    def __init__(self, vectors: Callable[[], Tensor]) -> None:
        self._vectors = vectors
        self._ids: Tensor | None = None

    def attach(self, embedding: nn.Module) -> "PromptEmbeddings":
        """To the model's embedding; returns itself."""
        embedding.register_forward_pre_hook(self._before)
        embedding.register_forward_hook(self._behind)
        return self

    def _before(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self._ids = inputs[0]
        return (inputs[0].clamp(min=0), *inputs[1:])

    def _behind(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        ids, self._ids = self._ids, None
        assert ids is not None
        return self.embedded(ids, output)

    def embedded(self, ids: Tensor, output: Tensor) -> Tensor:
        """ids int64 [b, s], output [b, s, h] -> the same with the vectors of virtual tokens."""
        return torch.where((ids < 0)[..., None], placed(self._vectors().to(output.dtype), ids), output)


Keys = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Number of a layer, key and value [b, g, s, d] of this forward pass -> those that are attended to."""


class PrefixKeys(PromptEmbeddings):
    """Virtual tokens have keys and values of their own in every layer; what they are embedded as is seen by nobody.

    note: told at each forward pass how keys and values are to be changed.
    """

    def __init__(self, vectors: Callable[[], Tensor], num_layers: int, note: Callable[[Keys], None]) -> None:
        super().__init__(vectors)
        self._num_layers, self._note = num_layers, note

    def embedded(self, ids: Tensor, output: Tensor) -> Tensor:
        """As it was: token 0 stands for virtual ones."""
        made = self._vectors()
        by_layer = made.view(len(made), self._num_layers, -1)  # [n, L, 2 g d]
        virtual = (ids < 0)[:, None, :, None]

        def keys(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            heads, width = key.shape[1], key.shape[3]
            pairs = placed(by_layer[:, layer].to(key.dtype), ids).view(*ids.shape, 2, heads, width)
            own = pairs.permute(2, 0, 3, 1, 4)  # [2, b, g, s, d]
            return torch.where(virtual, own[0], key), torch.where(virtual, own[1], value)

        self._note(keys)
        return output


def split_prefix(made: Tensor, num_layers: int, heads: int, width: int) -> Tensor:
    """[n, 2 L g d] -> [L, 2, g, n, d]: keys and values of every layer, as PEFT orders them."""
    return made.view(len(made), num_layers, 2, heads, width).permute(1, 2, 3, 0, 4)
