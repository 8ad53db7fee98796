"""What is wrong with nodes before a run starts: each refusal names the node, the numbers and the remedy."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mswift.cli.main import main
from mswift.config.train import SftConfig
from mswift.errors import CheckpointError, ConfigError
from mswift.launchers.machine import Gpu
from mswift.launchers.preflight import (
    Expected,
    Facts,
    facts,
    job_refusals,
    node_refusals,
    noting_refusals,
    read,
    read_refusals,
    versions,
    write,
)  # fmt: skip
from mswift.train.dry_run import needs_of
from tests.unit.test_launch import recipe

__all__ = ["recipe"]

WANT = Expected("/runs/a", {"/m/w": 5}, checkpoint_bytes=2**30, nproc_per_node=2)
GOOD = Facts("n1", {"python": "3.11.7", "torch": "2.13.0"}, {}, None, 2 * 2**30)


def at(host: str, **change: object) -> Facts:
    return replace(GOOD, host=host, **change)  # type: ignore[arg-type]


def test_nodes_that_are_well() -> None:
    assert job_refusals([at("n1"), at("n1"), at("n2"), at("n2")], WANT, 2) == []


SICK = {
    "absent": (
        at("n2", wrong_files={"/m/w": "cannot be read (No such file or directory)"}),
        r"node n2: /m/w cannot be read \(No such file or directory\): put it where all nodes see it",
    ),
    "read only": (
        at("n2", cannot_write="Read-only file system"),
        r"node n2: --output_dir /runs/a cannot be written \(Read-only file system\): use one",
    ),
    "full": (
        at("n2", free_bytes=2**30),
        r"node n2: --output_dir /runs/a has 1.0 GiB free; two checkpoints are 2.0 GiB: free some",
    ),
    "older": (
        at("n2", versions={"python": "3.11.7", "torch": "2.12.0"}),
        "node n2: torch 2.12.0, but node n1 has 2.13.0: install the same on all nodes",
    ),
    "without a port": (at("n2", no_port="port 1, where"), "node n2: port 1, where"),
    "without a GPU": (
        at("n2", no_device="process 7 has no GPU of its own"),
        "node n2: process 7 has no GPU of its own",
    ),
    "a sick GPU": (
        at("n2", gpus=[Gpu("H100", "80 GiB", "570", 0), Gpu("H100", "80 GiB", "570", 3)]),
        r"node n2: GPU 1 \(H100\) has 3 uncorrected ECC errors: leave the node out",
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_node_is_named_once(name: str) -> None:
    sick, message = SICK[name]
    (refusal,) = job_refusals([at("n1"), at("n1"), sick, sick], WANT, 2)
    assert re.match(message, refusal)


def test_ranks_that_are_not_where_they_should_be() -> None:
    (refusal,) = job_refusals([at("n1")] * 4, WANT, 2)
    assert refusal.startswith("4 ranks are on 1 nodes (n1), 2 were asked for: start one torchrun per node")
    refusals = job_refusals([at("n1"), at("n2"), at("n2"), at("n2")], WANT, 2)
    assert [text.split(",")[0] for text in refusals] == ["node n1: has 1 ranks", "node n2: has 3 ranks"]


def test_this_machine(tmp_path: Path) -> None:
    good, other = tmp_path / "good", tmp_path / "other"
    good.write_bytes(b"12345")
    other.write_bytes(b"123")
    want = Expected(str(tmp_path / "new" / "run"), {str(good): 5, str(other): 5, str(tmp_path / "absent"): 1})
    found = facts(want)
    assert found.wrong_files == {
        str(other): "has 3 bytes, 5 where the job was submitted",
        str(tmp_path / "absent"): "cannot be read (No such file or directory)",
    }
    assert (found.cannot_write, list((tmp_path / "new" / "run").iterdir())) == (None, [])
    assert found.free_bytes > 0
    assert len(list(node_refusals(found, want))) == 2
    blocked = facts(replace(want, output_dir=str(good / "run")))
    assert blocked.cannot_write == "Not a directory"
    assert {"python", "mswift", "torch", "megatron-core"} <= versions().keys()
    write(tmp_path / "expected.json", want)
    assert read(tmp_path / "expected.json") == want


@pytest.mark.parametrize(
    ("rank", "in_job", "error", "noted"),
    [
        (0, True, ConfigError("no data"), ["no data"]),
        (1, True, ConfigError("no data"), ["no data"]),
        (0, False, ConfigError("no data"), []),
        (0, True, CheckpointError("damaged"), []),
        (0, True, RuntimeError("a bug"), []),
    ],
)
def test_a_refused_command_is_noted_by_any_rank_of_a_job(
    rank: int, in_job: bool, error: Exception, noted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if in_job:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    for folder in (tmp_path / "of a launch", tmp_path / "of its own"):
        folder.mkdir()
    (tmp_path / "of a launch" / "launch").mkdir()
    for folder in tmp_path.iterdir():
        with pytest.raises(type(error), match=str(error)), noting_refusals(folder, rank):
            raise error
    assert read_refusals(tmp_path / "of a launch" / "launch") == noted
    assert list((tmp_path / "of its own").iterdir()) == []


def test_needs_of_a_run(recipe: Path) -> None:
    config = SftConfig(model=str(recipe.parent), dataset=(f"{recipe.parent}/rows.jsonl",), train_iters=1)
    files, size = needs_of(config)
    assert files[f"{recipe.parent}/rows.jsonl"] == len('{"text": "one"}\n')
    assert f"{recipe.parent}/config.json" in files
    assert size == 596_049_920 * (2 + 12)  # Qwen3-0.6B: bf16, fp32 master weights and moments
    _, adapter = needs_of(replace(config, tuner_type="lora", lora_rank=8))
    assert adapter == 28 * 8 * sum(map(sum, ((1024, 2048), (1024, 1024), (1024, 1024), (2048, 1024), (1024, 3072),
                                             (1024, 3072), (3072, 1024)))) * (2 + 12)  # fmt: skip


def test_a_submission_is_refused_where_the_run_cannot_be_written(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside_a_file = str(recipe / "run")
    assert main(["launch", "slurm", str(recipe), "--output_dir", inside_a_file]) == 2
    assert inside_a_file in capsys.readouterr().err
    assert recipe.is_file()
