"""JSON objects in which each name stands once: readers differ in which of two values they take."""

from collections import Counter
from collections.abc import Sequence
from typing import Any


def named_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`: the object; ValueError naming the first name that stands in it twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{next(name for name, count in counts.items() if count > 1)!r} is named twice")
    return result
