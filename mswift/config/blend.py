"""`--data_path`: prefixes, or weights and prefixes by turns, as megatron-core reads the flag."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mswift.errors import ConfigError


@dataclass(frozen=True)
class Blend:
    """Prefixes of .bin and .idx files, and their shares of an epoch (none: every sample once)."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] = ()


def parse_blend(items: Sequence[str]) -> Blend:
    """`a b`, or `0.3 a 0.7 b`. ConfigError where some prefixes have a weight and others none, or a weight is none."""
    if not items or _number(items[0]) is None:
        for item in items:
            if _number(item) is not None:
                raise ConfigError(
                    f"--data_path {' '.join(items)}: {item} is a weight, {items[0]} has none; give every prefix one, "
                    f"or none (a prefix of that name: ./{item})"
                )
        return Blend(tuple(items))
    weights = []
    for item in items[::2]:
        weight = _number(item)
        if weight is None:
            raise ConfigError(
                f"--data_path {' '.join(items)}: {item} stands where a weight is due; give every prefix a weight, "
                "as in --data_path 0.3 a 0.7 b, or none (a prefix that is a number: ./2024)"
            )
        if not 0 < weight < math.inf:
            raise ConfigError(f"--data_path {item}: a weight must be above 0 and finite; leave its prefix out")
        weights.append(weight)
    if len(items) % 2:
        raise ConfigError(f"--data_path {' '.join(items)}: the weight {items[-1]} has no prefix after it")
    return Blend(tuple(items[1::2]), tuple(weights))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
