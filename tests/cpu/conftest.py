"""Some tests train or import megatron-core in this process: it is prepared for the CPU before anything imports it."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """In the process that runs tests; xdist's main process runs none, and its workers wait for it."""
    if not config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        from mswift.parallel import device

        device.prepare("cpu")
