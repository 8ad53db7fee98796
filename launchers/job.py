"""A job as a value: how many machines and ranks run what, and from that each machine's command line and environment.

Pure: no torch, nothing is started, so that a login node can print or test it.
"""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mswift.errors import ConfigError
from mswift.rank_words import LOGS

AGENT = "mswift.parallel.agent"
COMMAND_LINE = "mswift.cli.main"


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of several machines meet: node 0 listens there. `job_id` keeps two jobs apart."""

    master_addr: str
    master_port: int
    job_id: str = "mswift"

    def __post_init__(self) -> None:
        if not self.master_addr or self.master_addr.startswith("-") or not self.master_addr.isprintable():
            raise ConfigError(
                f"--master_addr {self.master_addr!r} is no host; name the first node as the others reach it"
            )
        if not 0 < self.master_port < 65_536:
            raise ConfigError(f"--master_port {self.master_port} is no port; use one of 1024 to 65535, such as 29500")


@dataclass(frozen=True)
class Job:
    """`module` is run as `python -m module arguments...` by `nproc_per_node` ranks on each of `num_nodes` machines."""

    nproc_per_node: int
    module: str
    arguments: tuple[str, ...] = ()
    num_nodes: int = 1
    meeting: Meeting | None = None
    rank_logs: Path | None = None
    """Folder for what ranks other than 0 say. None: all write to the console."""

    def __post_init__(self) -> None:
        if self.nproc_per_node < 1:
            raise ConfigError(
                f"--nproc_per_node {self.nproc_per_node}: at least one process is needed; use --nproc_per_node 1"
            )
        if self.num_nodes < 1:
            raise ConfigError(f"--nodes {self.num_nodes}: at least one node is needed; use --nodes 1")
        if self.num_nodes > 1 and self.meeting is None:
            raise ConfigError(
                f"--nodes {self.num_nodes}: name the first node, where the others find it: --master_addr HOST"
            )

    @property
    def world_size(self) -> int:
        """Ranks on all machines."""
        return self.num_nodes * self.nproc_per_node

    def argv(self, node_rank: int = 0, python: str = sys.executable) -> list[str]:
        """The command line of machine `node_rank`: the agent that starts its ranks, which never starts them again.

        The ranks of one machine meet on its loopback interface.
        """
        if not 0 <= node_rank < self.num_nodes:
            raise ValueError(f"node {node_rank} lies outside 0..{self.num_nodes - 1}")
        if self.meeting is None:
            place = ["--standalone"]
        else:
            place = [
                f"--nnodes={self.num_nodes}",
                f"--node_rank={node_rank}",
                "--rdzv_backend=static",
                f"--rdzv_endpoint={_host(self.meeting.master_addr)}:{self.meeting.master_port}",
                f"--rdzv_id={self.meeting.job_id}",
                "--max_restarts=0",
            ]
        ranks = [f"--nproc_per_node={self.nproc_per_node}", "--module", self.module]
        logs = [] if self.rank_logs is None else ["--rank_logs", str(self.rank_logs)]
        return [python, "-m", AGENT, *logs, *place, *ranks, *self.arguments]

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ`, with this machine's cores shared out among its ranks unless OMP_NUM_THREADS is set."""
        cores = len(os.sched_getaffinity(0))
        return {"OMP_NUM_THREADS": str(max(1, cores // self.nproc_per_node)), **environ}


def mswift_job(nproc_per_node: int, command: str, arguments: list[str], output_dir: Path) -> Job:
    """The job of one machine that runs `mswift command arguments...`."""
    logs = output_dir / LOGS / time.strftime("%Y-%m-%d-%H%M%S")
    return Job(nproc_per_node, COMMAND_LINE, (command, *arguments), rank_logs=logs.absolute())


def _host(name: str) -> str:
    """An IPv6 address stands in brackets before a port."""
    return f"[{name}]" if ":" in name and not name.startswith("[") else name
