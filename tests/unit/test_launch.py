"""What a launch means before anything is started: jobs as values, each node's command, the site file, refusals."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mswift.cli import options
from mswift.cli.main import main
from mswift.config.launch import LaunchConfig
from mswift.config.train import SftConfig
from mswift.errors import ConfigError
from mswift.launchers.job import Job, Meeting
from mswift.launchers.node import job_here
from mswift.launchers.node import main as start_node
from mswift.launchers.site import Site, read_site
from tests.support import slurm
from tests.unit.test_recipes import QWEN3_0_6B


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_0_6B))
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(f"command: sft\nmodel: {tmp_path}\ndataset: {tmp_path}/rows.jsonl\ntrain_iters: 3\n")
    return path


def test_one_machine_meets_on_its_loopback_interface() -> None:
    argv = Job(8, "m", ("a", "b c")).argv(python="python")
    assert argv == ["python", "-m", "mswift.parallel.agent", "--standalone", "--nproc_per_node=8", "--module", "m", "a",
                    "b c"]  # fmt: skip


def test_machines_differ_in_their_number_alone() -> None:
    job = Job(4, "m", (), 3, Meeting("fd00::1", 29501, "7.0"))
    assert job.world_size == 12
    argvs = [job.argv(node) for node in range(3)]
    assert all(f"--node_rank={number}" in argv for number, argv in enumerate(argvs))
    assert len({tuple(word for word in argv if "node_rank" not in word) for argv in argvs}) == 1
    assert {"--nnodes=3", "--rdzv_backend=static", "--rdzv_endpoint=[fd00::1]:29501", "--rdzv_id=7.0",
            "--max_restarts=0"} < set(argvs[0])  # fmt: skip
    with pytest.raises(ValueError, match="node 3 lies outside"):
        job.argv(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Job(0, "m"), "--nproc_per_node 0: at least one process"),
        (lambda: Job(1, "m", (), 2), "--nodes 2: name the first node.*--master_addr"),
        (lambda: Meeting("", 29500), "--master_addr '' is no host"),
        (lambda: Meeting("--version", 29500), "--master_addr '--version' is no host"),
        (lambda: Meeting("n1", 70_000), "--master_port 70000 is no port"),
    ],
)
def test_impossible_jobs(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_a_node_of_a_step_knows_its_place() -> None:
    one_each = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    places = [{**slurm.task(2 * node), **one_each, "SLURM_PROCID": str(node), "SLURM_LOCALID": "0"} for node in (0, 1)]
    jobs = [job_here(8, ["sft", "r.yaml"], {**place, "SLURM_RESTART_COUNT": "2"}) for place in places]
    assert [rank for _, rank in jobs] == [0, 1]
    assert jobs[0][0] == jobs[1][0] == Job(8, "mswift.cli.main", ("sft", "r.yaml"), 2, Meeting("n1", 28_121, "1.2"))
    kept, _ = job_here(8, [], {**places[1], "SLURM_STEP_ID": "3"}, "m", Path("/r"))
    assert kept.argv(1, "py")[:5] == ["py", "-m", "mswift.parallel.agent", "--rank_logs", "/r/logs/1.0.3"]
    alone, rank = job_here(8, ["sft", "r.yaml"], {**places[0], "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"})
    assert (alone.num_nodes, alone.meeting, rank) == (1, None, 0)


def test_a_first_node_whose_port_is_taken_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1, not 2: the job starts again, with another port."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = {**slurm.task(0), "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        assert start_node(["--nproc_per_node=8", "sft", "r.yaml"]) == 1
    assert f": port {port}, where the ranks were to meet, cannot be listened at" in capsys.readouterr().err


def test_flags_that_are_not_the_launchs_go_on_to_the_training() -> None:
    argv = ["slurm", "r.yaml", "--lr", "1e-4", "--nodes=2-4", "--dataset", "a", "b", "--dry_run", "--mcore.x", "1"]
    config = options.parse(LaunchConfig, argv)
    assert (config.action, config.target, config.nodes, config.dry_run) == ("slurm", "r.yaml", "2-4", True)
    assert config.training == ("--lr", "1e-4", "--dataset", "a", "b", "--mcore.x", "1")
    with pytest.raises(ConfigError, match="unknown flag --training"):
        options.parse(SftConfig, ["--training", "x"])


def test_torchrun_prints_a_command_for_each_node(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["launch", "torchrun", str(recipe), "--nodes", "2", "--nproc_per_node", "4", "--master_addr", "n1"]
    assert main([*argv, "--system", "it's $(touch x)"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [line[4] for line in lines] == ["--node_rank=0", "--node_rank=1"]
    for line in lines:
        at = line.index("--module")
        assert line[at + 1 : at + 3] == ["mswift.cli.main", "sft"]
        assert options.parse(SftConfig, line[at + 3 :]).system == "it's $(touch x)"


REFUSED = {
    ("torchrun", "--nodes", "2"): "--nodes 2: name the first node, where the others find it: --master_addr",
    ("torchrun", "--nodes", "2-3"): "a range is for launch slurm",
    ("torchrun", "--sweep", "lr=1,2"): "--sweep is for SLURM",
    ("local", "--nodes", "2"): "launch local is one machine",
    ("slurm", "--nodes", "x"): "--nodes x: write a number of nodes",
    ("slurm", "--nodes", "3-2"): "--nodes 3-2: write a number of nodes",
    ("slurm", "--command", "pt"): "line 1: the recipe is for `mswift sft`, not for `mswift pt`",
    ("slurm", "--world_size", "8"): "--world_size follows from --nodes",
    ("slurm", "--modle", "x"): "unknown flag --modle; did you mean --model?",
    ("slurm", "--time", "soon"): "--time soon: write minutes",
    ("slurm", "--time", "10"): "--time 10 is not longer than --signal_seconds 600",
    ("slurm", "--nproc_per_node", "9"): "a rank takes a GPU, and the site's nodes have 8",
    ("slurm", "--chain", "0"): "--chain 0",
    ("slurm", "--sweep", "lr"): "--sweep lr: write a flag's name and its values",
    ("slurm", "--sweep", "lr=1", "--chain", "2"): "--chain and --sweep",
    ("slurm", "--job_name", "a\nb"): "has a control character",
    ("slurm", "--nodes", "2-3", "--dry_run"): "refused on 24 ranks: --global_batch_size 16 is not a multiple",
    ("slurm", "--site", "absent.yaml"): "site file absent.yaml cannot be read",
    ("status",): "no job of it is known",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_refused(flags: tuple[str, ...], recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", flags[0], str(recipe), *flags[1:]]) == 2
    captured = capsys.readouterr()
    assert REFUSED[flags] in captured.err
    assert captured.out == ""


def test_a_recipe_says_what_it_is_for(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(recipe), "--dry_run"]) == 0
    assert main(["pt", str(recipe), "--dry_run"]) == 2
    recipe.write_text(recipe.read_text().replace("command: sft\n", ""))
    capsys.readouterr()
    assert main(["launch", "slurm", str(recipe), "--dry_run"]) == 2
    assert "does not say what it is for: add `command: sft`" in capsys.readouterr().err
    assert main(["launch", "slurm", str(recipe), "--dry_run", "--command", "sft"]) == 0


SITES = {
    "partiton: gpu": "Site has no partiton; did you mean partition?",
    "gpus_per_node: many": "Site.gpus_per_node is 'many'; it takes a whole number",
    "gpus_per_node: true": "Site.gpus_per_node is True; it takes a whole number",
    "environment: {'A;B': 1}": "environment has 'A;B', which is no name of a variable",
    "sbatch: [exclude=n1]": "sbatch has 'exclude=n1', which is no option",
    "container: pyxis": "container is given alone",
    "mounts: [/data]": "mounts and container_options need container",
    "- gpu": "must be a mapping",
    "a: [": "cannot be read",
}


@pytest.mark.parametrize("text", SITES)
def test_a_site_file_is_strict(text: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=SITES[text].replace("[", r"\[")) as error:
        read_site(path)
    assert str(error.value).startswith(f"site file {path}")


def test_the_sites_example_loads() -> None:
    site = read_site(Path(__file__).parents[2] / "slurm" / "site.yaml")
    assert (site.partition, site.gpus_per_node) == ("gpu", 8)
    assert site != Site()


NO_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "megatron", "transformers", "peft", "pyarrow", "datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_a_login_node_needs_no_torch(recipe: Path, tmp_path: Path) -> None:
    """Every module of the launchers, and a launch that is refused as late as it can be."""
    names = [path.stem for path in (Path(__file__).parents[2] / "launchers").glob("*.py") if path.stem != "__init__"]
    argv = ["launch", "slurm", str(recipe), "--output_dir", str(tmp_path / "run"), "--nodes", "2"]
    script = f"""{NO_TORCH}
from importlib import import_module
for name in {names}:
    import_module("mswift.launchers." + name)
from mswift.cli.main import main
print(main({argv}))
"""
    environ = {**os.environ, "PATH": str(tmp_path)}  # no sbatch either
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "2\n", done.stderr
    assert "sbatch is not installed here: run this on a login node of the cluster" in done.stderr
    assert "#SBATCH --nodes=2\n" in (tmp_path / "run" / "launch" / "job.sbatch").read_text()
    assert "train_iters: 3\n" in (tmp_path / "run" / "launch" / "recipe.yaml").read_text()


def test_jobs_of_a_chain_are_known_though_a_later_one_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites limit how many jobs may wait: the first ones run, and a second submission must not run beside them."""
    tools, run = tmp_path / "tools", tmp_path / "run"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f"""#!/bin/sh
[ "$(ls {tools} | grep -c job)" = 2 ] && echo "QOSMaxSubmitJobPerUserLimit" >&2 && exit 1
touch {tools}/job-$$ && ls {tools} | grep -c job
"""
    )
    (tools / "squeue").write_text("#!/bin/sh\necho '1|RUNNING 0:01 1 n1'\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    argv = ["launch", "slurm", str(recipe), "--output_dir", str(run), "--chain", "3", "--nodes", "2"]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "QOSMaxSubmitJobPerUserLimit; 2 of the --chain 3 jobs stand in the queue (1 2) and will run" in said
    assert json.loads((run / "launch" / "jobs.json").read_text()) == {"jobs": ["1", "2"]}
    assert main(argv) == 2
    assert f"--output_dir {run}: its job 1 is RUNNING: wait for its end" in capsys.readouterr().err
