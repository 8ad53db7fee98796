"""A tokenizer that is loaded when it is needed. A run that starts again on tokens that are written already needs none.

What such a start asks of it is kept in the cache folder, under the hash of the tokenizer's files and of the libraries'
versions. Loading one takes more than a second, nearly all of it imports.
"""

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mswift.data.hashing import content_hash, file_hash

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".merges")
_LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "mswift")
_FORMAT = 1


@dataclass(frozen=True)
class Facts:
    """What is known of a tokenizer without loading it."""

    identity: dict[str, str]
    """See mswift.data.tokenizer.tokenizer_identity."""
    pad_token_id: int


class LateTokenizer:
    """Stands for the tokenizer that `load` returns, and loads it at the first use of anything that `facts` lack."""

    def __init__(self, load: Callable[[], Any], facts: Facts) -> None:
        vars(self).update(_load=load, _facts=facts, _loaded=None)

    @property
    def facts(self) -> Facts | None:
        """None once it is loaded: it may have been changed since."""
        return self._facts if self._loaded is None else None

    def real(self) -> Any:
        """The tokenizer itself."""
        if self._loaded is None:
            vars(self)["_loaded"] = self._load()
        return self._loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real(), name, value)

    def __len__(self) -> int:
        return len(self.real())

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.real()(*args, **options)

    def __reduce__(self) -> Any:
        return _itself, (self.real(),)  # another process gets the tokenizer


def _itself(tokenizer: Any) -> Any:
    return tokenizer


def facts_path(cache_dir: Path, directory: Path) -> Path:
    """Where the facts of the tokenizer in `directory` are kept; OSError where its files cannot be read."""
    folders = (directory, directory / "additional_chat_templates")
    files = (path for folder in folders for path in folder.glob("*") if path.suffix in _SUFFIXES and path.is_file())
    parts = {
        "format": _FORMAT,
        "files": {str(path.relative_to(directory)): file_hash(path) for path in sorted(files)},
        "versions": {name: _version(name) for name in _LIBRARIES},
    }
    return cache_dir / "tokenizers" / f"{content_hash(parts)[:40]}.json"


def read_facts(path: Path) -> Facts | None:
    """None where there are none, or damaged ones."""
    try:
        kept = json.loads(path.read_bytes())
        facts = Facts(**kept["facts"])
        return facts if kept["hash"] == content_hash(asdict(facts)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_facts(path: Path, facts: Facts) -> None:
    """Whole or not at all. A folder that cannot be written costs the next start its time, nothing else."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps({"facts": asdict(facts), "hash": content_hash(asdict(facts))}))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
