"""One rank of `mswift doctor layout`: reads the jobs, computes, and on rank 0 writes what was computed."""

import json
import sys
from pathlib import Path

import numpy as np

from mswift.launchers.environment import RankInfo, current
from mswift.parallel import device, groups
from mswift.train.collective import ended_by
from mswift.train.doctor import JOBS, RESULT
from mswift.train.proof import ProofJob, dims_from


def main(home: Path) -> None:
    """Run the jobs that are described in `home`."""
    payload = json.loads((home / JOBS).read_text())
    dims, info = dims_from(payload["dims"]), current() or RankInfo.single()
    chosen = device.prepare(payload["device"])  # before the first import of megatron.core
    from mswift.train.prove import run

    groups.init(dims, chosen, info)
    with ended_by(groups.destroy, dims):
        for number, job in enumerate(payload["jobs"]):
            result = run(ProofJob(**job), dims, chosen)
            if info.rank == 0:
                np.savez(home / RESULT.format(number), allow_pickle=False, **result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
