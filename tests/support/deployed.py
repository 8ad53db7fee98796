"""`mswift deploy` and `mswift app` as processes."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence

PROGRAM = (sys.executable, "-m", "mswift.cli.main")


class Running:
    """A server process; `url` once it is ready. deploy's ends with /v1, app's is the page without the slash."""

    def __init__(
        self,
        command: str,
        *flags: str,
        pattern: str = r"(http://\S+?)/?$",
        program: Sequence[str] = PROGRAM,
        **environment: str,
    ) -> None:
        """pattern: of the line by which it says where it is."""
        self.process = subprocess.Popen(
            [*program, command, "--port", "0", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(pattern, line.strip())
        assert match, f"{line}{self.process.communicate()}"
        self.url = match[1]

    def stop(self) -> tuple[int, str]:
        """SIGTERM; exit status and all that it said since it was ready."""
        self.process.terminate()
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out + err
