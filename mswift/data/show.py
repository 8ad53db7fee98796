"""`mswift data show`: rows as training sees them, decoded, with the learned tokens and their loss weights marked."""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from mswift.agent.formats import FORMATS
from mswift.config.data import DataConfig
from mswift.data.batch import Sample
from mswift.data.chat_template import use_chat_template
from mswift.data.documents import encode_piece, is_long, long_pieces
from mswift.data.encoding import renamed_row
from mswift.data.formats import Record, required_row
from mswift.data.loss_scale import parse_loss_scale
from mswift.data.mixture import read_mixture
from mswift.data.report import FileReport
from mswift.data.rows import to_conversation, to_document
from mswift.data.selection import Selection, selected_parts
from mswift.data.sources import parse_source
from mswift.data.spans import tokenize
from mswift.data.template import ChatTemplate
from mswift.data.text_files import LongText
from mswift.data.tokenizer import Tokenizer, encode, end_token_id, load_tokenizer
from mswift.data.truncation import fit
from mswift.errors import ConfigError, DataError
from mswift.refusals.data import parse_columns

_GREEN, _YELLOW, _PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[0m"


def main(config: DataConfig, model: Path) -> int:
    """Print the first rows of each item of --dataset; returns the exit status."""
    if config.num_rows < 1:
        raise ConfigError(f"--num_rows {config.num_rows}: at least 1; --num_rows 3")
    tokenizer = load_tokenizer(model)
    use_chat_template(tokenizer, config.chat_template)
    sources = [parse_source(spec) for spec in read_mixture(config.dataset).specs]
    columns = parse_columns(config.columns)
    color = config.color == "always" or (config.color == "auto" and sys.stdout.isatty())
    selection = Selection(config.dataset_sampling, config.seed)
    for index, source in enumerate(sources):
        left = config.num_rows
        for _, _, records in selected_parts(source, index, selection):
            for record in islice(records, left):
                left -= 1
                _show(config, tokenizer, columns, record, color)
            if not left:
                break
    return 0


def _show(
    config: DataConfig, tokenizer: Tokenizer, columns: Sequence[tuple[str, str]], record: Record, color: bool
) -> None:
    report = FileReport(record.where, None)
    try:
        samples = list(_samples(config, tokenizer, columns, record, report))
    except DataError as error:
        if config.strict:
            raise
        print(f"-- {record.where}: rejected: {error}\n")
        return
    for reason in report.left_out:
        print(f"-- {record.where}: left out ({reason})\n")
    for number, sample in enumerate(samples, start=1):
        piece = f", sample {number} of {len(samples)}" if len(samples) > 1 else ""
        learned = int(np.count_nonzero(sample.loss_weights[1:]))
        print(f"-- {record.where}{piece}: {len(sample.tokens):,} tokens, {learned:,} of them learned")
        print(marked_text(tokenizer, sample, color) + "\n")
    if report.ignored_fields:
        print(f"   fields not used: {', '.join(sorted(report.ignored_fields))}\n")


def _samples(
    config: DataConfig,
    tokenizer: Tokenizer,
    columns: Sequence[tuple[str, str]],
    record: Record,
    report: FileReport,
) -> Iterator[Sample]:
    where = record.where
    row = renamed_row(required_row(record, streamed=config.kind == "pt"), columns, where)
    if config.kind == "pt":
        ids = _first_tokens(tokenizer, to_document(row, where), where)
        tokens = np.array([*ids, end_token_id(tokenizer)], dtype=np.int32)
        yield Sample(tokens[: config.max_length], np.ones(len(tokens[: config.max_length]), dtype=np.float32))
        return
    agent = FORMATS[config.agent_template] if config.agent_template else None
    conversation = to_conversation(row, where, config.system, agent=agent)
    report.ignored_fields = dict.fromkeys(conversation.ignored, 1)
    renderings = ChatTemplate(tokenizer, parse_loss_scale(config.loss_scale)).render(conversation, where)
    for sample in tokenize(tokenizer, renderings, [where] * len(renderings)):
        yield from fit(sample, config.max_length, config.truncation_strategy, report, record.number, where)


def _first_tokens(tokenizer: Tokenizer, text: str | LongText, where: str) -> list[int]:
    """All tokens of a document, or of a long one those of its first piece."""
    if is_long(text):
        return next((encode_piece(tokenizer, piece) for piece in long_pieces(tokenizer, text, where)), [])
    return encode(tokenizer, [str(text)])[0]


def marked_text(tokenizer: Tokenizer, sample: Sample, color: bool) -> str:
    """The text of a sample; learned tokens are green, or between ⟦ and ⟧. The first token is never a target.

    Where their loss weight is not 1 it is written before them, and they are yellow.
    """
    weights = sample.loss_weights.copy()
    weights[0] = 0.0
    pieces = []
    for weight, run in groupby(zip(weights.tolist(), sample.tokens.tolist(), strict=True), key=lambda pair: pair[0]):
        text = str(tokenizer.decode([token for _, token in run]))
        number = "" if weight == 1.0 else f"{weight:g}× "
        before, after = (_YELLOW if number else _GREEN, _PLAIN) if color else ("⟦", "⟧")
        pieces.append(f"{before}{number}{text}{after}" if weight else text)
    return "".join(pieces)
