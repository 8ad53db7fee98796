"""The interactive chat: answers appear token by token; Ctrl-C stops an answer, never the chat."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from mswift.errors import DataError
from mswift.infer.request import Completion, Engine, Message, Request
from mswift.infer.screen import screen_of

HELP = (
    "/clear forgets the conversation, /system TEXT starts another with this system message, "
    "/exit (or Ctrl-D) leaves; Ctrl-C stops an answer."
)


def show(engine: Engine, request: Request, *, markdown: bool = False) -> tuple[str, Completion | None]:
    """Print an answer while it grows; returns its text and its completion, None when Ctrl-C stopped it.

    markdown: formatted at a terminal (mswift.infer.screen).
    """
    text = ""
    screen = screen_of(markdown=markdown)
    completion = None
    try:
        with _noted_interrupts() as pressed, contextlib.closing(engine.stream(request)) as pieces:
            for piece in pieces:  # closing stops the model
                if pressed():
                    completion = None
                    break
                text += piece.text
                completion = piece.completion
                screen.add(piece.text)
    except KeyboardInterrupt:
        completion = None
    finally:
        screen.end()
    return text, completion


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is noted, to be looked at between tokens; a second one raises KeyboardInterrupt.

    Raised at an arbitrary place, an interrupt can get lost (Python ignores exceptions in finalizers and callbacks).
    """
    count = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, previous)


class Chat:
    """A conversation at the terminal. `make_request` turns the messages so far into a request."""

    def __init__(
        self,
        engine: Engine,
        make_request: Callable[[Sequence[Message]], Request],
        first: Sequence[Message] = (),
        *,
        markdown: bool = False,
    ) -> None:
        self._markdown = markdown
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
                if line == "/exit":
                    return 0
                if line:
                    self.handle(line)
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)")
                if self.messages and self.messages[-1]["role"] == "user":
                    self.messages.pop()  # it was not answered

    def handle(self, line: str) -> None:
        """Obey a /command, or answer a line."""
        if line == "/clear":
            self.messages = list(self._first)
            print("(conversation forgotten)")
        elif line.split()[0] == "/system":
            self._set_system(line.removeprefix("/system").strip())
        elif line.startswith("/"):
            print(f"(no command {line.split()[0]}. {HELP})")
        else:
            self._answer(line)

    def _set_system(self, text: str) -> None:
        self._first = ({"role": "system", "content": text},) if text else ()
        self.messages = list(self._first)
        print("(system message set; conversation forgotten)" if text else "(no system message; conversation forgotten)")

    def _answer(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})
        try:
            text, completion = show(self._engine, self._make_request(self.messages), markdown=self._markdown)
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
