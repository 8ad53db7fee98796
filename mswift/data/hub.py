"""Data sets of the Hugging Face hub, through `datasets`: downloaded once, then read from its cache, also offline."""

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from mswift.data.arrow import batch_rows, require_module
from mswift.errors import ConfigError

_BATCH_ROWS = 256
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def hub_rows(name: str, subset: str | None, flag: str) -> Iterator[dict[str, Any]]:
    """Rows of the split train of `name` (configuration `subset`, `subset/split` for another split), undecoded."""
    for batch in _split(name, subset, flag).data.to_batches(max_chunksize=_BATCH_ROWS):
        yield from batch_rows(batch)


def hub_num_rows(name: str, subset: str | None, flag: str) -> int:
    """Number of rows of the split."""
    return int(_split(name, subset, flag).num_rows)


def hub_fingerprint(name: str, subset: str | None, flag: str) -> str:
    """What `datasets` calls the version of the split."""
    return str(_split(name, subset, flag)._fingerprint)


@lru_cache(maxsize=8)
def _split(name: str, subset: str | None, flag: str) -> Any:
    spec = name if subset is None else f"{name}:{subset}"
    library = require_module("datasets", f"{flag} {spec}: there is no such file, and as a hub data set it")
    configuration, _, split = (subset or "").partition("/")
    try:
        found = library.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # whatever `datasets`, its loaders and the network raise
        offline = [variable for variable in _OFFLINE if os.environ.get(variable, "0").lower() in ("1", "true", "yes")]
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = (
            f"{offline[0]} is set: fetch it once where there is a network (hf download --repo-type dataset {name} "
            "--local-dir DIR) and name DIR"
            if offline
            else "check its name, or name a file"
        )
        raise ConfigError(
            f"{flag} {spec}: there is no such file, and the hub data set cannot be loaded ({reason}); {remedy}"
        ) from error
    if found._indices is not None:
        found = found.flatten_indices()
    return found
