"""Batches over processes: results in order, the same files for any number, errors as from one, no worker left over."""

import os
import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest

from mswift.data.cache import open_or_build
from mswift.data.encoding import Batch, Encoded
from mswift.data.formats import Record
from mswift.data.pool import WorkerLost, default_num_proc, in_order
from mswift.data.report import FileReport
from mswift.errors import DataError


@dataclass
class Slow:
    """Rows -> their numbers, the earlier ones later; `bad` fails, `fatal` kills its process."""

    bad: int | None = None
    fatal: int | None = None

    def __call__(self, batch):
        (record,) = batch.records
        time.sleep(0.02 * (record.number % 3 == 0))
        if record.number == self.bad:
            raise DataError(f"row {record.number} is bad")
        if record.number == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return Encoded(FileReport(str(os.getpid()), None, rows=1), [np.arange(record.number, dtype=np.int32)])


def _steps(count):
    for number in range(count):
        if number % 5 == 0:
            yield f"file {number}"
        yield Batch("a", [Record(number, "a", {})])


def _fingerprint(directory, num_proc):
    def build(writer):
        for _, encoded in in_order(_steps(30), Slow(), num_proc):
            for tokens in encoded.pieces if encoded else []:
                writer.add(tokens)
        return {"files": []}

    store = open_or_build(lambda: directory, build, with_mask=False, is_writer=True, barrier=lambda: None)
    return store.fingerprint


def test_the_entry_is_the_same_for_any_number_of_processes(tmp_path):
    assert len({_fingerprint(tmp_path / str(n), n) for n in (1, 2, 3)}) == 1


def test_steps_and_results_come_in_order_from_several_processes():
    found = list(in_order(_steps(30), Slow(), 2))
    assert [step if isinstance(step, str) else step.records[0].number for step, _ in found] == [
        step if isinstance(step, str) else step.records[0].number for step in _steps(30)
    ]
    assert all((encoded is None) == isinstance(step, str) for step, encoded in found)
    pids = {encoded.report.name for _, encoded in found if encoded}
    assert len(pids) == 2
    assert str(os.getpid()) not in pids


def test_no_more_is_read_ahead_than_said():
    read = []

    def steps():
        for step in _steps(100):
            read.append(step)
            yield step

    results = in_order(steps(), Slow(), 2)
    next(results)
    assert len(read) <= 9
    results.close()


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_is_that_of_one_process(num_proc):
    seen = []
    with pytest.raises(DataError, match="row 7 is bad"):
        seen += (encoded for _, encoded in in_order(_steps(30), Slow(bad=7), num_proc))


def test_a_lost_process_is_said_and_the_others_end():
    with pytest.raises(WorkerLost, match=r"\(pid \d+\) ended with status -9 .*--dataset_num_proc 1 needs least"):
        list(in_order(_steps(30), Slow(fatal=7), 2))


def test_small_data_takes_one_process(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x")
    with large.open("wb") as stream:
        stream.truncate(16 << 20)
    assert default_num_proc([small]) == 1
    assert default_num_proc([small, large]) == min(len(os.sched_getaffinity(0)), 8)
