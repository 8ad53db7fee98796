"""What is published: the wheel holds the modules of the tree under `mswift`; each folder answers to that name only."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("converters", "parallel", "launchers")


def _modules(folder: Path) -> set[str]:
    """Paths of the *.py files below `folder`, links followed."""
    found = (Path(at) / name for at, _, names in os.walk(folder, followlinks=True) for name in names)
    return {path.relative_to(folder.parent).as_posix() for path in found if path.suffix == ".py"}


def test_the_wheel_holds_the_tree_and_nothing_generic(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("mswift", "slurm", *FOLDERS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=tree, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == _modules(tree / "mswift")
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mswift"}
    assert "mswift/py.typed" in names
    assert "mswift/converters/families/llama.py" in names
    page = ROOT / "mswift" / "infer" / "app" / "page"
    assert {name for name in names if name.startswith("mswift/infer/app/page/")} == {
        f"mswift/infer/app/page/{path.name}" for path in page.iterdir()
    }
    assert {name for name in names if name.startswith("mswift/slurm/")} == {
        f"mswift/slurm/{path.name}" for path in (ROOT / "slurm").iterdir()
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_refuses_any_other_name(folder: str) -> None:
    result = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"import this package as mswift.{folder}" in result.stderr
    assert Path(ROOT / "mswift" / folder).readlink() == Path("..") / folder


def test_every_module_has_its_row_in_the_import_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = settings["tool"]["importlinter"]["contracts"][0]
    assert contract["type"] == "layers"
    listed = {name.strip(" ()") for row in contract["layers"] for name in row.replace("|", ":").split(":")}
    packages = {
        "mswift.converters": ROOT / "converters",
        "mswift.parallel": ROOT / "parallel",
        "mswift": ROOT / "mswift",
    }
    entries = {
        f"{package}.{path.stem}"
        for package, folder in packages.items()
        for path in folder.iterdir()
        if not path.stem.startswith(("_", ".")) and (path.suffix == ".py" or (path / "__init__.py").is_file())
    }
    rowless = {"mswift.converters", "mswift.parallel"}  # their children have rows
    assert entries - rowless <= listed, f"give {sorted(entries - rowless - listed)} a row in pyproject.toml"
