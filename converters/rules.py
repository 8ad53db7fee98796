"""The vocabulary of the family tables: the kinds of rules, by name. `mswift.converters.rule` says what a rule is."""

from dataclasses import replace
from typing import Literal

from mswift.converters.rule import LAYERS, MTP_LAYERS, Cut, Drop, Part, Rule


def rows(unit: str, *, blocks: int = 1, uneven: bool = False) -> Cut:
    """Column-parallel: output rows are cut."""
    return Cut(0, unit, blocks, uneven)


def columns(unit: str) -> Cut:
    """Row-parallel: input columns are cut."""
    return Cut(1, unit)


def same(
    megatron: str, hf: str, shape: tuple[str, ...], *, cut: Cut | None = None, when: str = "", own_dtype: bool = False
) -> Rule:
    """The same tensor under another name (stacked over layers if the key is)."""
    return Rule("same", megatron, (Part(hf, shape[0]),), "one", shape[1:], cut, when, own_dtype=own_dtype)


def rows_of(
    megatron: str,
    hf: str,
    shape: tuple[str, ...],
    *,
    start: str,
    of: str,
    cut: Cut | None = None,
    when: str = "",
) -> Rule:
    """shape[0] rows of an HF tensor of `of` rows, from row `start`; the other rows belong to other rules."""
    return Rule("rows_of", megatron, (Part(hf, shape[0], start, 1, of),), "one", shape[1:], cut, when)


def unit_rows_of(
    megatron: str, hf: str, shape: tuple[str, ...], *, units: str, start: str, every: str, cut: Cut, when: str = ""
) -> Rule:
    """Of an HF tensor that holds `units` times `every` rows: shape[0] of each of these, from row `start`."""
    of = "+".join(f"{units}*{term}" for term in every.split("+"))
    part = Part(hf, shape[0], start, 1, of, run=shape[0], every=every)
    return Rule("unit_rows_of", megatron, (part,), units, shape[1:], cut, when)


def qkv(megatron: str, q: str, k: str, v: str, *, width: tuple[str, ...], when: str = "") -> Rule:
    """Per KV group: its query heads, its key head, its value head. Cut between groups."""
    parts = (Part(q, "heads_per_group*head_dim"), Part(k, "head_dim"), Part(v, "head_dim"))
    return Rule("qkv", megatron, parts, "groups", width, rows("groups"), when)


def fused_qkv(megatron: str, hf: str, *, width: tuple[str, ...], when: str = "") -> Rule:
    """Like qkv, from one HF tensor that holds all of q, then all of k, then all of v."""
    q, kv = "heads*head_dim", "groups*head_dim"
    of = f"{q}+2*{kv}"
    parts = (
        Part(hf, "heads_per_group*head_dim", of=of),
        Part(hf, "head_dim", start=q, of=of),
        Part(hf, "head_dim", start=f"{q}+{kv}", of=of),
    )
    return Rule("fused_qkv", megatron, parts, "groups", width, rows("groups"), when)


def gated_qkv(megatron: str, q: str, k: str, v: str, *, width: tuple[str, ...], when: str = "") -> Rule:
    """Like qkv, with a gate for each query head; q holds a head's query rows, then its gate rows.

    Per KV group: its query heads, their gates, its key head, its value head.
    """
    query = Part(q, "heads_per_group*head_dim", of="2*heads*head_dim", run="head_dim", every="2*head_dim")
    parts = (query, replace(query, start="head_dim"), Part(k, "head_dim"), Part(v, "head_dim"))
    return Rule("gated_qkv", megatron, parts, "groups", width, rows("groups"), when)


def grouped_qkv(megatron: str, hf: str, *, width: tuple[str, ...], when: str = "") -> Rule:
    """Like qkv, from one HF tensor that has the same order: per KV group its query heads, key head and value head."""
    parts = (Part(hf, "heads_per_group*head_dim+2*head_dim"),)
    return Rule("grouped_qkv", megatron, parts, "groups", width, rows("groups"), when)


def gate_up(megatron: str, gate: str, up: str, *, width: tuple[str, ...], when: str = "", ffn: str = "ffn") -> Rule:
    """[gate; up], whatever the tensor-parallel size; a rank takes its slice of each half."""
    parts = (Part(gate, ffn), Part(up, ffn))
    return Rule("gate_up", megatron, parts, "one", width, rows(ffn, blocks=2), when)


def fused_gate_up(
    megatron: str, hf: str, *, width: tuple[str, ...], when: str = "", ffn: str = "ffn", up_first: bool = False
) -> Rule:
    """[gate; up] from one HF tensor that holds gate, then up (or up, then gate)."""
    gate, up = ("0", ffn) if not up_first else (ffn, "0")
    parts = (Part(hf, ffn, gate, 1, f"2*{ffn}"), Part(hf, ffn, up, 1, f"2*{ffn}"))
    return Rule("fused_gate_up", megatron, parts, "one", width, rows(ffn, blocks=2), when)


def experts(rule: Rule, how: Literal["each", "stacked"], *, transposed: bool = False) -> Rule:
    """The rule for every expert of a layer: one HF tensor each (`{e}` in its name), or one with an expert axis."""
    return replace(rule, kind=f"{rule.kind}, experts {how}", experts=how, transposed=transposed)


def interleaved_gate_up(megatron: str, hf: str, *, width: tuple[str, ...], when: str = "", ffn: str = "ffn") -> Rule:
    """[gate; up] from one HF tensor whose rows are gate and up in turn."""
    parts = (Part(hf, ffn, "0", 2, f"2*{ffn}"), Part(hf, ffn, "1", 2, f"2*{ffn}"))
    return Rule("interleaved_gate_up", megatron, parts, "one", width, rows(ffn, blocks=2), when)


def in_mtp(rule: Rule) -> Rule:
    """The rule of a decoder layer, for the same tensor inside a multi-token-prediction layer."""
    key = MTP_LAYERS + "transformer_layer." + rule.megatron.removeprefix(LAYERS)
    return replace(rule, megatron=key)


def drop(hf: str, reason: str, *, same_as: str = "", when: str = "") -> Drop:
    """An HF tensor that is left out for a stated reason."""
    return Drop(hf, reason, same_as, when)
