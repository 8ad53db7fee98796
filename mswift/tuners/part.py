"""Full tuning of a part of the model: which parameters stay as they are, by name and by share. No torch."""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches

from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """ratio: the first parameters in the model's order are frozen, as many as have that share of its elements.

    freeze, trainable: beginnings of names, *_regex: expressions that are searched in them; what is named trainable is
    trained whatever else is said.
    """

    ratio: float = 0.0
    freeze: tuple[str, ...] = ()
    freeze_regex: str | None = None
    trainable: tuple[str, ...] = ()
    trainable_regex: str | None = None

    def frozen(self, sizes: Mapping[str, int]) -> set[str]:
        """Names out of `sizes` (parameter -> elements, in the model's order).

        ConfigError for a name or an expression that means no parameter, and where nothing is left to train.
        """
        names = list(sizes)
        found: set[str] = set()
        left = self.ratio * sum(sizes.values())
        for name, size in sizes.items():
            left -= size
            if left < 0:
                break
            found.add(name)
        found |= _beginning(names, self.freeze, "freeze_parameters")
        found |= _matching(names, self.freeze_regex, "freeze_parameters_regex")
        found -= _beginning(names, self.trainable, "trainable_parameters")
        found -= _matching(names, self.trainable_regex, "trainable_parameters_regex")
        if len(found) == len(names):
            raise ConfigError(
                f"{self._freezing()}: every parameter is frozen, nothing is left to train: name some with "
                "--trainable_parameters (or --trainable_parameters_regex)"
            )
        return found

    def _freezing(self) -> str:
        """The flags that freeze."""
        flags = {
            "freeze_parameters_ratio": str(self.ratio or ""),
            "freeze_parameters": " ".join(self.freeze),
            "freeze_parameters_regex": self.freeze_regex or "",
        }
        return ", ".join(f"--{name} {value}" for name, value in flags.items() if value)


def _beginning(names: Sequence[str], starts: Sequence[str], flag: str) -> set[str]:
    found: set[str] = set()
    for start in starts:
        mine = {name for name in names if name.startswith(start)}
        if not mine:
            near = _near(start, names)
            raise ConfigError(
                f"--{flag} {start}: no parameter's name begins so" + (f"; near: {', '.join(near)}" if near else "")
            )
        found |= mine
    return found


def _near(start: str, names: Sequence[str]) -> list[str]:
    """Beginnings of names that `start` may mean: those it ends, as layers.0 does model.layers.0, or like it."""
    ended = {name[: at + 1 + len(start)] for name in names if (at := name.find(f".{start}")) >= 0}
    if ended:
        return sorted(ended)[:3]
    dot = "." * start.endswith(".")
    parts = {name[:at] + dot for name in names for at, letter in enumerate(name) if letter == "."}
    return get_close_matches(start, sorted({*names, *parts}), 3)


def _matching(names: Sequence[str], expression: str | None, flag: str) -> set[str]:
    if expression is None:
        return set()
    try:
        found = {name for name in names if re.search(expression, name)}
    except re.error as error:
        raise ConfigError(f"--{flag} {expression}: no regular expression: {error}") from None
    if not found:
        raise ConfigError(f"--{flag} {expression}: matches no parameter; the first one is {names[0]}")
    return found


def joined(table: ModelTable) -> list[tuple[str, ...]]:
    """HF names of which Megatron makes one parameter, tuple by tuple (q, k and v; gate and up)."""
    of_slice = {key: name for name, keys in table.slices.items() for key in keys}
    found: dict[tuple[str, int | None], dict[str, None]] = {}
    for name, pieces in table.hf_pieces.items():
        for piece in pieces:
            key = piece.names[1]
            layer = piece.starts[1][0] if table.megatron[key].stacked else None
            found.setdefault((of_slice.get(key, key), layer), {})[name] = None
    return [tuple(names) for names in found.values()]


def refuse_torn(frozen: Set[str], together: Sequence[tuple[str, ...]]) -> None:
    """ConfigError where of names that are `together` in one parameter some are frozen and some are trained."""
    for names in together:
        stay = [name for name in names if name in frozen]
        learn = [name for name in names if name not in frozen]
        if stay and learn:
            raise ConfigError(
                f"--backend megatron keeps {', '.join(names)} in one tensor, and {stay[0]} would be frozen while "
                f"{learn[0]} is trained: add --freeze_parameters {' '.join(learn)} (or --trainable_parameters "
                f"{' '.join(stay)}), or use --backend fsdp"
            )
