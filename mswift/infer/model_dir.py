"""Is this a directory that `mswift infer` can load, and if not, which command makes one of it. Torch-free."""

from pathlib import Path

from mswift.converters.catalog import what_it_is
from mswift.data.tokenizer import check_tokenizer_files
from mswift.errors import ConfigError


def check_model_dir(path: Path, flag: str = "--model") -> None:
    """Refuse what is not a Hugging Face model directory with a tokenizer; the message names the remedy.

    Raises ConfigError.
    """
    if not path.is_dir():
        what = "this is a file" if path.exists() else "no such directory"
        raise ConfigError(f"{flag} {path}: {what} (mswift reads local Hugging Face directories)")
    if not (path / "config.json").is_file():
        raise ConfigError(f"{flag} {path}: no config.json; " + what_it_is(path))
    check_tokenizer_files(path, flag)
