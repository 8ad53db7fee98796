"""Conversion in numbers: time against `cp -r` + fsync, memory, resumes after kill -9, many tensors, bytes read.

Generates checkpoints, converts them in fresh processes, and deletes everything again. What is timed is what a user
waits for: the whole command, from start to exit. Before each measurement the old output is deleted and the disk is
synced; the source stays in the page cache. Prints Markdown.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from conversion import sections

from mswift.converters.workers import default_workers

SECTIONS = ("speed", "tmpfs", "memory", "resume", "scale", "read")


def main() -> None:
    """Parses arguments, runs the sections, prints each with the command that made it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {','.join(SECTIONS)} (default: all)")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of the model that is timed and killed")
    parser.add_argument("--tmpfs_gigabytes", type=float, default=2.0)
    parser.add_argument("--memory_gigabytes", type=float, nargs="+", default=[2.0, 16.0])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--moments", type=int, default=10, help="of kill -9")
    parser.add_argument("--num_workers", type=int)
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    workers = [] if options.num_workers is None else ["--num_workers", str(options.num_workers)]
    size, shards, rounds = options.gigabytes, options.shards, options.rounds
    runs: dict[str, tuple[Path | None, Callable[[Path], str]]] = {
        "speed": (options.dir, lambda f: sections.speed(f, size, shards, rounds, workers)),
        "tmpfs": (options.tmpfs, lambda f: sections.speed(f, options.tmpfs_gigabytes, shards, rounds, workers)),
        "memory": (options.dir, lambda f: sections.memory(f, options.memory_gigabytes, workers)),
        "resume": (options.dir, lambda f: sections.resume(f, size, options.moments, workers)),
        "scale": (options.dir, sections.scale),
        "read": (options.dir, lambda f: sections.read(f, min(size, 2.0))),
    }
    unknown = set(options.sections.split(",")) - set(runs)
    if unknown:
        parser.error(f"--sections: unknown {', '.join(sorted(unknown))}; there are {', '.join(runs)}")
    print(f"`python benchmarks/convert.py {' '.join(sys.argv[1:])}`, {os.cpu_count()} processors,", end=" ")
    print(f"{options.num_workers or default_workers()} workers, load average {os.getloadavg()[0]:.1f} at the start")
    for name in options.sections.split(","):
        folder, run = runs[name]
        with tempfile.TemporaryDirectory(dir=folder, prefix="mswift-benchmark-") as work:
            print(f"\n## {name}\n\n{run(Path(work))}", flush=True)


if __name__ == "__main__":
    main()
