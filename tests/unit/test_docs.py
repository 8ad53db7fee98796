"""The documentation against the program: every command parses, every file that is named exists."""

import re
import shlex
from pathlib import Path

import pytest

from mswift.cli.commands import COMMANDS, load
from mswift.cli.options import parse
from mswift.config.train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _commands(page: Path) -> list[list[str]]:
    """Arguments of every `mswift COMMAND ...` in the code blocks of a page."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:mswift|-m mswift\.cli\.main) +(.*)", line) for line in lines]
    words = [shlex.split(match[1], comments=True) for match in found if match]
    return [argv for argv in words if argv and argv[0] in COMMANDS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named from here
    recipe = tmp_path / "recipe.yaml"  # the reader's own
    recipe.write_text("model: Qwen3-0.6B\n")
    for name, *argv in _commands(page):
        config = parse(load(COMMANDS[name].config), [str(recipe) if word == recipe.name else word for word in argv])
        if isinstance(config, TrainConfig) and name in ("pt", "sft") and recipe.name not in argv:
            assert config.train_iters or config.num_train_epochs, f"the length of the run is missing: {argv}"


def test_there_are_commands_and_a_wrong_flag_would_be_seen(tmp_path: Path) -> None:
    assert {argv[0] for page in PAGES for argv in _commands(page)} == set(COMMANDS)
    page = tmp_path / "page.md"
    page.write_text("```\nsrun mswift sft --modle x \\\n    --lr 1\n```\n")
    assert _commands(page) == [["sft", "--modle", "x", "--lr", "1"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_named_file_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = [ROOT / name for name in re.findall(r"\b((?:tests|configs|benchmarks)/[\w./-]+\.\w+)", text)]
    assert [str(path) for path in (*links, *named) if not path.exists()] == []
