"""Renderings -> samples: the weights of characters become those of tokens, and the token boundaries are proved."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from mswift.data.batch import Sample
from mswift.data.template import Rendering
from mswift.data.tokenizer import Tokenizer, encode, token_starts
from mswift.errors import DataError


def tokenize(tokenizer: Tokenizer, renderings: Sequence[Rendering], places: Sequence[str]) -> list[Sample]:
    """One sample per rendering; `places` (file and row) name them in errors.

    The tokens are those of the whole text. It is cut at both ends of every span, and the pieces encoded one by one must
    give the same tokens: then the tokens up to a span are those of the prompt at inference. Weights that change inside
    a span move no boundary: a token has the weight of its first character.
    """
    cuts = [_cuts(rendering) for rendering in renderings]
    texts = [rendering.text for rendering in renderings]
    pieces = [
        text[start:end]
        for text, ends in zip(texts, cuts, strict=True)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    encoded = iter(encode(tokenizer, texts + pieces))
    whole = [next(encoded) for _ in texts]
    return [
        _sample(tokenizer, rendering, ids, [next(encoded) for _ in ends], where)
        for rendering, ids, ends, where in zip(renderings, whole, cuts, places, strict=True)
    ]


def _cuts(rendering: Rendering) -> list[int]:
    """Characters at which pieces end: prompt, learned, prompt, learned, ..., rest (which may be empty)."""
    return [*(edge for span in rendering.spans for edge in (span.start, span.end)), len(rendering.text)]


def _sample(
    tokenizer: Tokenizer, rendering: Rendering, whole: list[int], pieces: list[list[int]], where: str
) -> Sample:
    joined = [number for piece in pieces for number in piece]
    edges = list(accumulate(len(piece) for piece in pieces))
    if joined != whole:
        prefixes = encode(tokenizer, [rendering.text[:cut] for cut in _cuts(rendering)])
        if all(whole[: len(prefix)] == prefix for prefix in prefixes):
            edges = [len(prefix) for prefix in prefixes]  # a tokenizer that marks the start of a text
        elif tokenizer.decode(joined) == tokenizer.decode(whole):
            whole = joined  # an answer that starts with a line break would merge with the prompt's own
        else:
            raise DataError(
                f"{where}: the tokenizer joins the end of the prompt with the beginning of the answer in one token, so "
                "no token boundary separates them; remove white space from the beginning of the answer"
            )
    weights = np.full(len(whole), rendering.outside, dtype=np.float32)
    first_characters: list[int] | None = None
    for span, start, end in zip(rendering.spans, edges[0:-1:2], edges[1::2], strict=True):
        if len(span.pieces) > 1 and first_characters is None:
            first_characters = _first_characters(tokenizer, rendering, whole, where)
        weights[start:end] = span.pieces[0][1]
        for place, weight in span.pieces[1:]:
            assert first_characters is not None
            weights[bisect_left(first_characters, span.start + place, start, end) : end] = weight
    return Sample(np.array(whole, dtype=np.int32), weights, rendering.channel)


def _first_characters(tokenizer: Tokenizer, rendering: Rendering, tokens: list[int], where: str) -> list[int]:
    """Of each token the place in the text where it begins."""
    text = rendering.text
    found = token_starts(tokenizer, text)
    if [token for token, _ in found] != tokens:  # they are those of the pieces
        edges = [0, *_cuts(rendering)]
        found = [
            (token, start + place)
            for start, end in pairwise(edges)
            for token, place in token_starts(tokenizer, text[start:end])
        ]
    if [token for token, _ in found] != tokens:
        raise DataError(f"{where}: the tokenizer does not say where in the text its tokens begin")
    return [place for _, place in found]
