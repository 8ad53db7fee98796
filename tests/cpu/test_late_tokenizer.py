"""A tokenizer that is not loaded before it is needed gives what a loaded one gives."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mswift.data.late_tokenizer import LateTokenizer, facts_path
from mswift.data.tokenizer import late_tokenizer, load_tokenizer, pad_token_id, tokenizer_identity
from tests.support.commands import command, make_home
from tests.support.server import ENVIRON, ROOT
from tests.support.tiny import tiny_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    tiny_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def known(model: Path, cache: Path) -> LateTokenizer:
    """One that the cache knows."""
    late_tokenizer(model, cache)
    found = late_tokenizer(model, cache)
    assert isinstance(found, LateTokenizer)
    return found


def test_what_is_known_is_what_the_loaded_one_says(model: Path, tmp_path: Path) -> None:
    first = late_tokenizer(model, tmp_path / "cache")
    assert not isinstance(first, LateTokenizer)
    late = known(model, tmp_path / "cache")
    assert tokenizer_identity(late) == tokenizer_identity(load_tokenizer(model))
    assert pad_token_id(late) == AutoTokenizer.from_pretrained(model).pad_token_id
    assert late.facts is not None  # and nothing was loaded for it


def test_the_rest_is_transformers_own(model: Path, tmp_path: Path) -> None:
    late, own = known(model, tmp_path / "cache"), AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "a word"}]
    assert late.apply_chat_template(messages, tokenize=True) == own.apply_chat_template(messages, tokenize=True)
    assert late.facts is None
    assert (len(late), late(["ab"])["input_ids"]) == (len(own), own(["ab"])["input_ids"])
    for copied in (copy.copy(late), copy.deepcopy(late)):
        assert type(copied) is type(own)


def test_another_chat_template_makes_it_another_tokenizer(model: Path, tmp_path: Path) -> None:
    late, own = known(model, tmp_path / "cache"), load_tokenizer(model)
    before = tokenizer_identity(late)
    late.chat_template = own.chat_template = "{{ messages[0]['content'] }}"
    assert tokenizer_identity(late) == tokenizer_identity(own) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"])
def test_other_files_are_another_tokenizer(model: Path, tmp_path: Path, name: str) -> None:
    known(model, tmp_path / "cache")
    path = model / name
    path.write_text((path.read_text() if path.is_file() else "{}") + "\n")
    assert not isinstance(late_tokenizer(model, tmp_path / "cache"), LateTokenizer)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"facts": {"identity": {}, "pad_token_id": 3}, "hash": "0"}'])
def test_damaged_facts_are_found_again(model: Path, tmp_path: Path, damage: bytes) -> None:
    expected = pad_token_id(known(model, tmp_path / "cache"))
    facts_path(tmp_path / "cache", model).write_bytes(damage)
    again = late_tokenizer(model, tmp_path / "cache")
    assert not isinstance(again, LateTokenizer)
    assert pad_token_id(known(model, tmp_path / "cache")) == pad_token_id(again) == expected


SECOND_START = """
import sys
from mswift.cli.main import main
status = main(sys.argv[1:])
print("status", status, "transformers" in sys.modules, "megatron.core" in sys.modules)
"""


def test_a_run_that_goes_on_imports_no_transformers(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    said = []
    for steps in (1, 2):
        argv = command(home, "sft", tmp_path / "run", "--train_iters", str(steps), "--tensorboard", "false")[3:]
        environ = ENVIRON | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", SECOND_START, *argv], env=environ, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines()[-1])
    assert said == ["status 0 True True", "status 0 False True"]
