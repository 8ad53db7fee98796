"""What became of the rows: counted per file, said in one line each; bad rows go to rejected.jsonl one by one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mswift.errors import DataError

_NAMED_ROWS = 10
_REASONS = 3
_CONTENT_CHARACTERS = 2000


@dataclass
class Count:
    """How many rows, and the first of them."""

    rows: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        """Count one row, by its number."""
        self.rows += 1
        if len(self.first) < _NAMED_ROWS:
            self.first.append(row)

    def merge(self, other: "Count") -> None:
        """Add later rows."""
        self.rows += other.rows
        self.first = [*self.first, *other.first][:_NAMED_ROWS]

    def named(self) -> str:
        """ "row 3, 7, ..." """
        return f"row {', '.join(map(str, self.first))}{', ...' if self.rows > len(self.first) else ''}"


@dataclass
class FileReport:
    """What became of the rows of one file."""

    name: str
    limit: int | None
    """Rows asked for of its source."""
    drawn_from: int | None = None
    """Rows of the file, where they were counted because only some are used."""
    rows: int = 0
    samples: int = 0
    ignored_fields: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    """What was done to samples that are too long -> how many."""
    left_out: dict[str, Count] = field(default_factory=dict)
    """Reason -> rows that are not trained on, for what the options say."""
    rejected: Count = field(default_factory=Count)
    """Rows that could not be read or used."""
    reasons: list[str] = field(default_factory=list)
    """Of the first rejected rows."""

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> "FileReport":
        """Inverse of `dataclasses.asdict`."""
        left_out = {reason: Count(**count) for reason, count in values["left_out"].items()}
        return cls(**{**values, "left_out": left_out, "rejected": Count(**values["rejected"])})

    def merge(self, other: "FileReport") -> None:
        """Add what became of later rows of the same file."""
        self.rows += other.rows
        self.samples += other.samples
        for mine, theirs in ((self.ignored_fields, other.ignored_fields), (self.cut, other.cut)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        for reason, rows in other.left_out.items():
            self.left_out.setdefault(reason, Count()).merge(rows)
        self.rejected.merge(other.rejected)
        self.reasons = [*self.reasons, *other.reasons][:_REASONS]

    def leave_out(self, reason: str, row: int) -> None:
        """Count a row that is not trained on."""
        self.left_out.setdefault(reason, Count()).add(row)

    def line(self) -> str:
        """The report in one line."""
        parts = [f"{self.name}: {self.rows:,} rows"]
        if self.drawn_from is not None:
            parts[0] += f" of {self.drawn_from:,}"
        elif self.limit is not None and self.rows < self.limit:
            parts.append(f"{self.limit:,} were asked for")
        if self.samples:
            parts.append(f"{self.samples:,} samples")
        parts += [f"{count:,} of them {what}" for what, count in self.cut.items()]
        for reason, count in self.left_out.items():
            parts.append(f"{count.rows:,} left out ({reason}: {count.named()})")
        if self.rejected.rows:
            parts.append(f"{self.rejected.rows:,} rejected ({self.rejected.named()}), the first: {self.reasons[0]}")
        if self.ignored_fields:
            fields = ", ".join(f"{name} ({count:,})" for name, count in sorted(self.ignored_fields.items()))
            parts.append(f"fields not used: {fields}")
        return "; ".join(parts)


def rejection(report: FileReport, number: int, row: Mapping[str, Any] | None, error: DataError) -> bytes:
    """Count a rejected row; its line of rejected.jsonl."""
    report.rejected.add(number)
    if len(report.reasons) < _REASONS:
        report.reasons.append(str(error))
    content = None if row is None else json.dumps(row, ensure_ascii=False, default=repr)[:_CONTENT_CHARACTERS]
    value = {"file": report.name, "row": number, "reason": str(error), "content": content}
    return json.dumps(value).encode() + b"\n"
