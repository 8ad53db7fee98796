"""The directory in which a conversion grows until it is published: locked, tied to one plan, continued by a rerun.

`.NAME.mswift-partial/` beside the destination NAME holds `data/` (which is renamed to NAME), `plan.json` (what is
being made, in how many parts), a journal for each part, and locks: every process shares `lock`, and has its part's own
for itself; who publishes or clears has `lock` for itself.
"""

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mswift.converters.io.files import check_absent, sync_directory
from mswift.errors import CheckpointError, ConfigError, MswiftError


@dataclass(frozen=True)
class Identity:
    """What a partial directory is for. `plan` identifies source, flags and layout of the files."""

    plan: str
    parts: int
    source: str
    to: str


class Partial:
    """The partial directory of a destination, locked until `close`."""

    def __init__(self, destination: Path, flag: str = "--output_dir") -> None:
        self.destination = Path(os.path.abspath(destination))
        self.flag = flag
        self.path = self.destination.parent / f".{self.destination.name}.mswift-partial"
        self.data = self.path / "data"
        self._locks: dict[str, int] = {}

    def journal(self, part: int, parts: int) -> Path:
        """The journal of a part (from 1)."""
        return self.path / f"part-{part:05}-of-{parts:05}.journal"

    def begin(self, identity: Identity, part: int, *, restart: bool) -> str | None:
        """Opens or makes the directory, for one part; returns a line for the user if it had to begin anew.

        ConfigError if the destination exists, another process writes the same part, or the parts of another
        conversion are there.
        """
        check_absent(self.destination, self.flag)
        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            anew = self._open(identity, f"part-{part:05}.lock", restart)
            self.data.mkdir(exist_ok=True)
        except MswiftError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise ConfigError(
                f"{self.flag} {self.destination}: cannot create {self.path} ({error.strerror}); "
                "name a directory that can be written"
            ) from None
        if not anew:
            return None
        return f"{self.path}: was left by a conversion of another source or with other flags; it begins anew"

    def _open(self, identity: Identity, own: str, restart: bool) -> bool:
        """Locks and claims the directory; True if what was there had to go."""
        self._enter(own, clear=restart)
        found = self._claim(identity)
        if (found.plan, found.parts) == (identity.plan, identity.parts):
            return False
        if identity.parts > 1 or found.parts > 1:
            raise ConfigError(self._mismatch(found, identity))
        self.close()
        self._enter(own, clear=True)
        if self._claim(identity).plan != identity.plan:
            raise ConfigError(f"{self.flag} {self.destination}: another process began to write it just now")
        return True

    def join(self, plan: str) -> int:
        """Opens what the parts have written, for itself; returns how many parts there are.

        ConfigError if there is nothing, a part is still at work, or it is of another plan.
        """
        check_absent(self.destination, self.flag)
        if not (self.path / "plan.json").exists():
            raise ConfigError(f"{self.flag} {self.destination}: there is nothing to finish: no part was run for it")
        try:
            self._own()
            found = self._read()
            if found.plan != plan:
                raise ConfigError(self._mismatch(found, None))
        except MswiftError:
            self.close()
            raise
        return found.parts

    def publish(self) -> None:
        """Gives the data its name; nothing may be written afterwards. ConfigError if another process cleared it."""
        self._own()
        for folder in (*(p for p in self.data.rglob("*") if p.is_dir()), self.data):
            sync_directory(folder)
        os.rename(self.data, self.destination)
        sync_directory(self.destination.parent)
        shutil.rmtree(self.path, ignore_errors=True)

    def discard(self) -> None:
        """Removes everything, unless another process is at work there."""
        try:
            self._own()
        except ConfigError:
            return
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Gives up the locks."""
        while self._locks:
            os.close(self._locks.popitem()[1])

    def _enter(self, own: str, *, clear: bool) -> None:
        if clear and self.path.exists():
            self._own()
            shutil.rmtree(self.path)
            self.close()
        while True:
            self.path.mkdir(exist_ok=True)
            self._lock("lock", fcntl.LOCK_SH)
            if self._is_current():
                break
            self.close()  # somebody published or cleared it meanwhile
        self._lock(own, fcntl.LOCK_EX)

    def _own(self) -> None:
        """Locks the directory for itself; between the shared lock and this one another process may have cleared it."""
        self._lock("lock", fcntl.LOCK_EX)
        if not self._is_current():
            raise ConfigError(f"{self.flag} {self.destination}: another process began to write it just now")

    def _is_current(self) -> bool:
        """Whether the lock that is held is that of the directory as it is now."""
        try:
            return os.path.samestat(os.fstat(self._locks["lock"]), os.stat(self.path / "lock"))
        except FileNotFoundError:
            return False

    def _lock(self, name: str, kind: int) -> None:
        fd = self._locks.get(name)
        if fd is None:
            fd = self._locks[name] = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.flag} {self.destination}: another process is writing it now ({self.path / name})"
            ) from None

    def _claim(self, identity: Identity) -> Identity:
        """Writes plan.json unless it is there; returns what it says."""
        path = self.path / "plan.json"
        if not path.exists():
            draft = self.path / f"plan.json.{os.uname().nodename}.{os.getpid()}"
            draft.write_text(json.dumps(identity.__dict__, indent=1))
            try:
                os.link(draft, path)
            except FileExistsError:
                pass  # another part was faster
            finally:
                draft.unlink()
        return self._read()

    def _read(self) -> Identity:
        try:
            value: dict[str, Any] = json.loads((self.path / "plan.json").read_text("utf-8"))
            return Identity(str(value["plan"]), int(value["parts"]), str(value["source"]), str(value["to"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / 'plan.json'}: is damaged ({error}); begin anew with --restart"
            ) from None

    def _mismatch(self, found: Identity, wanted: Identity | None) -> str:
        same = wanted is None or found.plan == wanted.plan
        what = "whole" if found.parts == 1 else f"in {found.parts} parts"
        other = "" if wanted is not None and same else ", of another source or with other flags than now"
        return (
            f"{self.flag} {self.destination}: {self.path} holds a conversion of {found.source} to {found.to} "
            f"{what}{other}; go on with the flags it was begun with, or begin anew with --restart"
        )
