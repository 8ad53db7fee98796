"""The index algebra against numpy: maps, inverses, restriction to regions, bytes, coverage."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.converters.layout import Chunks, Dim, Piece, Region, flatten, restrict, tiling_fault
from mswift.converters.rule import Rule
from mswift.converters.rules import gate_up, qkv, same

SIZES = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 3),
        "groups": st.integers(1, 4),
        "heads_per_group": st.integers(1, 3),
        "head_dim": st.integers(1, 4),
        "hidden": st.integers(1, 5),
        "ffn": st.integers(1, 6),
        "vocab": st.integers(1, 7),
    }
).map(lambda sizes: sizes | {"one": 1, "heads": sizes["groups"] * sizes["heads_per_group"]})
STACKED = "decoder.layers.x"
RULES = {
    "same": same("a", "hf", ("vocab", "hidden")),
    "same stacked": same(STACKED, "hf.{l}", ("hidden",)),
    "same matrix": same(STACKED, "hf.{l}", ("hidden", "heads*head_dim")),
    "qkv": qkv(STACKED, "q.{l}", "k.{l}", "v.{l}", width=("hidden",)),
    "qkv bias": qkv(STACKED, "q.{l}", "k.{l}", "v.{l}", width=()),
    "gate_up": gate_up(STACKED, "gate.{l}", "up.{l}", width=("hidden",)),
    "gate_up bias": gate_up(STACKED, "gate.{l}", "up.{l}", width=()),
}


def positions(piece: Piece, side: int) -> list[tuple[int, ...]]:
    """Every element of a piece on one side, the slow way, in the order of its dims."""
    index = np.indices([d.size for d in piece.dims]).reshape(len(piece.dims), piece.num_elements)
    out = np.array(piece.starts[side], dtype=int)[:, None].repeat(piece.num_elements, axis=1)
    for dim, along in zip(piece.dims, index, strict=True):
        out[dim.axis[side]] += along * dim.step[side]
    return [tuple(map(int, column)) for column in out.T]


def pieces_of(rule: Rule, sizes: dict[str, int]) -> list[Piece]:
    one = range(1)
    if not rule.in_layer:
        return rule.pieces(sizes, rule.megatron, None, (), one)
    return [p for layer in range(sizes["layers"]) for p in rule.pieces(sizes, rule.megatron, layer, (layer,), one)]


def megatron_shape(rule: Rule, sizes: dict[str, int]) -> tuple[int, ...]:
    return (*((sizes["layers"],) if rule.in_layer else ()), *rule.shape(sizes))


def apply(pieces: list[Piece], source: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Side 0 arrays -> side 1 arrays; what no piece writes stays -1."""
    out = {name: np.full(shape, -1) for name, shape in shapes.items()}
    for piece in pieces:
        for a, b in zip(positions(piece, 0), positions(piece, 1), strict=True):
            out[piece.names[1]][b] = source[piece.names[0]][a]
    return out


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25)
@given(sizes=SIZES)
def test_every_rule_and_its_inverse_are_a_round_trip(name: str, sizes: dict[str, int]) -> None:
    rule, count = RULES[name], 0
    hf: dict[str, Any] = {}
    for layer in range(sizes["layers"]) if rule.in_layer else [None]:
        for part in rule.parts:
            shape = rule.hf_shape(part, sizes)
            hf[part.hf.format(l=layer)] = count + np.arange(np.prod(shape)).reshape(shape)
            count += int(np.prod(shape))
    pieces = pieces_of(rule, sizes)
    there = apply(pieces, hf, {rule.megatron: megatron_shape(rule, sizes)})
    assert sorted(there[rule.megatron].ravel()) == list(range(count))
    back = apply([p.inverse() for p in pieces], there, {n: a.shape for n, a in hf.items()})
    assert all((back[n] == hf[n]).all() for n in hf)


@settings(max_examples=40)
@given(sizes=SIZES)
def test_rules_mean_what_megatron_means(sizes: dict[str, int]) -> None:
    """qkv: per group its query heads, key, value; gate_up: the halves one after the other."""
    g, r, d, h, f = (sizes[n] for n in ("groups", "heads_per_group", "head_dim", "hidden", "ffn"))
    one = sizes | {"layers": 1}
    q, k, v = (np.arange(g * n * d * h).reshape(g * n * d, h) + c for n, c in ((r, 0), (1, 10**6), (1, 2 * 10**6)))
    got = apply(pieces_of(RULES["qkv"], one), {"q.0": q, "k.0": k, "v.0": v}, {STACKED: (1, g * (r + 2) * d, h)})
    grouped = [x.reshape(g, -1, d, h) for x in (q, k, v)]
    assert (got[STACKED][0] == np.concatenate(grouped, axis=1).reshape(-1, h)).all()
    gate, up = np.arange(f * h).reshape(f, h), np.arange(f * h).reshape(f, h) + 10**6
    got = apply(pieces_of(RULES["gate_up"], one), {"gate.0": gate, "up.0": up}, {STACKED: (1, 2 * f, h)})
    assert (got[STACKED][0] == np.concatenate([gate, up])).all()


def test_a_transposition_is_a_piece() -> None:
    piece = Piece(("a", "b"), ((0, 0), (0, 0)), (Dim(3, (0, 1), (1, 1)), Dim(5, (1, 0), (1, 1))))
    a = np.arange(15).reshape(3, 5)
    assert (apply([piece], {"a": a}, {"b": (5, 3)})["b"] == a.T).all()


def regions(draw: Any, shape: tuple[int, ...]) -> Region:
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Region(offsets, tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25)
@given(sizes=SIZES, data=st.data())
def test_restriction_keeps_exactly_the_elements_inside(
    name: str, side: int, sizes: dict[str, int], data: st.DataObject
) -> None:
    rule = RULES[name]
    whole = data.draw(st.sampled_from(pieces_of(rule, sizes)))
    shape = megatron_shape(rule, sizes) if side else whole.hull(0).sizes
    region = regions(data.draw, shape)
    inside = {
        (a, b)
        for a, b in zip(positions(whole, 0), positions(whole, 1), strict=True)
        if all(o <= x < o + s for x, o, s in zip((a, b)[side], region.offsets, region.sizes, strict=True))
    }
    got = [pair for p in restrict(whole, region, side) for pair in zip(positions(p, 0), positions(p, 1), strict=True)]
    assert len(got) == len(set(got))
    assert set(got) == inside


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25)
@given(sizes=SIZES, item_bytes=st.sampled_from([1, 2, 4]))
def test_flat_byte_maps_are_the_same_map(name: str, sizes: dict[str, int], item_bytes: int) -> None:
    rule = RULES[name]
    for piece in pieces_of(rule, sizes)[:2]:
        shapes = (piece.hull(0).sizes, megatron_shape(rule, sizes))
        flat = flatten(piece, shapes, item_bytes)
        expected = set()
        for a, b in zip(positions(piece, 0), positions(piece, 1), strict=True):
            first = [int(np.ravel_multi_index(i, s)) * item_bytes for i, s in zip((a, b), shapes, strict=True)]
            expected |= {(first[0] + byte, first[1] + byte) for byte in range(item_bytes)}
        pairs = zip(positions(flat, 0), positions(flat, 1), strict=True)
        assert {(a, b) for (a,), (b,) in pairs} == expected
        assert flat.num_elements == len(expected)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25)
@given(sizes=SIZES)
def test_boxes_cover_what_the_piece_covers(name: str, side: int, sizes: dict[str, int]) -> None:
    for piece in pieces_of(RULES[name], sizes):
        cells = [
            tuple(o + i for o, i in zip(box.offsets, index, strict=True))
            for box in piece.boxes(side)
            for index in np.ndindex(box.sizes)
        ]
        assert sorted(cells) == sorted(positions(piece, side))


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), data=st.data())
def test_tiling_agrees_with_counting(shape: list[int], data: st.DataObject) -> None:
    """Random cuts tile; a moved, doubled or missing box does not, and counting says the same."""
    boxes = [Region.full(shape)]
    for _ in range(data.draw(st.integers(0, 4))):
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        axis = data.draw(st.integers(0, len(shape) - 1))
        at = data.draw(st.integers(0, box.sizes[axis]))
        for offset, size in ((0, at), (at, box.sizes[axis] - at)):
            if size:
                offsets, sizes = list(box.offsets), list(box.sizes)
                offsets[axis] += offset
                sizes[axis] = size
                boxes.append(Region(tuple(offsets), tuple(sizes)))
    assert tiling_fault(boxes, shape) is None
    spoiled = list(boxes)
    victim = spoiled.pop(data.draw(st.integers(0, len(boxes) - 1)))
    spoiled += data.draw(st.sampled_from([[], [victim, victim], [regions(data.draw, tuple(shape))]]))
    count = np.zeros(shape, int)
    for box in spoiled:
        count[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))] += 1
    assert (tiling_fault(spoiled, shape) is None) == bool((count == 1).all())


def test_a_fault_names_the_elements() -> None:
    halves = [Region((0, 0), (2, 4)), Region((3, 0), (1, 4))]
    assert tiling_fault(halves, (4, 4)) == "elements [2:3, 0:4] are covered 0 times, not once"
    doubled = [Region((0, 0), (4, 4)), Region((1, 2), (1, 1))]
    assert tiling_fault(doubled, (4, 4)) == "elements [1:2, 2:3] are covered 2 times, not once"
    assert "outside the shape [4, 4]" in str(tiling_fault([Region((0, 0), (5, 4))], (4, 4)))


@given(data=st.data())
def test_chunks_are_found_by_overlap(data: st.DataObject) -> None:
    shape = (6, 5)
    boxes = [regions(data.draw, shape) for _ in range(data.draw(st.integers(0, 8)))]
    region = regions(data.draw, shape)
    expected = {(b, b.intersect(region)) for b in boxes if b.intersect(region)}
    assert set(Chunks(boxes).overlapping(region)) == expected
