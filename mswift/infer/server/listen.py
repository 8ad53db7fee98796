"""What every server of this program does: read its keys, bind its socket, answer until it is told to stop."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from mswift.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

API_KEY_VARIABLE = "MSWIFT_API_KEY"


def url_of(bound: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def read_keys(path: str | None, variable: str = API_KEY_VARIABLE, flag: str = "--api_key_file") -> tuple[str, ...]:
    """Keys of the file, else of the environment variable. ConfigError for a file that has none."""
    if path is None:
        return tuple(key for key in (os.environ.get(variable, "").strip(),) if key)
    if not Path(path).is_file():
        raise ConfigError(f"{flag} {path}: no such file")
    keys = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    if not keys:
        raise ConfigError(f"{flag} {path}: it holds no key")
    return keys


def is_own(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket. ConfigError where the address is taken or not this machine's."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}") from None
    with bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            bound.listen(2048)
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: {error.strerror}; --port 0 takes a free one") from None
        yield bound


def serve(app: "FastAPI", bound: socket.socket, shutdown_seconds: float) -> int:
    """Answer on a bound socket until SIGTERM or SIGINT; answers under way have time to end."""
    import uvicorn

    class Server(uvicorn.Server):
        """Signals end it with exit status 0."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            handled = (signal.SIGTERM, signal.SIGINT)
            previous = {number: signal.signal(number, self.handle_exit) for number in handled}
            try:
                yield
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    server = Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(shutdown_seconds)),
            timeout_keep_alive=30,
            server_header=False,
            h11_max_incomplete_event_size=64 * 1024,
        )
    )
    server.run(sockets=[bound])
    return 0 if server.started else 1
