"""A real SLURM on this machine: slurmctld and some slurmd, each node with its own network, host name and processes.

Needs root, network namespaces and Debian's packages (tests/support/install_slurm.sh). Everything lies in one folder.
Several stand side by side: each takes a place, which is a bridge, a network, a port and the names of its nodes' spaces.
"""

import fcntl
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "ip", "nsenter", "unshare", "setpriv")
NUM_PLACES = 8
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")

CONF = """
ClusterName=test
SlurmctldHost={host}({network}.1)
SlurmctldPort={port}
AuthType=auth/munge
# cred_expire is also the time a requeued job waits before it may start (120 s by default, and for less than 5)
AuthInfo=socket={home}/munge/sock,cred_expire=5
CredType=cred/munge
# clusters side by side share the cgroup of a node's name: their jobs must not share a number
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
# longer than a step of a node that was cut off tries to tell its end: the node would be drained
UnkillableStepTimeout=120
CompleteWait=0
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
CGROUP_V1 = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n"
NODE = "NodeName={name} NodeAddr={address} Port=17100 CPUs=64 RealMemory=16000 Gres=gpu:8"


class Cluster:
    """Nodes n1, n2, ..., up while inside `with`; `environ` is what its clients need."""

    def __init__(self, home: Path, num_nodes: int = 2) -> None:
        self.home = home
        self.nodes = tuple(f"n{number}" for number in range(1, num_nodes + 1))
        self.environ = {**os.environ, "SLURM_CONF": str(home / "slurm.conf")}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        self._take_place()
        try:
            self._write_files()
            self._make_network()
            self._start("munged", "--foreground", "--force", *(f"--{name}={self.home}/munge/{file}" for name, file in (
                ("key-file", "key"), ("socket", "sock"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed")
            )))  # fmt: skip
            self._wait(lambda: (self.home / "munge" / "sock").exists(), "munged")
            self._start(*self._with_hosts(), "exec slurmctld -D -i")
            for node in self.nodes:
                self.start_node(node)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._slurmds:
            self.kill_node(node)  # unshare ignores SIGTERM while its child lives
        for process in reversed(self._processes):
            process.terminate()
        deadline = time.monotonic() + 5
        for process in reversed(self._processes):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._remove_network()
        os.close(self._lock)

    def space(self, node: str) -> str:
        """The network namespace of a node, and the name of its link here."""
        return f"msw{self.place}-{node}"

    def client(self, *argv: str, check: bool = True, cwd: Path | None = None) -> str:
        """Output of a client command, both streams."""
        done = subprocess.run(argv, env=self.environ, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, timeout=120, check=False)  # fmt: skip
        assert not check or done.returncode == 0, (argv, done.stdout)
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        words = self.client("scontrol", "show", "job", "-o", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait_for_end(self, job: str, seconds: float) -> str:
        """The state of the job once it has ended."""
        self._wait(lambda: self.field(job, "JobState") in ENDED, f"the end of job {job}", seconds)
        return self.field(job, "JobState")

    def wait_for_restart(self, job: str, number: int, seconds: float) -> None:
        """Until the job has been queued again `number` times."""
        self._wait(lambda: int(self.field(job, "Restarts")) >= number, f"restart {number} of job {job}", seconds)

    def start_node(self, node: str) -> None:
        """A slurmd in namespaces of its own; whatever runs in them dies with it."""
        (self.home / f"spool-{node}").mkdir(exist_ok=True)
        # nsenter, not `ip netns exec`, which mounts /sys anew, where slurmd then finds no cgroups
        enter = ("nsenter", f"--net=/run/netns/{self.space(node)}")
        apart = ("unshare", "--ipc", "--pid", "--fork", "--kill-child")
        commands = f"mount -t tmpfs shm /dev/shm; hostname {node}; slurmd -D -N {node} & wait"
        self._slurmds[node] = self._start(*enter, *apart, *self._with_hosts("--mount-proc"), commands)

    def kill_node(self, node: str) -> None:
        """The node dies: every process in it, at once."""
        self._slurmds[node].kill()

    def wait_for_nodes(self) -> None:
        """Until all nodes are idle."""
        listed = ("sinfo", "-hN", "-t", "idle", "-p", "main")
        self._wait(lambda: self.client(*listed).count("\n") == len(self.nodes), "idle nodes")

    def cut(self, node: str) -> None:
        """The node's network cable is out; the node goes on by itself."""
        subprocess.run(["ip", "link", "set", self.space(node), "down"], check=True, timeout=20)

    def heal(self, node: str) -> None:
        """The cable is in again."""
        subprocess.run(["ip", "link", "set", self.space(node), "up"], check=True, timeout=20)

    def mend(self) -> None:
        """All nodes are there, and reach each other."""
        for node in self.nodes:
            self.heal(node)
            if self._slurmds[node].poll() is not None:
                self.start_node(node)

    def processes(self, node: str, words: str) -> list[int]:
        """Processes (numbers on this machine) of a node whose command line holds `words`."""
        found, marks = [], {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.environ['SLURM_CONF']}".encode()}
        for entry in Path("/proc").iterdir():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                ours = marks <= set((entry / "environ").read_bytes().split(b"\0"))
            except (OSError, ValueError):
                continue
            if entry.name.isdecimal() and ours and words in command:
                found.append(int(entry.name))
        return found

    def _with_hosts(self, *options: str) -> tuple[str, ...]:
        binds = (
            f"mount --bind {self.home}/hosts /etc/hosts; mount --bind {self.home}/nsswitch.conf /etc/nsswitch.conf; "
        )
        script = f'{binds} eval "$0"'
        return ("unshare", "--mount", "--uts", "--propagation", "private", *options, "bash", "-c", script)

    def _start(self, *argv: str) -> "subprocess.Popen[bytes]":
        with (self.home / "daemons.log").open("ab") as log:
            argv = ("setpriv", "--pdeathsig", "KILL", *argv)  # nothing outlives the process of the tests
            process = subprocess.Popen(
                argv, env=self.environ, cwd=self.home, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )  # a killed daemon's core falls into its home
        self._processes.append(process)
        return process

    def _write_files(self) -> None:
        for name in ("munge", "state", "dev"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o755)
        key = self.home / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = platform.node()
        network = self._network
        addresses = {node: f"{network}.{11 + number}" for number, node in enumerate(self.nodes)}
        names = ["127.0.0.1 localhost", f"{network}.1 {host}"]
        names += [f"{address} {node}" for node, address in addresses.items()]
        (self.home / "hosts").write_text("\n".join(names) + "\n")
        lines = Path("/etc/nsswitch.conf").read_text().splitlines()
        files_only = ["hosts: files" if line.startswith("hosts:") else line for line in lines]
        (self.home / "nsswitch.conf").write_text("\n".join(files_only) + "\n")
        for number in range(8):
            os.mknod(self.home / "dev" / f"gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
        (self.home / "gres.conf").write_text(
            f"NodeName={','.join(self.nodes)} Name=gpu File={self.home}/dev/gpu[0-7]\n"
        )
        (self.home / "plugstack.conf").write_text("")
        v1 = Path("/sys/fs/cgroup/freezer").is_dir()
        (self.home / "cgroup.conf").write_text(CGROUP_V1 if v1 else "")
        proctrack = "cgroup" if v1 else "linuxproc"
        ids: dict[str, object] = {"port": 16917 + self.place, "first_job": 1 + 10_000 * self.place}
        ids["nodes"] = "\n".join(NODE.format(name=name, address=address) for name, address in addresses.items())
        conf = CONF.format(host=host, home=self.home, network=network, proctrack=proctrack, **ids)
        (self.home / "slurm.conf").write_text(conf)

    def _take_place(self) -> None:
        """A free place, for as long as the lock is held; what a killed run left there is removed."""
        for place in range(NUM_PLACES):
            lock = os.open(f"/run/lock/mswift-test-slurm-{place}", os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            self.place, self._lock = place, lock
            self._bridge, self._network = f"mswbr{place}", f"10.78.{place}"
            self._remove_network()
            return
        pytest.fail(f"{NUM_PLACES} test clusters are up already")

    def _remove_network(self) -> None:
        for node in self.nodes:
            subprocess.run(["ip", "netns", "del", self.space(node)], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", self.space(node)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)

    def _make_network(self) -> None:
        def ip(*argv: str) -> None:
            subprocess.run(["ip", *argv], check=True, capture_output=True, timeout=20)

        ip("link", "add", self._bridge, "type", "bridge")
        ip("addr", "add", f"{self._network}.1/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")
        for number, node in enumerate(self.nodes):
            space = self.space(node)
            ip("netns", "add", space)
            ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", space, "master", self._bridge, "up")
            ip("-n", space, "addr", "add", f"{self._network}.{11 + number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")

    def _wait(self, reached: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                logs = {path.name: path.read_text(errors="replace")[-1500:] for path in self.home.glob("*.log")}
                pytest.fail(f"no {what} after {seconds:.0f} s: {logs}")
            time.sleep(0.3)


def skip_without_slurm() -> None:
    """Skip the test, saying why, where a cluster cannot be started."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(
            f"no SLURM here ({', '.join(missing)} missing): tests/support/install_slurm.sh installs it on Debian"
        )
    if os.geteuid() != 0:
        pytest.skip("a SLURM of its own needs root (network namespaces)")
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"a SLURM of its own needs namespaces: {probe.stderr.decode().strip()}")
