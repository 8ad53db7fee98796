"""Promise 4, with real processes: signals, kill -9, damage, full disks, nan, hung ranks; nothing published is lost.

Every fault befalls one rank of two unless it says otherwise; the run that goes on afterwards ends as one that nothing
befell, bit for bit.
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mswift import rundir
from mswift.ledger import read_events
from mswift.status import read_status
from tests.support.commands import command, make_home
from tests.support.family_configs import family_config
from tests.support.forks import Forge
from tests.support.parity import model_of
from tests.support.runs import log, tensors
from tests.support.tiny import tiny_model, tiny_tokenizer

STEPS = 6
SEED = int(os.environ.get("MSWIFT_FAULT_SEED", "1"))
NUM_KILLS = 50 if os.environ.get("MSWIFT_ALL_FAULTS") == "1" else 5


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_home(tmp_path_factory.mktemp("faults"))
    model_of(
        family_config("qwen3_moe", vocab_size=300, num_hidden_layers=2, max_position_embeddings=256)
    ).save_pretrained(path / "moe")
    tiny_model(path / "tied", tie_word_embeddings=True)
    for name in ("moe", "tied"):
        tiny_tokenizer(path / name)
    return path


def argv(home: Path, output: Path, *flags: str) -> list[str]:
    """What follows `mswift`: six steps of full training, unless the flags say otherwise."""
    words = command(home, "sft", output, "--train_iters", str(STEPS), "--tensorboard", "false")
    words += ["--micro_batch_size", "4", *flags]
    return words[words.index("sft") :]


@pytest.fixture(scope="module")
def whole(forge: Forge, home: Path) -> Path:
    """The run that nothing befell, on two data-parallel ranks, with a checkpoint of every second step."""
    output = home / "whole"
    forge.run(argv(home, output, "--save_steps", "2", "--save_hf_steps", "3"), 2)
    return output


def assert_same_end(output: Path, whole: Path) -> None:
    """Metrics and every tensor of the last checkpoint are those of the run that nothing befell."""
    assert log(output) == log(whole)
    expected, found = tensors(whole / f"checkpoint-{STEPS}"), tensors(output / f"checkpoint-{STEPS}")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def assert_nothing_lost(output: Path, whole: Path, said: str) -> None:
    """All that has the name of a checkpoint or a snapshot is whole; the newest that the run spoke of is there."""
    steps = rundir.committed_steps(output)
    for step in steps:
        rundir.check_files(rundir.checkpoint_dir(output, step))
    told = re.findall(r"^saved (.+/checkpoint-\d+)$", said, re.MULTILINE)
    assert [path for path in told[-1:] if not (Path(path) / rundir.COMMIT).is_file()] == []
    for path in output.glob("hf-*"):
        assert files_of(path) == files_of(whole / path.name)


# -- signals


@pytest.mark.parametrize(("name", "flags"), [("SIGTERM", ()), ("SIGUSR1", ("--async_save", "--save_steps", "1"))])
def test_a_signal_to_one_rank_saves_and_ends_all(
    forge: Forge, home: Path, whole: Path, tmp_path: Path, name: str, flags: tuple[str, ...]
) -> None:
    output = tmp_path / "run"
    fault = {"of": 1, "step": 3, "global_batch_size": 8, "what": name}
    text = forge.run(argv(home, output, *flags), 2, status=3, fault=("at_step", fault))
    assert f"stopped by {name} after step 3 of 6, saved: the same command continues it" in text
    assert rundir.committed_steps(output)[-1] == 3
    assert [path for path in output.iterdir() if path.name.endswith(".partial")] == []
    forge.run(argv(home, output), 2)
    assert_same_end(output, whole)


def test_a_signal_to_the_launcher_is_one_to_all_ranks(home: Path, tmp_path: Path) -> None:
    """The whole chain: launcher, torchrun's agent, ranks; the status comes back through them."""
    output = tmp_path / "run"
    line = command(home, "sft", output, "--train_iters", "100000", "--nproc_per_node", "2", "--tensorboard", "false")
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        end = time.monotonic() + 100
        while not rundir.read_metrics(output) and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        text, _ = process.communicate(timeout=100)
    assert process.returncode == 3, text
    assert "stopped by SIGUSR1 after step" in text
    (step,) = rundir.committed_steps(output)
    assert step == rundir.read_metrics(output)[-1]["step"]


# -- asynchronous saves, retention, snapshots


def test_asynchronous_checkpoints_are_those_of_synchronous_ones(
    forge: Forge, home: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    flags = ("--async_save", "--save_steps", "1", "--save_total_limit", "3")
    text = forge.run(argv(home, output, *flags), 2)
    assert rundir.committed_steps(output) == [4, 5, 6]
    assert all(f"saved {output / f'checkpoint-{step}'}" in text for step in (1, 2, 3, 4, 6))
    assert_same_end(output, whole)
    for name in ("checkpoint-4", "checkpoint-6"):
        rundir.check_files(output / name)
        assert files_of_shards(output / name) == files_of_shards(whole / name)
    other = files_of_shards(output / "checkpoint-5")  # the partner: the copy is of its own step
    assert all(other[name] != data for name, data in files_of_shards(output / "checkpoint-6").items())


def files_of_shards(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp") if path.name != "__objects.distcp"}


SNAPSHOTS = {
    "full-tp2": ("--tensor_model_parallel_size", "2"),
    "tied-bf16-pp2": ("--model", "tied", "--pipeline_model_parallel_size", "2", "--torch_dtype", "bfloat16"),
    "moe-ep2": ("--model", "moe", "--expert_model_parallel_size", "2"),
    "lora-pp2": ("--model", "tied", "--pipeline_model_parallel_size", "2", "--tuner_type", "lora",
                 "--modules_to_save", "embed_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", SNAPSHOTS)
def test_snapshots_are_what_export_makes(forge: Forge, home: Path, tmp_path: Path, case: str) -> None:
    output = tmp_path / "run"
    flags = [str(home / word) if word in ("tied", "moe") else word for word in SNAPSHOTS[case]]
    forge.run(argv(home, output, *flags, "--train_iters", "2", "--save_hf_steps", "1"), 2)
    assert sorted(path.name for path in output.glob("*hf-*")) == ["hf-1", "hf-2"]
    forge.run(["export", "--model", str(output), "--output_dir", str(tmp_path / "exported")])
    exported = files_of(tmp_path / "exported")
    exported.pop("mswift_manifest.json", None)
    assert files_of(output / "hf-2") == exported
    assert any(data != exported[name] for name, data in files_of(output / "hf-1").items())


# -- nan


def test_a_batch_that_is_not_finite_is_skipped_by_all_ranks_or_stops_them(
    forge: Forge, home: Path, tmp_path: Path
) -> None:
    fault = ("at_step", {"of": 1, "step": 3, "global_batch_size": 8, "what": "poison"})
    skipping, stopping = tmp_path / "skip", tmp_path / "stop"
    text = forge.run(argv(home, skipping, "--save_steps", "1", "--nan_policy", "skip"), 2, fault=fault)
    assert "skipped step 3: loss nan" in text
    rows = rundir.read_metrics(skipping)
    assert [row["loss"] is None for row in rows] == [False, False, True, False, False, False]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    states = [tensors(skipping / f"checkpoint-{step}") for step in (2, 3, 4)]
    trained = [name for name in states[0] if not name.startswith("rng.")]
    assert [name for name in trained if states[0][name] != states[1][name]] == []
    assert all(states[1][name] != states[2][name] for name in trained)
    head, *samples = map(json.loads, (skipping / "not-finite-3.jsonl").read_text().splitlines())
    assert (head["step"], head["loss"], len(samples)) == (3, "nan", 8)
    assert [sample["id"] for sample in samples] == head["sample_ids"]
    assert all(len(sample["tokens"]) == len(sample["loss_weights"]) > 1 for sample in samples)

    flags = ("--save_steps", "1", "--async_save")
    text = forge.run(argv(home, stopping, *flags), 2, status=1, fault=fault)
    assert f"the batch is in {stopping / 'not-finite-3.jsonl'}" in text
    assert rundir.committed_steps(stopping) == [1, 2]  # also the one that was under way

    fault[1]["until"] = 20
    flags = ("--nan_policy", "skip", "--train_iters", "20")
    text = forge.run(argv(home, tmp_path / "ruined", *flags), 2, status=1, fault=fault)
    assert "step 13: loss nan" in text
    assert "--nan_policy skip leaves out 10 steps in a row at most" in text


# -- ranks that hang


@pytest.mark.parametrize(("what", "why"), [("sleep", "the others wait for rank 1 (pid {pid} on "),
                                           ("SIGSTOP", "rank 1 does not answer")])  # fmt: skip
def test_a_hung_rank_is_named_with_the_stacks(forge: Forge, home: Path, tmp_path: Path, what: str, why: str) -> None:
    output = tmp_path / "run"
    fault = ("at_step", {"of": 1, "step": 3, "global_batch_size": 8, "what": what})
    started = time.monotonic()
    job = forge.start(argv(home, output, "--distributed_timeout_minutes", "0.05"), 2, fault)
    statuses = job.wait(stragglers=2)
    assert time.monotonic() - started < 60
    assert statuses == [1, 1 if what == "sleep" else -signal.SIGKILL]
    text = job.output(0)
    assert "no progress for 3 s (--distributed_timeout_minutes 0.05)" in text
    assert why.format(pid=job.pids[1]) in text
    (folder,) = output.glob("hang-*")
    assert f"{folder}/rank-N.txt" in text
    written = {path.name: path.read_text() for path in folder.glob("rank-*")}
    assert sorted(written) == (["rank-0.txt", "rank-1.txt"] if what == "sleep" else ["rank-0.txt"])
    assert sorted(path.name for path in folder.glob("flight-*")) == [
        f"flight-{Path(name).stem}.json" for name in sorted(written)
    ]
    assert "train_step" in written["rank-0.txt"]
    if what == "sleep":
        assert "reading data" in text
        assert "faults.py" in written["rank-1.txt"]
        records = [json.loads((folder / f"flight-rank-{rank}.json").read_bytes()) for rank in range(2)]
        under_way = [[entry for entry in record["entries"] if not entry["retired"]] for record in records]
        assert [len(entries) for entries in under_way] == [1, 0]  # rank 0 waits for a rank that reads data
        assert under_way[0][0]["profiling_name"].startswith("gloo:")
    assert read_events(output)[-1]["reason"].startswith("no progress for 3 s")
    assert read_status(output).state == "failed"


# -- full disks


@pytest.mark.parametrize(
    ("flags", "name"), [((), "checkpoint-2"), (("--async_save",), "checkpoint-2"), (("--save_hf_steps", "2"), "hf-2")]
)
def test_a_full_disk_publishes_nothing_and_is_named(
    forge: Forge, home: Path, whole: Path, tmp_path: Path, flags: tuple[str, ...], name: str
) -> None:
    output = tmp_path / "run"
    fault = ("full_disk", {"name": f".{name}.partial", "limit": 100_000})
    text = forge.run(argv(home, output, "--save_steps", "1", *flags), 2, status=1, fault=fault)
    assert f"{output / name} failed on rank 0: the disk is full" in text
    assert rundir.committed_steps(output) == [1]
    assert sorted(path.name for path in output.glob(".*")) == [rundir.LOCK]
    assert list(output.glob("hf-*")) == []
    forge.run(argv(home, output, "--save_steps", "2"), 2)  # with room again
    assert_same_end(output, whole)


# -- damage


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_shard_is_named_and_the_one_before_is_taken_only_when_asked(
    forge: Forge, home: Path, whole: Path, tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "run"
    forge.run(argv(home, output, "--save_steps", "2", "--train_iters", "4"), 2)
    shard = output / "checkpoint-4" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    if damage == "truncated":
        del data[-1]
    else:
        data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    text = forge.run(argv(home, output), 2, status=1)
    assert f"{shard} is damaged" in text
    assert "to go on from checkpoint-2: --damaged_checkpoint previous" in text
    assert rundir.committed_steps(output) == [2, 4]
    text = forge.run(argv(home, output, "--damaged_checkpoint", "previous"), 2)
    assert "set aside as checkpoint-4.damaged-" in text
    assert "continuing after step 2" in text
    (aside,) = output.glob("checkpoint-4.damaged-*")
    assert (aside / shard.name).read_bytes() == data
    assert_same_end(output, whole)


# -- new runs from old weights


def test_weights_only_start_a_new_schedule_and_whole_checkpoints_go_on_elsewhere(
    forge: Forge, home: Path, whole: Path, tmp_path: Path
) -> None:
    old = str(whole / "checkpoint-2")
    new, same, fork = tmp_path / "new", tmp_path / "same", tmp_path / "fork"
    forge.run(argv(home, new, "--resume_from_checkpoint", old, "--load_weights_only", "--train_iters", "2"), 2)
    forge.run(argv(home, same, "--model", old, "--train_iters", "2"), 2)  # the same for a full run
    assert log(new) == log(same)
    assert [row["step"] for row in log(new)] == [1, 2]
    assert tensors(new / "checkpoint-2") == tensors(same / "checkpoint-2")
    flags = ("--resume_from_checkpoint", old)
    forge.run(argv(home, fork, *flags, "--train_iters", "4"), 2)
    forge.run(argv(home, fork, *flags), 2)  # its own checkpoint comes first now
    assert [row["step"] for row in log(fork)] == [3, 4, 5, 6]
    assert tensors(fork / "checkpoint-6") == tensors(whole / "checkpoint-6")
    text = forge.run(argv(home, whole, *flags), status=2)
    assert "lies in --output_dir" in text


def test_adapters_of_an_old_run_start_a_new_one(forge: Forge, home: Path, tmp_path: Path) -> None:
    lora = ("--tuner_type", "lora", "--train_iters", "1")
    old, new, same = tmp_path / "old", tmp_path / "new", tmp_path / "same"
    forge.run(argv(home, old, *lora), 2)
    flags = ("--resume_from_checkpoint", str(old), "--load_weights_only")
    forge.run(argv(home, new, *lora, *flags), 2)
    forge.run(["export", "--model", str(old), "--output_dir", str(tmp_path / "adapter")])
    forge.run(argv(home, same, *lora, "--adapters", str(tmp_path / "adapter")), 2)
    assert log(new) == log(same)
    assert tensors(new / "checkpoint-1") == tensors(same / "checkpoint-1")
    text = forge.run(argv(home, tmp_path / "wrong", *lora, *flags, "--lora_rank", "4"), 2, status=2)
    assert "--lora_rank: the run of this --output_dir has 8, the command means 4" in text
    text = forge.run(argv(home, tmp_path / "wrong", *flags), status=2)
    assert "--tuner_type full" in text


# -- another layout


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2-dp2": (4, ("--tensor_model_parallel_size", "2", "--sequence_parallel")),
    "pp2": (2, ("--pipeline_model_parallel_size", "2")),
    "ep2": (2, ("--expert_model_parallel_size", "2")),
    "one": (1, ()),
}


@pytest.mark.parametrize(
    ("model", "before", "after"), [("model", "tp2-dp2", ("pp2", "one")), ("moe", "ep2", ("tp2-dp2", "one"))]
)
def test_at_another_layout_the_next_five_steps_have_the_same_loss(
    forge: Forge, home: Path, tmp_path: Path, model: str, before: str, after: tuple[str, ...]
) -> None:
    """fp32, to 1e-5; Adam's first updates turn rounding into steps, so the rate is one of real training."""
    base = ("--model", str(home / model), "--lr", "1e-4", "--micro_batch_size", "2", "--train_iters", "8")
    size, layout = LAYOUTS[before]
    forge.run(argv(home, tmp_path / "whole", *base, *layout, "--save_steps", "3"), size)
    expected = rundir.read_metrics(tmp_path / "whole")[3:]
    for name in after:
        size, layout = LAYOUTS[name]
        output = tmp_path / name
        flags = (*base, "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3"))
        forge.run(argv(home, output, *flags, *layout), size)
        found = rundir.read_metrics(output)
        for column in ("step", "consumed_samples", "trained_tokens", "tokens"):
            assert [row[column] for row in found] == [row[column] for row in expected], column
        losses = [[row["loss"] for row in rows] for rows in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=0)
        assert losses[0] != losses[1]  # another order of sums: the comparison is not of a copy


# -- kill -9


def moments() -> list[dict[str, Any]]:
    """Whom, how and when to kill: half of them by time, half by file operation inside a save."""
    generator = random.Random(SEED)
    print(f"MSWIFT_FAULT_SEED={SEED}")
    return [
        {
            "rank": generator.randrange(2),
            "everybody": generator.random() < 0.5,
            "place": generator.random(),
            "late": generator.random() < 0.5,
            "in_save": number % 2 == 0,
            "background": generator.random() < 0.5,
        }
        for number in range(NUM_KILLS)
    ]


def test_kill_9_at_random_moments(forge: Forge, home: Path, whole: Path, tmp_path: Path) -> None:
    flags = ("--save_steps", "2", "--save_hf_steps", "3", "--save_total_limit", "2")
    operations = []
    for rank in range(2):
        record = tmp_path / f"operations-{rank}"
        fault = {"of": rank, "operation": 0, "everybody": False, "record": str(record)}
        started = time.monotonic()
        forge.run(argv(home, tmp_path / f"recorded-{rank}", *flags), 2, fault=("kill_at", fault))
        seconds = time.monotonic() - started
        operations.append(int(record.read_text()))
    assert min(operations) > 50
    for number, moment in enumerate(moments()):
        output = tmp_path / f"run-{number}"
        rank, everybody = moment["rank"], moment["everybody"]
        line = argv(home, output, *flags, *(["--async_save"] if moment["background"] else []))
        if moment["in_save"]:
            last = operations[rank]
            first = last - 20 if moment["late"] else 1  # near the end of a save there is most to go wrong
            fault = {"of": rank, "operation": first + int(moment["place"] * (last - first)), "everybody": everybody}
            job = forge.start(line, 2, ("kill_at", fault))
        else:
            job = forge.start(line, 2)
            time.sleep(moment["place"] * seconds)
            job.kill([0, 1] if everybody else [rank])
        statuses = job.wait(stragglers=20 if moment["in_save"] else 3)  # some wait for a rank that never came
        print(number, moment, statuses, rundir.committed_steps(output))
        assert -signal.SIGKILL in statuses or not moment["in_save"]
        if moment["in_save"] and not everybody:
            assert statuses[1 - rank] == 1
            assert "another rank has ended" in job.output(1 - rank)
        assert_nothing_lost(output, whole, job.output(0))
        forge.run(line, 2)
        assert_same_end(output, whole)
        assert sorted(path.name for path in output.glob(".*")) == [rundir.LOCK]
        assert rundir.committed_steps(output) == [4, 6]
