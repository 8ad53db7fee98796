"""How the layers of a model are cut into pipeline stages, and stages into chunks. No torch.

A microbatch visits the chunks in order; chunk c lies on stage c % PP (interleaved, VPP chunks a stage). The embedding
belongs to the first chunk, the final norm and the logits to the last. A cut is the number of layers of each chunk.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mswift.errors import LayoutError

PP = "--pipeline_model_parallel_size"
VPP = "--virtual_pipeline_model_parallel_size"
LAYERS_PER_CHUNK = "--num_layers_per_virtual_pipeline_stage"
FIRST = "--decoder_first_pipeline_num_layers"
LAST = "--decoder_last_pipeline_num_layers"
LAYOUT = "--pipeline_model_parallel_layout"

_GROUP = re.compile(r"\(([^)]+)\)\*(\d+)")
_LETTER = re.compile(r"(.)\*(\d+)")
_LONGEST_LAYOUT = 100_000


@dataclass(frozen=True)
class Cut:
    """What the flags say of the cut; names as in `mswift.config.train.TrainConfig`."""

    pp: int
    vpp: int | None = None
    layers_per_chunk: int | None = None
    first: int | None = None
    last: int | None = None
    layout: str | None = None

    @property
    def given(self) -> Mapping[str, int | str]:
        """Flag -> value of those that are given."""
        flags = {VPP: self.vpp, LAYERS_PER_CHUNK: self.layers_per_chunk, FIRST: self.first, LAST: self.last}
        return {flag: value for flag, value in (flags | {LAYOUT: self.layout}).items() if value is not None}


def cut_layers(num_layers: int, cut: Cut) -> tuple[int, ...]:
    """Layers of every chunk in the order in which they compute, PP x VPP of them. LayoutError for a cut that fails."""
    for flag, value in cut.given.items():
        if isinstance(value, int) and value < 1:
            raise LayoutError(f"{flag} {value} must be at least 1: use {flag} 1 or leave it out")
        if cut.pp == 1 and value != 1:
            raise LayoutError(f"{flag} {value} cuts pipeline stages, but {PP} is 1: leave it out, or use {PP} 2")
    if cut.layout is not None:
        return _from_layout(num_layers, cut, cut.layout)
    if cut.layers_per_chunk is not None:
        return _from_depth(num_layers, cut, cut.layers_per_chunk)
    if cut.first is None and cut.last is None:
        check_stages(num_layers, cut.pp, cut.vpp or 1)
        chunks = cut.pp * (cut.vpp or 1)
        return (num_layers // chunks,) * chunks
    return _uneven(num_layers, cut)


def check_stages(num_layers: int, pp: int, vpp: int = 1) -> None:
    """LayoutError unless `num_layers` can be cut in `pp` stages of `vpp` equal chunks."""
    if num_layers % (pp * vpp) == 0:
        return
    if vpp > 1 and num_layers % pp == 0:
        raise LayoutError(
            f"{VPP} {vpp} does not divide the {num_layers // pp} layers of each of the {pp} stages: "
            f"{VPP} can be {_divisors(num_layers // pp)}"
        )
    if pp > num_layers:
        why, unequal = "has more stages than", ""
    else:
        why, unequal = "does not divide", f", or cut unevenly with {FIRST}, {LAST} or {LAYOUT}; equal stages"
    raise LayoutError(
        f"{PP} {pp} {why} the {num_layers} layers of the model{unequal}: {PP} can be {_divisors(num_layers)}"
    )


def describe_cut(chunks: tuple[int, ...], pp: int) -> list[str]:
    """What each stage holds, by stage: "embedding, layers 0-1 | layers 4-5", chunks apart by |."""
    stages: list[list[str]] = [[] for _ in range(pp)]
    start = 0
    for number, depth in enumerate(chunks):
        last_layer = start + depth - 1
        parts = ["embedding"] if number == 0 else []
        if depth:
            parts.append(f"layer {start}" if depth == 1 else f"layers {start}-{last_layer}")
        parts += ["final norm and logits"] if number == len(chunks) - 1 else []
        stages[number % pp].append(", ".join(parts))
        start += depth
    return [" | ".join(stage) for stage in stages]


def _from_depth(num_layers: int, cut: Cut, depth: int) -> tuple[int, ...]:
    """Equal chunks of so many layers."""
    for flag in (VPP, FIRST, LAST):
        if flag in cut.given:
            raise LayoutError(
                f"{LAYERS_PER_CHUNK} {depth} and {flag} {cut.given[flag]} do not go together: leave {LAYERS_PER_CHUNK} "
                f"out and say how many chunks with {VPP}"
            )
    check_stages(num_layers, cut.pp)
    on_stage = num_layers // cut.pp
    if on_stage % depth:
        raise LayoutError(
            f"{LAYERS_PER_CHUNK} {depth} does not divide the {on_stage} layers of each of the {cut.pp} stages: it can "
            f"be {_divisors(on_stage)}"
        )
    return (depth,) * (num_layers // depth)


def _uneven(num_layers: int, cut: Cut) -> tuple[int, ...]:
    """Own numbers of layers on the first and the last stage, the others equal; every stage cut in VPP equal chunks."""
    vpp = cut.vpp or 1
    own = {stage: n for stage, n in ((0, cut.first), (cut.pp - 1, cut.last)) if n is not None}
    spelled = " and ".join(f"{flag} {n}" for flag, n in ((FIRST, cut.first), (LAST, cut.last)) if n is not None)
    left, others = num_layers - sum(own.values()), cut.pp - len(own)
    if left < others or (left if not others else left % others):
        share = f"{others} other stages cannot share equally" if others else "no other stage can take"
        raise LayoutError(
            f"{spelled} of {PP} {cut.pp} leave {left} of the model's {num_layers} layers, which {share}: use "
            f"numbers that leave {'a multiple of ' + str(others) if others else 'none'}"
        )
    stages = [own.get(stage, left // others if others else 0) for stage in range(cut.pp)]
    for depth in stages:
        if depth % vpp:
            raise LayoutError(
                f"{VPP} {vpp} does not divide the stages of {' '.join(map(str, stages))} layers that {spelled} "
                f"make: use {VPP} 1, or numbers of layers that it divides"
            )
    return tuple(depth // vpp for depth in stages) * vpp


def _from_layout(num_layers: int, cut: Cut, layout: str) -> tuple[int, ...]:
    """megatron-core's notation: "Et*3|(tt|)*2,tL" is [E t t t] [t t] [t t] [t L]."""
    for flag in (LAYERS_PER_CHUNK, FIRST, LAST):
        if flag in cut.given:
            raise LayoutError(f"{LAYOUT} {layout} says where every layer lies: leave out {flag} {cut.given[flag]}")
    chunks = _unroll(layout).split("|")
    wrong = sorted(set("".join(chunks)) - set("EtmL"))
    if wrong:
        raise LayoutError(
            f"{LAYOUT} {layout}: {wrong[0]!r} is no part of a model; it is made of E (embedding), t (decoder layer), "
            "L (loss), | between stages and (...)*N"
        )
    if "m" in "".join(chunks):
        raise LayoutError(
            f"{LAYOUT} {layout}: m is a multi-token-prediction layer, which training does not compute yet: leave it out"
        )
    whole = "".join(chunks)
    if not (chunks[0].startswith("E") and chunks[-1].endswith("L")) or whole.count("E") + whole.count("L") != 2:
        raise LayoutError(f"{LAYOUT} {layout}: it begins with the one E and ends with the one L, as in Ett|ttL")
    if len(chunks) % cut.pp:
        raise LayoutError(
            f"{LAYOUT} {layout} has {len(chunks)} chunks, which {PP} {cut.pp} does not divide: give a multiple of "
            f"{cut.pp}, or use {PP} {len(chunks)}"
        )
    if cut.vpp not in (None, len(chunks) // cut.pp):
        raise LayoutError(
            f"{LAYOUT} {layout} has {len(chunks)} chunks, {VPP} {cut.vpp} times {PP} {cut.pp} is "
            f"{cut.vpp * cut.pp}: leave {VPP} out"
        )
    if whole.count("t") != num_layers:
        raise LayoutError(f"{LAYOUT} {layout} has {whole.count('t')} decoder layers (t), the model {num_layers}")
    if "" in chunks:
        raise LayoutError(f"{LAYOUT} {layout}: chunk {chunks.index('')} is empty: give it a t, or a smaller {PP}")
    return tuple(chunk.count("t") for chunk in chunks)


def _unroll(layout: str) -> str:
    """Write repetitions out, parentheses first, as megatron-core does; commas and spaces are decoration."""
    text = layout.replace(",", "").replace(" ", "")
    for pattern in (_GROUP, _LETTER):
        size = len(text) + sum(len(match[1]) * int(match[2]) for match in pattern.finditer(text))
        if size > _LONGEST_LAYOUT:
            raise LayoutError(f"{LAYOUT} {layout} is {size} letters long; {_LONGEST_LAYOUT} are read: check its *N")
        text = pattern.sub(lambda match: match[1] * int(match[2]), text)
    return text


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
