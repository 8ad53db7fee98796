"""The program of a tokenising process: `python -m mswift.data.worker FD`, started by `mswift.data.pool` alone."""

import sys
from multiprocessing.connection import Connection

from mswift.errors import MswiftError


def main(descriptor: int) -> None:
    """Encode batches until the socket ends: the first object is the encoder; results and errors go back."""
    with Connection(descriptor) as link:
        try:
            encoder = link.recv()
            while True:
                batch = link.recv()
                try:
                    result: object = encoder(batch)
                except MswiftError as error:
                    result = error
                link.send(result)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the other side has ended


if __name__ == "__main__":
    main(int(sys.argv[1]))
