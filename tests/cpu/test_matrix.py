"""Promise 2: any layout, one model. Every layout of the product computes what one rank computes, in fp32.

Loss, every gradient and the weights after three steps of SGD at most 5e-6 apart (max|a - b| / max|b| per tensor of the
HF model). `make test` runs a sample of the product, `make test-all` the whole; both print the largest difference of
every case beside the noise floor: what another order of the sums makes of the one-rank run.
"""

from collections.abc import Iterator

import pytest

from tests.support.matrix import differences, product

SAMPLE = {
    *(("dense", "tp2", "full"), ("dense", "tp2", "lora"), ("dense", "tp4-sp", "full"), ("dense", "pp2-vpp2", "full")),
    *(("dense", "tp2-sp-pp2", "full"), ("dense", "tp2-sp-dp2", "lora"), ("dense", "dp2", "full")),
    *(("moe", "ep2-etp2", "full"), ("moe", "tp2-sp-etp1", "full"), ("moe", "ep4", "lora")),
    *(("moe", "tp2-sp-pp2-etp1-ep2", "full"), ("mla", "tp2-sp-ep2", "full"), ("mla", "pp2-ep2", "full")),
    *(("mla", "tp4-sp", "lora"), ("dense", "pp2-cp2:packed", "full"), ("moe", "tp2-sp-cp2", "full")),
    ("mtp", "pp2-dp2-vpp2", "full"),
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


@pytest.mark.parametrize(("model", "layout", "tuner"), CASES)
def test_equals_one_rank(model: str, layout: str, tuner: str, table: list[str]) -> None:
    found = differences(model, layout, tuner)
    worst = max(found, key=lambda d: d.difference)
    table.append(f"{model:6}{layout:20}{tuner:5}{worst.difference:8.1e}  noise {worst.noise:.1e}  {worst.name}")
    assert [d for d in found if not d.proved] == []


BREAKS: dict[str, tuple[str, str, str, str]] = {
    "tp": ("dense", "tp2", "full", "tp reduce"),
    "sp": ("dense", "tp2-sp", "full", "sp norm reduce"),
    "pp": ("moe", "pp2", "full", "tests/support/matrix.py:half_gradients_between_stages"),
    "pp, tied": ("dense", "pp2", "full", "tied embedding reduce"),
    "dp": ("dense", "dp2", "full", "dp reduce"),
    "ep": ("moe", "ep2", "full", "tests/support/matrix.py:no_gradient_through_all_to_all"),
    "etp": ("moe", "etp2", "full", "tests/support/matrix.py:no_sum_over_experts_parts"),
    "lora, tp": ("dense", "tp2", "lora", "copy to ranks"),
    "lora, dp": ("dense", "dp2", "lora", "dp reduce"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_collective_is_seen(kind: str) -> None:
    assert not all(d.proved for d in differences(*BREAKS[kind]))
