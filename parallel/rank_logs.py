"""Where the ranks of one machine write: rank 0 to the console, the others each to files of their own.

folder/rank-00003.err and .out, whole also after kill -9. What failed ranks said last is repeated on the console, once
for all that said the same.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest

from mswift import rank_words

_LINES = 20


class RankLogs(DefaultLogsSpecs):
    """torchrun's way to be told where ranks write."""

    def __init__(self, folder: Path) -> None:
        """Make the folder; OSError where that cannot be."""
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._paths: list[Path] = []

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The files of these local ranks."""
        outs, errs = dict.fromkeys(envs, ""), dict.fromkeys(envs, "")
        for local, env in envs.items():
            if (rank := int(env["RANK"])) != 0:
                env["PYTHONUNBUFFERED"] = "1"
                error = rank_words.path_of(self.folder, rank)
                out = error.with_suffix(".out")
                self._paths += [out, error]
                outs[local], errs[local] = str(out), str(error)
        return replace(super().reify(envs), stdouts=outs, stderrs=errs)

    def last_words(self, statuses: Mapping[int, int]) -> Iterator[str]:
        """What the ranks that failed (rank -> exit status) and have files said last."""
        said = {rank: path for rank in statuses if (path := rank_words.path_of(self.folder, rank)).is_file()}
        for ranks in rank_words.by_last_line({rank: path.read_bytes() for rank, path in said.items()}).values():
            first, same = ranks[0], f" (as {rank_words.in_words(ranks[1:])})" if ranks[1:] else ""
            lines = said[first].read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:]
            yield f"mswift: rank {first} ended with {statuses[first]}{same}; {said[first]} ends:"
            yield from lines

    def tidy(self) -> None:
        """Remove the files of ranks that said nothing, and the folder (and its parent) that has no others."""
        for path in self._paths:
            if path.is_file() and not path.stat().st_size:
                path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()
            self.folder.parent.rmdir()
