"""The command line as a user meets it: what it prints, what it imports, one line per mistake, exit statuses."""

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from mswift.cli.commands import COMMANDS, load
from mswift.cli.main import main
from mswift.cli.options import parse
from mswift.config.train import PtConfig, SftConfig
from mswift.errors import CheckpointError, ConfigError


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def _mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that must exit with 2."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line, end = captured.err.split("\n", 1)
    assert end == ""
    return line


def _children_seconds() -> float:
    """Processor seconds of the children so far: what an idle machine's clock shows, on a busy one too."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_answers_quickly_and_imports_little() -> None:
    seconds = []
    for _ in range(5):
        start = _children_seconds()
        result = subprocess.run([sys.executable, "-m", "mswift.cli.main", "--help"], capture_output=True, check=True)
        seconds.append(_children_seconds() - start)
    assert all(name in result.stdout.decode() for name in COMMANDS)
    assert statistics.median(seconds) < 0.3
    result = _python(
        "import sys; from mswift.cli.main import main; main(['--help'])\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'tyro') if m in sys.modules], file=sys.stderr)"
    )
    assert result.stderr.strip() == "[]"


def test_the_package_is_a_program_too() -> None:
    """`python -m mswift` is what people type where the script is not on the PATH."""
    said = [
        subprocess.run([sys.executable, "-m", module, "nothing"], capture_output=True, text=True, check=False)
        for module in ("mswift", "mswift.cli.main")
    ]
    assert said[0].stderr.startswith("mswift: unknown command 'nothing'")
    assert (said[0].stderr, said[0].returncode) == (said[1].stderr, 2)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_never_imports_torch(name: str) -> None:
    result = _python(
        f"import sys; from mswift.cli.main import main; status = main([{name!r}, '--help'])\n"
        "print(status, [m for m in ('torch', 'transformers', 'megatron') if m in sys.modules], file=sys.stderr)"
    )
    assert result.stderr.strip() == "0 []"
    assert "Exit status: 0 done" in result.stdout
    assert f"mswift {name} " in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_parses(name: str) -> None:
    import shlex

    program, command, *argv = shlex.split(COMMANDS[name].example)
    assert (program, command) == ("mswift", name)
    parse(load(COMMANDS[name].config), argv)


def test_every_field_of_every_command_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS.values():
        config_class = load(command.config)
        assert config_class.__doc__ is not None
        source = Path(sys.modules[config_class.__module__].__file__ or "").read_text()
        lines = [line.strip() for line in source.splitlines()]
        for name in config_class.__dataclass_fields__:
            at = [index for index, line in enumerate(lines) if line.startswith(f"{name}: ")]
            for index in at:
                end = next(i for i in range(index, len(lines)) if lines[i].startswith('"""'))
                assert end - index <= 2, f"{config_class.__name__}.{name} has no docstring"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mswift 0.")


MISTAKES = {
    ("sfft",): "unknown command 'sfft'; did you mean sft?",
    ("--verson",): "unknown flag '--verson'",
    ("sft", "--modle", "x"): "unknown flag --modle; did you mean --model?",
    ("sft", "--lora-rnk", "8"): "unknown flag --lora-rnk; did you mean --lora_rank?",
    ("sft", "--train_type", "lora"): "unknown flag --train_type; here that is --tuner_type",
    ("sft", "--warmup-ratio", "0.1"): "unknown flag --warmup-ratio; here that is --lr_warmup_iters (steps)",
    ("infer", "--train_type", "lora"): "unknown flag --train_type",
    (
        "sft",
        "--model",
        "m",
        "--tuner_type",
        "qlora",
    ): "; here that is --tuner_type lora --quant_method bnb",
    ("sft",): "--model is required",
    ("sft", "--model"): "--model needs a value",
    ("sft", "--model", "m", "--lora_rank", "eight"): "--lora_rank eight: it takes a whole number",
    ("sft", "--model", "m", "--tuner_type", "lra"): "--tuner_type lra: it takes full or lora or longlora",
    ("sft", "--model", "m", "--tuner_type", "ia33"): "vblora or vera; did you mean ia3?",
    ("sft", "--model", "m", "--train_iters", "1.5"): "--train_iters 1.5: it takes a whole number or none",
    ("sft", "--model", "m", "--sequence_parallel", "yes"): "--sequence_parallel yes: it takes true or false",
    ("sft", "--model", "m", "--sequence_parallel=yes"): "--sequence_parallel yes: it takes true or false",
    ("sft", "--model", "m", "--lr", "1", "--learning-rate", "2"): "--lr and --learning-rate are the same option",
    ("sft", "recipe.yaml", "--model", "m"): "there is no recipe 'recipe.yaml'",
    ("sft", "tuner.yml"): "there is no recipe 'tuner.yml'",
    ("sft", "--config", "recipe.yaml"): "unknown flag --config; here that is RECIPE.yaml without a flag",
    ("pt", "--model", "m", "--loss-scale", "all"): "unknown flag --loss-scale; mswift sft has it",
    ("sft", "--model", "m", "--data_path", "a"): "unknown flag --data_path; mswift pt has it",
    ("sft", "model", "m"): "'model' is neither a recipe file nor a --flag; did you mean --model?",
    ("doctor",): "1 argument is needed (CHECK), 0 given; CHECK is layout or machine",
    ("doctor", "layot"): "CHECK layot: it takes layout or machine; did you mean layout?",
    ("status",): "1 argument is needed (RUN_DIR), 0 given",
    ("verify",): "1 to 2 arguments are needed (A [B]), 0 given",
    ("verify", "--a", "b"): "unknown flag --a",
    ("convert", "--model", "m", "--to", "onnx", "--output_dir", "d"): "--to onnx: it takes megatron or hf",
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.items(), ids=map(" ".join, MISTAKES))
def test_a_mistake_is_one_line(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = _mistake(capsys, *argv)
    assert line.startswith("mswift")
    assert message in line


def _sft(*argv: str) -> SftConfig:
    return parse(SftConfig, ["--model", "m", *argv])


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--sequence_parallel"], True),
        (["--sequence-parallel", "TRUE"], True),
        (["--sequence_parallel", "false"], False),
        (["--sequence_parallel=False"], False),
        (["--sequence_parallel", "--no-such"], None),
        (["--sequence_parallel", "true", "--sequence_parallel", "false"], False),
        ([], False),
    ],
)
def test_a_bare_flag_means_true(argv: list[str], value: bool | None) -> None:
    if value is None:
        with pytest.raises(ConfigError, match="unknown flag --no-such"):
            _sft(*argv)
    else:
        assert _sft(*argv).sequence_parallel is value


def test_values_of_every_kind() -> None:
    config = _sft("--dataset", "a#5", "b", "--lr", "1e-4", "--min_lr", "-0", "--train_iters", "7", "--system", "")
    assert (config.dataset, config.lr, config.min_lr, config.train_iters) == (("a#5", "b"), 1e-4, 0.0, 7)
    assert config.system == ""
    assert _sft("--weight_decay", "-1e-3").weight_decay == -1e-3
    assert _sft("--system=--quiet").system == "--quiet"
    assert _sft("--torch_dtype", "none").torch_dtype is None
    assert _sft("--dataset", "a", "--dataset", "b").dataset == ("b",)
    assert _sft("--learning-rate", "3").lr == 3
    assert parse(PtConfig, ["--model=m=n"]).model == "m=n"


def test_a_recipe_lies_under_the_flags(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\nlearning-rate: 1e-4\nlora_rank: 4\ndataset: [a, b#3]\nsequence_parallel: true\n")
    config = parse(SftConfig, [str(recipe), "--lr", "2", "--dataset", "c"])
    assert (config.model, config.lr, config.lora_rank, config.dataset) == ("m", 2, 4, ("c",))
    assert config.sequence_parallel is True
    assert parse(SftConfig, ["--sequence_parallel", str(recipe)]).dataset == ("a", "b#3")


class _Raise:
    """A command that fails with a given error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, config: object) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ConfigError("--tp 3 is wrong"), 2, "mswift verify: --tp 3 is wrong\n"),
        (CheckpointError("a is damaged"), 1, "mswift verify: a is damaged\n"),
        (OSError(28, "No space left on device", "x"), 1, "mswift verify: [Errno 28] No space left on device: 'x'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_a_message_and_a_status(
    error: BaseException,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MSWIFT_TRACEBACK", raising=False)
    monkeypatch.setattr(
        "mswift.cli.main.load", lambda reference: _Raise(error) if ":v" in reference else load(reference)
    )
    assert main(["verify", "a", "b"]) == status
    assert capsys.readouterr().err == text
    monkeypatch.setenv("MSWIFT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["verify", "a", "b"])


@pytest.mark.parametrize(("mode", "status"), [("bug", 1), ("ConfigError", 2), ("fine", 0)])
def test_a_rank_that_fails_leaves_at_once(mode: str, status: int) -> None:
    code = (
        "import sys, threading, time\n"
        "from mswift.cli import main as cli\n"
        "from mswift.errors import ConfigError\n"
        "def run(config):\n"
        f"    if {mode!r} != 'fine':\n"
        "        threading.Thread(target=time.sleep, args=(50,)).start()  # shutdown would wait for it\n"
        f"        raise {{'bug': ZeroDivisionError, 'ConfigError': ConfigError}}[{mode!r}]('why')\n"
        "    return 0\n"
        "load = cli.load\n"
        "cli.load = lambda reference: run if 'commands:' in reference else load(reference)\n"
        "sys.argv = ['mswift', 'verify', 'a', 'b']\n"
        "cli.console()\n"
    )
    environ = {**os.environ, "RANK": "3", "WORLD_SIZE": "4"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False, env=environ)
    assert result.returncode == status
    messages = {"bug": "ZeroDivisionError: why", "ConfigError": "mswift verify [rank 3]: why", "fine": ""}
    assert result.stderr.strip().split("\n")[-1] == messages[mode]
