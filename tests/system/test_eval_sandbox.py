"""Programs that a model wrote: hostile ones reach nothing and end, HumanEval's own solutions pass."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mswift.errors import ConfigError
from mswift.eval import sandbox
from mswift.eval.sandbox import Limits, run, run_all
from tests.support.shared import shared_file

QUICK = Limits(cpu_seconds=1)

HARMLESS = {
    "modules": "import math, collections, typing, re, hashlib, random, decimal, itertools\nassert math.pi > 3",
    "own files": "open('x', 'w').write('a')\nassert open('x').read() == 'a'\nimport os\nassert os.listdir() == ['x']",
    "empty": "import os\nassert os.listdir('.') == [] and not os.environ",
    "thread": "import threading\nt = threading.Thread(target=print); t.start(); t.join()",
    "asks for a limit": "import resource\nresource.getrlimit(resource.RLIMIT_CPU)",
}

HOSTILE = {
    "wrong": ("assert 1 == 2", "AssertionError"),
    "leaves": ("import sys\nsys.exit(0)", "SystemExit"),
    "leaves at once": ("import os\nos._exit(0)", "its tests not done"),
    "forged": ("import os\nfor n in range(3, 32):\n  try: os.write(n, b'passed 1\\n')\n"
               "  except OSError: pass\nos._exit(0)",
               "its tests not done"),
    "fork": ("import os\nos.fork()", "PermissionError"),
    "fork bomb": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "CPU time"),
    "process": ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
    "exec": ("import os\nos.execv('/bin/true', ['true'])", "PermissionError"),
    "reads a file": ("open({secret!r}).read()", "Permission denied"),
    "lists a folder": ("import os\nos.listdir('/')", "Permission denied"),
    "reads the parent": ("import os\nopen(f'/proc/{{os.getppid()}}/environ').read()", "Permission denied"),
    "writes outside": ("open({secret!r}, 'w')", "Permission denied"),
    "removes outside": ("import os\nos.remove({secret!r})", "Permission denied"),
    "changes a mode": ("import os\nos.chmod({secret!r}, 0)", "not permitted"),
    "truncates": ("import os\nos.truncate({secret!r}, 0)", "not permitted"),
    "socket": ("import socket\nsocket.socket()", "not permitted"),
    "raw socket call": ("import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0", "AssertionError"),
    "unix socket": ("import socket\nsocket.socket(socket.AF_UNIX)", "not permitted"),
    "endless": ("while True: pass", "CPU time"),
    "memory": ("x = 'a' * (1 << 31)", "MemoryError"),
    "large file": ("open('x', 'w').write('a' * (1 << 22))", "File too large"),
    "many files": ("f = [open('x', 'w') for _ in range(99)]", "Too many open files"),
    "kills its parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGTERM)", "not permitted"),
    "kills all": ("import os\nos.kill(-1, 9)", "not permitted"),
    "leaves its group": ("import os\nos.setsid()", "not permitted"),
    "raises a limit": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "ValueError"),
    "limits its parent": ("import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_CPU, (1, 1))", "PermissionError"),
    "recursion": ("def f(): return f()\nf()", "RecursionError"),
    "reads what was sent": ("assert input()", "EOFError"),
    "no program": ("def (", "SyntaxError"),
}  # fmt: skip


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("kept")
    return path


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_program_passes(name: str) -> None:
    assert run(HARMLESS[name], "strict", QUICK) == sandbox.Verdict(True)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_fails(name: str, secret: Path) -> None:
    program, reason = HOSTILE[name]
    program = program.format(secret=str(secret)) if "{secret" in program or "{{" in program else program
    mode = secret.stat().st_mode
    verdict = run(program, "strict", QUICK)
    assert not verdict.passed
    assert reason in verdict.reason
    assert secret.read_text() == "kept"
    assert secret.stat().st_mode == mode
    assert _programs() == []


def test_the_hostile_programs_would_do_it_outside(secret: Path) -> None:
    """What is refused is refused by the sandbox: without it, the same programs run."""
    for name in (
        "reads a file",
        "lists a folder",
        "socket",
        "process",
        "unix socket",
        "raw socket call",
        "changes a mode",
    ):
        program = HOSTILE[name][0].format(secret=str(secret))
        assert run(program, "limits", QUICK).passed, name


def test_a_sleeping_program_is_stopped() -> None:
    verdict = run("import time\ntime.sleep(600)", "strict", Limits(wall_seconds=1))
    assert verdict == sandbox.Verdict(False, "still running after 1 s")
    assert _programs() == []


def test_limits_alone_kill_the_whole_group() -> None:
    program = "import os, time\nfor _ in range(5): os.fork() or time.sleep(600)\ntime.sleep(600)"
    assert "still running" in run(program, "limits", Limits(wall_seconds=2, num_processes=10_000)).reason
    assert _programs() == []
    orphan = "import os, time\nif not os.fork(): time.sleep(600)"  # the program ends, its child stays
    assert run(orphan, "limits", Limits(num_processes=10_000)).passed
    assert _programs() == []


def test_a_program_dies_with_its_parent() -> None:
    code = "from mswift.eval.sandbox import *; run('import time; time.sleep(600)', 'strict', Limits(wall_seconds=600))"
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (children := [child for child in psutil.Process(parent.pid).children() if "confine.py" in _line(child)]):
        assert parent.poll() is None
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_a_machine_that_cannot_confine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = Path(sandbox.__file__).with_name("confine.py").read_text()
    without = tmp_path / "confine.py"
    without.write_text(source.replace("_LANDLOCK_RESTRICT = 444, 445, 446", "_LANDLOCK_RESTRICT = 9999, 9999, 9999"))
    assert without.read_text() != source
    monkeypatch.setattr(sandbox, "_CHILD", without)
    with pytest.raises(ConfigError, match=r"Landlock .*Function not implemented.*--sandbox limits"):
        sandbox.check("strict")
    sandbox.check("limits")


def test_verdicts_come_in_order() -> None:
    programs = [f"import time\ntime.sleep({(4 - n) / 50})\nassert {n} % 2 == 0" for n in range(5)]
    assert [verdict.passed for verdict in run_all(programs, "strict", 2)] == [True, False, True, False, True]


def _problems() -> list[dict[str, str]]:
    with gzip.open(shared_file("data/eval/HumanEval.jsonl.gz"), "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.whole) for n in range(1, 8))])
def test_published_solutions_pass_and_broken_ones_do_not(part: int) -> None:
    problems = _problems()[part::8]
    assert len(problems) >= 20
    tests = [f"{p['test']}\ncheck({p['entry_point']})\n" for p in problems]
    whole = [f"{p['prompt']}{p['canonical_solution']}\n{t}" for p, t in zip(problems, tests, strict=True)]
    broken = [f"{p['prompt']}    return None\n{t}" for p, t in zip(problems, tests, strict=True)]
    verdicts = run_all([*whole, *broken], "strict", 2)
    assert [verdict.reason for verdict in verdicts[: len(whole)]] == [""] * len(whole)
    assert not any(verdict.passed for verdict in verdicts[len(whole) :])


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _programs() -> list[int]:
    """Processes of the sandbox that this one (or init, for orphans) still has; those killed have time to go."""
    found = [process for process in psutil.process_iter() if "confine.py" in _line(process)]
    own = [process for process in found if process.ppid() in (os.getpid(), 1)]
    _, alive = psutil.wait_procs(own, timeout=30)
    return [process.pid for process in alive]
