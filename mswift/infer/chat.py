"""The interactive chat: answers appear token by token; Ctrl-C stops an answer, never the chat."""

import contextlib
import sys
from collections.abc import Callable, Sequence

from mswift.errors import DataError
from mswift.infer.request import Completion, Engine, Message, Request

HELP = "/clear forgets the conversation, /exit (or Ctrl-D) leaves; Ctrl-C stops an answer."


def show(engine: Engine, request: Request) -> tuple[str, Completion | None]:
    """Print an answer while it grows; returns its text and its completion, None when Ctrl-C stopped it."""
    text = ""
    completion = None
    pieces = engine.stream(request)
    try:
        with contextlib.closing(pieces):  # closing it stops the model
            for piece in pieces:
                text += piece.text
                completion = piece.completion
                print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        completion = None
    print(flush=True)
    return text, completion


class Chat:
    """A conversation at the terminal. `make_request` turns the messages so far into a request."""

    def __init__(
        self, engine: Engine, make_request: Callable[[Sequence[Message]], Request], first: Sequence[Message] = ()
    ) -> None:
        self._engine = engine
        self._make_request = make_request
        self._first = tuple(first)
        self.messages: list[Message] = list(first)

    def run(self) -> int:
        """Read and answer lines until /exit or the end of the input; returns the exit status."""
        prompt = ""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() its line editing and history)
            prompt = "> "
            print(HELP)
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)")
                continue
            if line == "/exit":
                return 0
            if line:
                self.handle(line)

    def handle(self, line: str) -> None:
        """Obey a /command, or answer a line."""
        if line == "/clear":
            self.messages = list(self._first)
            print("(conversation forgotten)")
        elif line.startswith("/"):
            print(f"(no command {line.split()[0]}. {HELP})")
        else:
            self._answer(line)

    def _answer(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})
        try:
            text, completion = show(self._engine, self._make_request(self.messages))
        except DataError as error:
            self.messages.pop()
            print(f"({error}; /clear starts anew)")
            return
        if completion is None:
            print("(stopped)")
        elif completion.finish_reason == "length":
            print(f"(cut after {completion.completion_tokens} tokens; --max_new_tokens)")
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()
