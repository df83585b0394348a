"""A journal in which nothing can be read: a process has stored wherever it liked before it died."""

import json
import logging
import os
from collections.abc import Iterator

import pytest
from support.adder import Adder

from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.supervision.journal import Journal, make_journal
from vfiouser_virtio.supervision.pci import SupervisedPci
from vfiouser_virtio.supervision.stand_in import stand_in

JUNK = [
    b"",
    b"\xff\xfe{",
    b"[" * 100_000,
    b"17",
    b"{}",
    b'{"done": 1}',
    b'{"done": [1, 1], "config": "00"}',
    b'{"done": [0, 0], "device": {"id": 42, "features": 0, "config": 7}, "core": {"sizes": [256]}}',
]


@pytest.fixture
def journal() -> Iterator[int]:
    fd = make_journal()
    yield fd
    os.close(fd)


@pytest.mark.parametrize("junk", JUNK)
def test_a_device_whose_registers_are_lost_needs_a_reset(
    junk: bytes, journal: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With all of them at 0 its driver would wait for ever."""
    Journal(journal, []).save(junk)
    function = SupervisedPci(Adder(), journal_fd=journal, resuming=True)
    with caplog.at_level(logging.ERROR):
        function.resume()
    assert function.core.status == DeviceStatus.NEEDS_RESET
    assert [record.message for record in caplog.records if "cannot be resumed" in record.message]
    another = SupervisedPci(Adder(), journal_fd=journal, resuming=True)
    another.resume()
    assert another.core.status == DeviceStatus.NEEDS_RESET


def test_a_device_of_which_nothing_was_saved_needs_a_reset(journal: int) -> None:
    """It has more registers than there is room for."""
    function = SupervisedPci(Adder(), journal_fd=journal, resuming=True)
    function.resume()
    assert function.core.status == DeviceStatus.NEEDS_RESET


@pytest.mark.parametrize("junk", JUNK)
def test_no_stand_in_for_what_cannot_be_read(junk: bytes, journal: int) -> None:
    """Its process would die again and again. The device itself is made instead."""
    Journal(journal, []).save(junk)
    assert stand_in(journal) is None


def test_a_stand_in_has_the_registers_of_its_device(journal: int) -> None:
    SupervisedPci(Adder(), journal_fd=journal).resume()
    state = json.loads(Journal(journal, []).load() or b"")
    made = stand_in(journal)
    assert made is not None
    assert (made.device_id, [queue.max_size for queue in made.queues]) == (42, state["core"]["sizes"])
