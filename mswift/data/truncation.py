"""Samples of more than max_length tokens: left out, cut, split, or an error, and always counted."""

from dataclasses import replace
from typing import Literal

from mswift.data.batch import Sample
from mswift.data.report import FileReport
from mswift.errors import DataError

Strategy = Literal["delete", "left", "right", "split", "raise"]


def fit(
    sample: Sample, max_length: int, strategy: Strategy, report: FileReport, number: int, where: str
) -> list[Sample]:
    """The samples of at most `max_length` tokens that `sample` becomes; none where it is left out.

    Pieces of a split overlap by one token, the context of the first target of the later one, so that every learned
    token stays a target exactly once. What has nothing left to learn is left out. DataError: strategy raise.
    """
    length = len(sample.tokens)
    if length <= max_length:
        return [sample]
    if strategy == "raise":
        raise DataError(
            f"{where} has {length} tokens, --max_length is {max_length}: --max_length {length} takes it, "
            "--truncation_strategy delete leaves it out, --truncation_strategy right cuts its end"
        )
    if strategy == "delete":
        report.leave_out(f"longer than --max_length {max_length}", number)
        return []
    starts = {"left": [length - max_length], "right": [0], "split": range(0, length - 1, max_length - 1)}[strategy]
    pieces = [_piece(sample, start, max_length) for start in starts]
    kept = [piece for piece in pieces if piece.loss_weights.any()]
    if not kept:
        ends = {"left": f"last {max_length}", "right": f"first {max_length}", "split": str(length)}
        report.leave_out(f"nothing to learn in the {ends[strategy]} tokens", number)
        return []
    what = {"left": "cut at the beginning", "right": "cut at the end", "split": "pieces of longer ones"}[strategy]
    report.cut[what] = report.cut.get(what, 0) + len(kept)
    return kept


def _piece(sample: Sample, start: int, length: int) -> Sample:
    """Tokens [start, start + length) of a sample; the first of them is no target."""
    weights = sample.loss_weights[start : start + length].copy()
    weights[0] = 0.0
    return replace(sample, tokens=sample.tokens[start : start + length], loss_weights=weights)
