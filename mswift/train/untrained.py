"""Before LoRA: does the chat template use tokens whose embedding rows were never trained?"""

import sys

import numpy as np
from numpy.typing import NDArray

from mswift.config.train import SftConfig, TrainConfig
from mswift.converters.layout import Region
from mswift.converters.reader import WeightReader
from mswift.data.tokenizer import Tokenizer, untrained_token_warning
from mswift.train.trained import saved_modules
from mswift.tuners.stored import STORED, as_float32

_KEY = "embedding.word_embeddings.weight"
_BLOCK_ROWS = 4096


def warn_of_untrained_tokens(config: TrainConfig, reader: WeightReader, tokenizer: Tokenizer) -> None:
    """Print the tokens and the remedy on stderr; nothing where the embedding is trained, or for `pt`."""
    if not config.trains_adapter or saved_modules(config) or not isinstance(config, SftConfig):
        return
    warning = untrained_token_warning(embedding_row_norms(reader), tokenizer)
    if warning:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def embedding_row_norms(reader: WeightReader) -> NDArray[np.float32]:
    """L2 norm of every row of the input embedding, float32 [vocab]; read in blocks of rows."""
    vocab, hidden = reader.table.megatron[_KEY].shape
    norms = np.empty(vocab, dtype=np.float32)
    for start in range(0, vocab, _BLOCK_ROWS):
        rows = min(_BLOCK_ROWS, vocab - start)
        block = np.empty((rows, hidden), dtype=STORED[reader.dtype])
        reader.read(_KEY, Region((start, 0), (rows, hidden)), memoryview(block.view(np.uint8).reshape(-1)))
        norms[start : start + rows] = np.linalg.norm(as_float32(block), axis=1)
    return norms
