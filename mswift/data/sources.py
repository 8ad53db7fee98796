"""One item of --dataset -> the files or the hub data set that it names.

`PATH`, `PATH#N` (N of its rows), `PATH:SUBSET`, `PATH:SUBSET#N`. A path that exists literally wins over '#N' and
':SUBSET'. PATH is a file, a folder (all files in it and below, sorted), a folder of `Dataset.save_to_disk`, or, where
nothing has that path, the name of a hub data set, `owner/name`. SUBSET is a sub-folder or the stem of the files of a
folder, a split of a saved DatasetDict, or `configuration[/split]` of a hub data set. Nothing is read here.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mswift.data.arrow import saved_dataset_files
from mswift.data.formats import ARROW_SUFFIXES, COMPRESSIONS, TEXT_SUFFIXES, Record, count_rows, format_of, read_file
from mswift.errors import ConfigError

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class LocalFile:
    """One file of a source."""

    path: Path

    @property
    def name(self) -> str:
        """As summaries call it."""
        return self.path.name

    def records(self) -> Iterator[Record]:
        """Its rows."""
        return read_file(self.path)

    def num_rows(self) -> int:
        """Number of records."""
        return count_rows(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubSplit:
    """One split of a hub data set."""

    name: str
    subset: str | None
    flag: str

    def records(self) -> Iterator[Record]:
        """Its rows."""
        from mswift.data.hub import hub_rows

        for number, row in enumerate(hub_rows(self.name, self.subset, self.flag), start=1):
            yield Record(number, f"{self}, row {number}", row)

    def num_rows(self) -> int:
        """Number of records."""
        from mswift.data.hub import hub_num_rows

        return hub_num_rows(self.name, self.subset, self.flag)

    def __str__(self) -> str:
        return self.name if self.subset is None else f"{self.name}:{self.subset}"


Part = LocalFile | HubSplit


@dataclass(frozen=True)
class Source:
    """One item of --dataset."""

    spec: str
    """As it was given."""
    parts: tuple[Part, ...]
    count: int | None
    """Rows asked for; None: all."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The local files."""
        return tuple(part.path for part in self.parts if isinstance(part, LocalFile))


def parse_source(spec: str, flag: str = "--dataset") -> Source:
    """What `spec` names. ConfigError names the flag and what would work."""
    readings = list(_readings(spec))
    for name, subset, count in readings:
        path = Path(name).expanduser()
        if path.exists():
            rows = _count(count, f"{flag} {spec}", name if subset is None else f"{name}:{subset}")
            return Source(spec, tuple(LocalFile(file) for file in _files(path, subset, flag)), rows)
    for name, subset, count in readings[::-1]:
        if _HUB_NAME.fullmatch(name) and not _looks_like_a_file(name):
            rows = _count(count, f"{flag} {spec}", name if subset is None else f"{name}:{subset}")
            return Source(spec, (HubSplit(name, subset, flag),), rows)
    path = Path(next((name for name, subset, count in readings if subset is None and count is not None), spec))
    raise ConfigError(f"{flag} {spec}: there is no file {path}{_nearest(path.expanduser())}")


def beside(spec: str, folder: Path) -> str:
    """`spec` as a file in `folder` means it: paths are relative to that; the name of a hub data set stays."""
    there = str(folder / Path(spec).expanduser())
    here = any((folder / Path(name).expanduser()).exists() for name, *_ in _readings(spec))
    hub = any(_HUB_NAME.fullmatch(name) and not _looks_like_a_file(str(folder / name)) for name, *_ in _readings(spec))
    return spec if hub and not here else there


def _readings(spec: str) -> Iterator[tuple[str, str | None, str | None]]:
    """(path, subset, count) as `spec` can be read, the most literal first."""
    found = re.fullmatch(r"(.+)#([^#/]*)", spec)
    whole: list[tuple[str, str | None]] = [(spec, None), *([(found[1], found[2])] if found else [])]
    for name, count in whole:
        yield name, None, count
    for name, count in whole:
        if split := re.fullmatch(r"(.+):([^:]+)", name):
            yield split[1], split[2], count


def _count(text: str | None, given: str, base: str) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise ConfigError(f"{given}: '#{text}' must be a number of rows from 1: {base}#100")
    return int(text)


def _files(path: Path, subset: str | None, flag: str) -> tuple[Path, ...]:
    if not path.is_dir():
        if subset is not None:
            raise ConfigError(f"{flag} {path}:{subset}: a file has no subsets; leave :{subset} out")
        if format_of(path) is None:
            raise ConfigError(f"{flag} {path}: '{''.join(path.suffixes[-2:])}' is not read; accepted: {_accepted()}")
        return (path,)
    if (saved := saved_dataset_files(path, subset, flag)) is not None:
        return saved
    files = sorted(file for file in path.rglob("*") if file.is_file() and _is_data(file.relative_to(path)))
    if subset is not None:
        files = [file for file in files if _in_subset(file.relative_to(path), subset)]
    if not files:
        what = f"{path}:{subset}" if subset is not None else str(path)
        raise ConfigError(f"{flag} {what}: the folder holds no file that is read; accepted: {_accepted()}")
    return tuple(files)


def _is_data(relative: Path) -> bool:
    return format_of(relative) is not None and not any(part.startswith((".", "_")) for part in relative.parts)


def _in_subset(relative: Path, subset: str) -> bool:
    """In the sub-folder `subset`, or called so (train.jsonl, or train-00000-of-00002.parquet as on the hub)."""
    stem = relative.name.split(".")[0]
    return (
        relative.is_relative_to(subset)
        or stem == subset
        or re.fullmatch(re.escape(subset) + r"-\d.*", stem) is not None
    )


def _looks_like_a_file(name: str) -> bool:
    return format_of(Path(name)) is not None or Path(name).suffix.lower() in COMPRESSIONS or Path(name).parent.is_dir()


def _accepted() -> str:
    return f"{', '.join(TEXT_SUFFIXES)}, each also as {' and '.join(COMPRESSIONS)}; {', '.join(ARROW_SUFFIXES)}"


def _nearest(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
