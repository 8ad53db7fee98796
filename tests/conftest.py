"""For every test: no network, one thread, and the CPU seconds of each group against its budget at the end."""

import os
import resource
import signal
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it

from tests.support import server  # noqa: E402 - keeps the environment as it is now

settings.register_profile("mswift", deadline=None, derandomize=True)  # a busy machine is no failure
settings.load_profile("mswift")

# CPU seconds, which a busy machine changes little, by the longest prefix of a test's path below tests/. `make test`
# runs two files side by side, so that it takes about half their sum: 15 minutes with room for the installation.
BUDGET_SECONDS = {
    "unit": 230,
    "unit/test_plan_scale": 35,
    "cpu/test_bad": 85,
    "cpu/test_deepspeed": 60,
    "cpu/test_deepspeed_tuners": 30,
    "cpu/test_convert": 80,
    "cpu/test_convert_ssm": 30,
    "cpu/test_parity": 100,
    "cpu/test_parity_context": 140,
    "cpu/test_parity_fsdp": 130,
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
    "cpu/test_state_layouts_moe": 25,
    "cpu/test_state": 75,
    "cpu/test_train": 130,
    "cpu/test_data": 125,
    "cpu/test_data_agents": 15,
    "cpu/test_data_hard": 15,
    "cpu/test_adapters": 120,
    "cpu/test_adapters_dropout": 32,
    "cpu/test_adapters_experts": 45,
    "cpu/test_adapters_kinds": 55,
    "cpu/test_infer": 60,
    "cpu/test_packed": 37,
    "cpu/test_fused_loss": 35,
    "cpu/test_matrix": 180,
    "cpu/test_random_shapes": 45,
    "cpu/": 200,
    "system/test_train": 500,
    "system/test_train_fsdp": 130,
    "system/test_faults": 200,
    "system/test_doctor": 80,
    "system/test_convert": 100,
    "system/test_infer": 70,
    "system/test_eval": 125,
    "system/test_app": 45,
    "system/test_deploy": 60,
    "system/test_slurm": 240,
    "system/test_slurm_faults": 90,
    "system/test_preflight": 35,
    "system/test_vllm": 240,
    "system/test_demo": 600,
    "system": 120,
    "gpu": 600,
}

LARGEST_FILES = {
    "cpu/test_matrix": 159, "cpu/test_parity_context": 90, "cpu/test_parity_fsdp": 75, "cpu/test_bad_input": 60,
    "cpu/test_parity_ssm": 60,
    "cpu/test_parity_families": 60, "cpu/test_parity_moe": 60, "cpu/test_adapters_kinds": 50,
    "cpu/test_adapters_experts": 45, "cpu/test_random_shapes": 44, "cpu/test_parity_mtp": 40, "cpu/test_traffic": 35,
    "cpu/test_parity_mla": 35, "cpu/test_train_stories": 30, "cpu/test_deepspeed": 30,
    "cpu/test_train_slurm_variables": 26, "cpu/test_parity_pipeline": 23, "cpu/test_parity_overlap": 20,
    "cpu/test_adapters_dropout": 23, "cpu/test_parity_mcore": 19, "cpu/test_state_memory": 16,
    "cpu/test_convert_megatron_moe": 14, "cpu/test_state_moves": 12,
    "system/test_slurm_faults": 300, "system/test_train_resume": 250, "system/test_vllm_handover": 200,
    "system/test_slurm": 180, "system/test_train_fsdp": 170, "system/test_faults": 150, "system/test_slurm_kinds": 120,
    "system/test_train_tuners": 90, "system/test_train_road": 90, "system/test_vllm_infer": 80,
    "system/test_preflight": 70, "system/test_doctor": 60, "system/test_deploy": 60, "system/test_train_methods": 60,
}  # fmt: skip
"""Seconds (system: waiting included), by rough measure, of the files that need most: those start first, so that all

workers end together.
"""

_seconds: dict[str, float] = defaultdict(float)
_noted = 0.0
NUM_LARGEST = 15


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The largest files first; the Makefile keeps xdist from putting the files with most tests there."""
    items.sort(key=lambda item: -LARGEST_FILES.get(_file(item.nodeid), 0))  # stable: a file stays together


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note CPU seconds since the last report (the first one has collecting in it), also for xdist's main process."""
    global _noted
    report = yield
    now = _cpu_seconds()
    report.user_properties.append(("cpu_seconds", now - _noted))
    _noted = now
    return report


def pytest_collection_finish() -> None:
    """What collecting costs is nobody's."""
    global _noted
    _noted = _cpu_seconds()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add setup, call and teardown of a test to its file."""
    _seconds[_file(report.nodeid)] += dict(report.user_properties)["cpu_seconds"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print CPU seconds per group beside the budget, and the largest files."""
    groups: dict[str, float] = defaultdict(float)
    for file, seconds in _seconds.items():
        groups[_group(file)] += seconds
    if not groups:
        return
    terminalreporter.section("CPU time", sep="-")
    for group, seconds in sorted(groups.items(), key=lambda entry: -entry[1]):
        budget = BUDGET_SECONDS.get(group, 0)
        over = "  OVER BUDGET" if seconds > budget else ""
        terminalreporter.write_line(f"{group:<36} {seconds:7.1f} s of {budget:4d} s{over}")
    terminalreporter.write_line(f"{'all':<36} {sum(groups.values()):7.1f} s; the largest files:")
    for file, seconds in sorted(_seconds.items(), key=lambda entry: -entry[1])[:NUM_LARGEST]:
        terminalreporter.write_line(f"{file:<36} {seconds:7.1f} s")


def _file(nodeid: str) -> str:
    """Its path below tests/, without .py."""
    return "/".join(Path(nodeid.partition("::")[0]).parts[1:]).removesuffix(".py")


def _group(file: str) -> str:
    """The budget that a test file counts on: the longest prefix in BUDGET_SECONDS."""
    return max((prefix for prefix in BUDGET_SECONDS if file.startswith(prefix)), key=len, default="other")


def _cpu_seconds() -> float:
    """Of this process, of its children that ended, and of the ranks of tests (tests/support/server.py)."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + server.cpu_seconds()
