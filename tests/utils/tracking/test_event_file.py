"""Event files that TensorBoard reads as one curve, whatever ended the process that wrote them."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.tracking.event_file import EventFile


def read(directory: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def write(directory: Path, first: int, last: int, value: float = 0.0) -> Path:
    """Write the steps of one attempt."""
    file = EventFile(directory)
    file.purge_from(first)
    for step in range(first, last + 1):
        file.add_scalars({"loss": value}, step)
    file.close()
    return file.path


def test_a_later_attempt_takes_back_what_it_does_again(tmp_path: Path) -> None:
    for value, (first, last) in enumerate([(1, 7), (6, 9), (8, 12), (4, 5)]):
        write(tmp_path, first, last, value)
    assert read(tmp_path) == [(1, 0), (2, 0), (3, 0), (4, 3), (5, 3)]


def test_files_sort_by_attempt_also_where_a_clock_goes_back(tmp_path: Path) -> None:
    newest = tmp_path / "events.out.tfevents.9000000000.other-machine.1"
    write(tmp_path, 1, 3).rename(newest)
    paths = [write(tmp_path, step, step) for step in (4, 5, 6)]
    assert sorted(tmp_path.iterdir()) == [newest, *paths]
    assert [step for step, _ in read(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("missing", [1, 37])
def test_a_torn_last_record_costs_itself_alone(tmp_path: Path, missing: int) -> None:
    torn = write(tmp_path, 1, 5)
    os.truncate(torn, torn.stat().st_size - missing)
    write(tmp_path, 3, 8, 1)
    assert read(tmp_path) == [(1, 0), (2, 0), *((step, 1) for step in range(3, 9))]


def test_records_are_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.add_scalars({"loss": 1}, 1)
    assert read(tmp_path) == [(1, 1)]
    file.close()


def test_after_a_full_disk_the_same_file_goes_on(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.add_scalars({"loss": 1}, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for a part of a record: the write is cut short, then fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 10, hard))
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                file.add_scalars({"loss": 2}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.add_scalars({"loss": 3}, 3)
    file.close()
    assert read(tmp_path) == [(1, 1), (3, 3)]


def test_several_threads_write_whole_records(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    threads = [
        threading.Thread(
            target=lambda base=base: [file.add_scalars({"loss": 0}, base + i) for i in range(200)]
        )
        for base in range(0, 1600, 200)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    assert sorted(step for step, _ in read(tmp_path)) == list(range(1600))
