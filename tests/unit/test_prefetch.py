"""Reading ahead: results in their order, one ahead and no more, errors where they belong, no thread left."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from mswift.train import prefetch
from mswift.train.prefetch import ahead


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "next batch"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert readers() == []


def until(condition: Callable[[], bool]) -> None:
    """Whatever a thread does comes within 20 seconds."""
    tick = threading.Event()
    for _ in range(2000):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it did not come")


@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_results_come_in_order_and_the_end_reads_nothing_more(number: int) -> None:
    asked: list[int] = []
    assert list(ahead(lambda place: asked.append(place) or place**2, range(number))) == [n**2 for n in range(number)]  # type: ignore[func-returns-value]
    assert asked == list(range(number))


def test_one_is_read_while_one_is_in_use_by_another_thread() -> None:
    asked: list[tuple[int, bool]] = []

    def read(place: int) -> int:
        asked.append((place, threading.current_thread() is threading.main_thread()))
        return place

    with closing(ahead(read, range(10))) as results:
        assert asked == []  # nothing before it is wanted
        assert next(results) == 0
        until(lambda: len(asked) == 2 and not readers())
        assert asked == [(0, False), (1, False)]
        assert next(results) == 1
        until(lambda: len(asked) == 3 and not readers())


def test_an_error_comes_where_the_result_would_have_come() -> None:
    def read(place: int) -> int:
        if place == 2:
            raise ValueError("a damaged file")
        return place

    results = ahead(read, range(10))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="a damaged file"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_an_error_of_what_nobody_takes_is_none() -> None:
    def read(place: int) -> int:
        if place:
            raise ValueError("a damaged file")
        return place

    with closing(ahead(read, range(10))) as results:
        assert next(results) == 0


def test_closing_waits_for_the_read_under_way() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def read(place: int) -> int:
        if place:
            begun.set()
            assert go_on.wait(20)
            ended.set()
        return place

    with closing(ahead(read, range(10))) as results:
        next(results)
        assert begun.wait(20)
        threading.Timer(0.1, go_on.set).start()
    assert ended.is_set()


def test_a_read_that_hangs_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_PATIENCE_SECONDS", 0.05)
    go_on = threading.Event()
    with closing(ahead(lambda place: place == 0 or go_on.wait(20), range(10))) as results:
        next(results)
    (left,) = readers()
    assert left.daemon  # the process ends without it
    go_on.set()
    left.join(20)
