"""Runs inside EvalScope's own environment: TaskConfig as JSON on stdin, scores of all samples as stdout's last line."""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the task; then read EvalScope's reviews, a line of JSON for each sample."""
    job = json.load(sys.stdin)
    from evalscope import TaskConfig, run_task
    from evalscope.version import __version__

    stdout, sys.stdout = sys.stdout, sys.stderr  # its own tables
    run_task(TaskConfig(**job))
    sys.stdout = stdout
    work_dir = Path(job["work_dir"])
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work_dir.glob("reports/*/*.json"))]
    samples: dict[str, list[Any]] = {}
    for path in sorted(work_dir.glob("reviews/*/*.jsonl")):
        with path.open(encoding="utf-8") as file:
            samples[path.stem] = [json.loads(line) for line in file]
    print(json.dumps({"version": __version__, "reports": reports, "samples": samples}))


if __name__ == "__main__":
    main()
