"""The `mswift` command. Only the standard library is imported until a subcommand is known."""

import difflib
import inspect
import os
import sys
import traceback
from collections.abc import Sequence

from mswift import __version__
from mswift.cli.commands import COMMANDS, Command, load
from mswift.errors import ConfigError, MswiftError
from mswift.startup import quiet_advice

_EXIT_STATUS = (
    "Exit status: 0 done, 1 the check or the job failed, 2 the command was wrong,\n"
    "3 a signal stopped the run after it saved."
)
_WIDTH = 76  # of an example line
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it
_INTERRUPTED = 130  # 128 + SIGINT


def console() -> None:
    """Entry point of the `mswift` script."""
    try:
        status = main(sys.argv[1:])
    except Exception:  # our own bug: the traceback is the report
        traceback.print_exc()
        status = 1
    if status and _rank() is not None:
        # Interpreter shutdown would wait for peers that wait for this rank; leaving at once lets them fail.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit status. User errors are one message."""
    name = argv[0] if argv else ""
    try:
        return _run(argv)
    except (MswiftError, OSError, KeyboardInterrupt) as error:
        if os.environ.get("MSWIFT_TRACEBACK") == "1":
            raise
        return _report(name if name in COMMANDS else "", error)


def _run(argv: Sequence[str]) -> int:
    name, *rest = argv or ("--help",)
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"mswift {__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(_unknown(name))
    from mswift.cli import options  # imports tyro: only when a command is known

    command = COMMANDS[name]
    config_class = load(command.config)
    if options.wants_help(rest):
        options.print_help(config_class, name, _description(command, config_class))
        return 0
    config = options.parse(config_class, rest)
    quiet_advice()
    return int(load(command.run)(config))


def _report(command: str, error: BaseException) -> int:
    """Print what went wrong on stderr; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    where = "" if _rank() is None else f" [rank {_rank()}]"
    text = str(error).encode(errors="backslashreplace").decode()  # a name in a file may hold half a character
    print(f"mswift{' ' * bool(command)}{command}{where}: {text}", file=sys.stderr)
    return error.exit_status if isinstance(error, MswiftError) else 1


def _rank() -> str | None:
    """This process's rank in a job of several, as torchrun or SLURM say it."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and os.environ.get(size, "1") != "1":
            return os.environ[rank]
    return None


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"the commands are {' '.join(COMMANDS)}"
    return f"unknown {'flag' if name.startswith('-') else 'command'} {name!r}; {hint}"


def _overview() -> str:
    rows = "\n".join(f"  {name:<9}{command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: mswift COMMAND [RECIPE.yaml] [--flag value ...]\n\n"
        "Train Hugging Face models on Megatron-core, and take them back.\n\n"
        f"commands:\n{rows}\n\n"
        "mswift COMMAND --help shows its flags; mswift --version shows the version.\n"
        "A recipe is a YAML file of the same names; flags win over it. A bare flag means true.\n"
        "Add --dry_run --world_size N to pt or sft to see what would run, without running it.\n\n"
        f"example:\n{_example(COMMANDS['sft'])}\n\n{_EXIT_STATUS}"
    )


def _description(command: Command, config_class: type) -> str:
    return f"{inspect.cleandoc(config_class.__doc__ or '')}\n\nexample:\n{_example(command)}\n\n{_EXIT_STATUS}"


def _example(command: Command) -> str:
    """The example, broken before flags as a shell accepts it."""
    words = command.example.replace(" --", "\n--").split("\n")
    lines = ["  " + words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > _WIDTH:
            lines[-1] += " \\"
            lines.append("      " + word)
        else:
            lines[-1] += " " + word
    return "\n".join(lines)


if __name__ == "__main__":
    console()
