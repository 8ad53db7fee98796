"""The next token of each row by its own sampling settings and its own random stream."""

# Shapes: B rows, V vocabulary.

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mswift.errors import CheckpointError
from mswift.infer.request import Sampling


class RowSampler(LogitsProcessor):
    """Makes the argmax of the scores a draw: log p - log e with e ~ Exp(1) is largest at token i with probability p_i.

    (The exponential race, also known as the Gumbel-max trick.) Each row draws from its own generator on the CPU, so
    that an answer depends on its seed and not on the batch, the order of the requests or the device. Greedy rows pass.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._rows = [_Row(sampling) if sampling.temperature > 0 else None for sampling in samplings]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] float32 whose argmax is the token to take. CheckpointError where they are no numbers."""
        if bool(scores.isnan().any()):
            raise CheckpointError(
                "the model's logits are nan: its weights hold nan or inf, or it overflows in this dtype; try "
                "--torch_dtype float32, or give another --model"
            )
        for index, row in enumerate(self._rows):
            if row is not None:
                scores[index] = row.race(input_ids[index : index + 1], scores[index : index + 1])[0]
        return scores


class _Row:
    def __init__(self, sampling: Sampling) -> None:
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p=sampling.top_p))

    def race(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Warped log-probabilities [1, V] minus the log of exponential noise."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty(scores.shape[-1]).exponential_(generator=self._generator)
        return scores.log_softmax(-1) - noise.clamp_min(torch.finfo(torch.float32).tiny).log().to(scores.device)
