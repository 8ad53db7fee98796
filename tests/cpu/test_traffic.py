"""The formulas of what crosses ranks are what a running job counts: every axis and kind of collective, to the byte."""

from typing import Any

import pytest

from tests.support.traffic import counted

SP = {"sequence_parallel": True}
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "tp": ("dense", 2, {"tp": 2}, {}),
    "tp, bf16, untied": ("untied", 2, {"tp": 2}, {"dtype": "BF16"}),
    "sp": ("dense", 2, {"tp": 2, **SP}, {}),
    "sp, fused loss": ("untied", 2, {"tp": 2, **SP}, {"loss_fusion": "true"}),
    "pp": ("dense", 2, {"pp": 2}, {}),
    "vpp": ("untied", 2, {"pp": 2, "vpp": 2}, {}),
    "cp p2p": ("dense", 2, {"cp": 2}, {}),
    "cp p2p, bf16": ("dense", 2, {"cp": 2}, {"dtype": "BF16"}),
    "cp all_gather": ("dense", 2, {"cp": 2}, {"cp_comm_type": "all_gather"}),
    "cp a2a": ("dense", 2, {"cp": 2}, {"cp_comm_type": "a2a"}),
    "cp a2a+p2p": ("dense", 4, {"cp": 4, "cp_levels": (2, 2)}, {"cp_comm_type": "a2a+p2p"}),
    "dp": ("dense", 2, {}, {}),
    "dp, bf16": ("dense", 2, {}, {"dtype": "BF16"}),
    "ep": ("moe", 2, {"ep": 2}, {}),
    "sp, etp 1, pp": ("moe", 4, {"tp": 2, "pp": 2, "etp": 1, "ep": 2, **SP}, {}),
    "sp, pp": ("dense", 4, {"tp": 2, "pp": 2, **SP}, {}),
    "ep, edp": ("moe", 4, {"ep": 2}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_counted_is_what_the_formulas_say(case: str) -> None:
    model, world_size, degrees, settings = CASES[case]
    ranks = counted(model, world_size, degrees, **settings)
    assert all(found.pop(("control", "", "bytes")) < 1024 for found, _ in ranks)
    uneven = {key for key in ranks[0][1] if key[0] == "ep" and key[2] == "bytes"}  # some experts get more tokens
    for found, said in ranks:
        assert {k: v for k, v in found.items() if k not in uneven} == {k: v for k, v in said.items() if k not in uneven}
    for key in uneven:
        assert sum(found[key] for found, _ in ranks) == sum(said[key] for _, said in ranks)
