"""Promise 2: any layout, one model. Every layout of the product computes what one rank computes, in fp32.

Loss, every gradient and the weights after three steps of SGD at most 5e-6 apart (max|a - b| / max|b| per tensor of the
HF model). `make test` runs a sample of the product, `make test-all` the whole; both print the largest difference of
every case beside the noise floor: what another order of the sums makes of the one-rank run.
"""

from collections.abc import Iterator

import pytest

from tests.support.matrix import LAYOUTS, differences, kinds, product

SAMPLE = {
    *(("dense", "tp2", "full"), ("dense", "tp2", "lora"), ("dense", "tp4-sp", "full"), ("dense", "pp2-vpp2", "full")),
    *(("dense", "tp2-sp-pp2", "full"), ("dense", "tp2-sp-dp2", "lora"), ("dense", "dp2", "full")),
    *(("moe", "ep2-etp2", "full"), ("moe", "tp2-sp-etp1", "full"), ("moe", "ep4", "lora")),
    *(("moe", "tp2-sp-pp2-etp1-ep2", "full"), ("mla", "tp2-sp-ep2", "full"), ("mla", "pp2-ep2", "full")),
    *(("mla", "tp4-sp", "lora"), ("dense", "pp2-cp2:packed", "full"), ("moe", "tp2-sp-cp2", "full")),
    *(("mtp", "pp2-dp2-vpp2", "full"), ("moe", "tp2-sp-pp2:packed", "lora"), ("mla", "cp2:a2a", "lora")),
}
CASES = [
    pytest.param(*case, id="-".join(case), marks=[] if case in SAMPLE else [pytest.mark.whole]) for case in product()
]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines that are printed when the module is done."""
    lines: list[str] = []
    yield lines
    reporter, capture = map(request.config.pluginmanager.getplugin, ("terminalreporter", "capturemanager"))
    with capture.global_and_fixture_disabled():
        for line in ("", *sorted(lines)):
            reporter.write_line(line)


def test_the_sample_is_in_the_product() -> None:
    assert set(product()) >= SAMPLE


PROMISED = (
    "tp2 tp2-sp tp4-sp pp2 pp4 pp2-vpp2 cp2 cp2:all_gather cp2:a2a cp4 cp4:a2a+p2p dp2 tp2-pp2 tp2-cp2 "
    "tp2-sp-pp2:packed pp2-cp2:packed"
)
PROMISED_OF_EXPERTS = "ep2 ep2-etp2 ep4"


def test_the_product_has_every_promised_layout() -> None:
    """Tensor parallelism of experts needs sequence parallelism, so that those layouts have it for them."""
    dense = {("dense", layout) for layout in PROMISED.split()}
    experts = {
        (model, layout.replace("tp2-pp2", "tp2-sp-pp2").replace("tp2-cp2", "tp2-sp-cp2"))
        for model in ("moe", "mla")
        for layout in (PROMISED + " " + PROMISED_OF_EXPERTS).split()
        if layout != "tp2"
    }
    wanted = {(*case, tuner) for case in dense | experts for tuner in ("full", "lora")}
    assert wanted - set(product()) == set()


@pytest.mark.parametrize(("model", "layout", "tuner"), CASES)
def test_equals_one_rank(model: str, layout: str, tuner: str, table: list[str]) -> None:
    found = differences(model, layout, tuner)
    worst = max(found, key=lambda d: d.difference)
    table.append(f"{model:6}{layout:20}{tuner:5}{worst.difference:8.1e}  noise {worst.noise:.1e}  {worst.name}")
    assert [d for d in found if not d.proved] == []


BROKEN, CONTEXT = "tests/support/breaks.py:", "tests/cpu/test_parity_context.py:"
BREAKS: dict[str, tuple[str, str, str, str]] = {
    "tp": ("dense", "tp2", "full", "tp reduce"),
    "sp": ("dense", "tp2-sp", "full", "sp norm reduce"),
    "pp": ("moe", "pp2", "full", BROKEN + "half_gradients_between_stages"),
    "pp, tied": ("dense", "pp2", "full", "tied embedding reduce"),
    "pp, predicting": ("mtp", "pp2", "full", "tied embedding reduce"),
    "vpp": ("dense", "pp2-vpp2", "full", BROKEN + "half_gradients_between_stages"),
    "dp": ("dense", "dp2", "full", "dp reduce"),
    "dp, weights": ("dense", "dp2", "full", BROKEN + "updated_weights_not_gathered"),
    "ep": ("moe", "ep2", "full", BROKEN + "no_gradient_through_all_to_all"),
    "etp": ("moe", "etp2", "full", BROKEN + "no_sum_over_experts_parts"),
    "edp": ("moe", "ep2-dp4", "full", BROKEN + "gradients_of_experts_not_summed"),
    "cp p2p": ("dense", "cp2", "full", CONTEXT + "keys_kept"),
    "cp all_gather": ("dense", "cp2:all_gather", "full", CONTEXT + "gradients_of_keys_not_summed"),
    "cp a2a": ("dense", "cp2:a2a", "full", CONTEXT + "heads_kept_in_the_backward_pass"),
    "cp a2a+p2p": ("dense", "cp4:a2a+p2p", "full", CONTEXT + "keys_kept"),
    "packed pp": ("dense", "tp2-sp-pp2:packed", "full", BROKEN + "documents_of_the_first_stage_only"),
    "packed cp": ("dense", "pp2-cp2:packed", "full", BROKEN + "documents_cut_as_one"),
    "tp, lora": ("dense", "tp2", "lora", "copy to ranks"),
    "dp, lora": ("dense", "dp2", "lora", "dp reduce"),
    "cp p2p, lora": ("mla", "cp2", "lora", CONTEXT + "keys_kept"),
}


def test_every_kind_of_layout_has_a_partner() -> None:
    of = {key: key.partition(",")[0] for key in BREAKS}
    assert set(of.values()) == set().union(*map(kinds, LAYOUTS))
    assert [key for key, (_, layout, _, _) in BREAKS.items() if of[key] not in kinds(layout)] == []


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_collective_is_seen(kind: str) -> None:
    assert not all(d.proved for d in differences(*BREAKS[kind]))
