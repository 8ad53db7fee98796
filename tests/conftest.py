"""For every test: no network, one thread, and the seconds of each folder against its budget at the end."""

import os
import signal
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it

settings.register_profile("mswift", deadline=None, derandomize=True)  # a busy machine is no failure
settings.load_profile("mswift")

# Seconds on two cores, by the longest prefix of a test's path below tests/. `make test` runs two files side by side, so
# that it takes about half their sum: 15 minutes with room for the installation.
BUDGET_SECONDS = {
    "unit": 110,
    "unit/test_plan_scale": 20,
    "cpu/test_bad": 60,
    "cpu/test_convert": 80,
    "cpu/test_convert_ssm": 30,
    "cpu/test_parity": 50,
    "cpu/test_parity_context": 90,
    "cpu/test_parity_ssm": 60,
    "cpu/test_parity_pipeline": 35,
    "cpu/test_parity_overlap": 35,
    "cpu/test_parity_mcore": 25,
    "cpu/test_recompute": 35,
    "cpu/test_longer": 25,
    "cpu/test_parity_families": 60,
    "cpu/test_parity_mla": 35,
    "cpu/test_parity_mtp": 40,
    "cpu/test_parity_moe": 60,
    "cpu/test_convert_m": 40,
    "cpu/test_state_layouts_moe": 20,
    "cpu/test_state": 75,
    "cpu/test_train": 130,
    "cpu/test_data": 40,
    "cpu/test_data_agents": 15,
    "cpu/test_data_hard": 15,
    "cpu/test_adapters": 120,
    "cpu/test_adapters_dropout": 20,
    "cpu/test_adapters_experts": 45,
    "cpu/test_adapters_kinds": 50,
    "cpu/test_infer": 65,
    "cpu/test_packed": 45,
    "cpu/test_fused_loss": 35,
    "cpu/test_matrix": 90,
    "cpu/test_random_shapes": 45,
    "cpu/": 80,
    "system/test_train": 500,
    "system/test_faults": 150,
    "system/test_doctor": 60,
    "system": 120,
    "gpu": 600,
}

_seconds: dict[str, float] = defaultdict(float)


def _group(path: str) -> str:
    """The budget that a test file counts on: the longest prefix in BUDGET_SECONDS."""
    return max((prefix for prefix in BUDGET_SECONDS if path.startswith(prefix)), key=len, default="other")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add setup, call and teardown of a test to its file's group."""
    path = Path(report.nodeid.partition("::")[0])
    _seconds[_group("/".join(path.parts[1:]))] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print seconds per group beside the budget."""
    if not _seconds:
        return
    terminalreporter.section("time per group", sep="-")
    for group, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        budget = BUDGET_SECONDS.get(group)
        over = "  OVER BUDGET" if budget is not None and seconds > budget else ""
        terminalreporter.write_line(f"{group:<24} {seconds:7.1f} s of {budget or 0:4d} s{over}")
