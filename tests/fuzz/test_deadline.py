"""Time limits of the fuzzers: waits for a CPU do not count."""

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator

import pytest
import trio

from vfiouser_virtio.testing.fuzz.deadline import Deadline, ends_within, waited_for_cpu
from vfiouser_virtio.testing.fuzz.process.neighbour import PatientSocket

SHORT = 0.02


def pass_time(limit: Deadline) -> None:
    while limit.left:
        time.sleep(limit.left)


def says(*seconds: float) -> Iterator[float]:
    """So long was waited until now, and then no longer."""
    return itertools.chain(seconds, itertools.repeat(seconds[-1]))


def test_a_limit_passes_a_second_time_for_a_look_at_waits() -> None:
    limit = Deadline(SHORT, lambda: 0.0)
    assert not limit.over()
    pass_time(limit)
    assert not limit.over()
    pass_time(limit)
    assert limit.over()
    assert limit.over(), "and stays so"


def test_waits_are_no_part_of_it() -> None:
    waits = says(5.0, 5.0 + 3 * SHORT, 5.0 + 3.5 * SHORT, 5.0 + 3.51 * SHORT)
    limit = Deadline(SHORT, lambda: next(waits), at_once=True)
    for more in (SHORT, SHORT / 2):  # never more than the limit
        pass_time(limit)
        assert not limit.over()
        assert 0 < limit.left <= more
    pass_time(limit)
    assert limit.over(), "what was waited since is not worth a look"


def test_a_machine_that_has_no_time_at_all_is_not_waited_for() -> None:
    waits = itertools.count(0.0, 100.0)
    limit = Deadline(SHORT, lambda: next(waits), at_once=True)
    looks = 0
    while not limit.over():
        pass_time(limit)
        looks += 1
    assert 1 <= looks <= 5


def test_a_thread_that_has_ended_takes_its_waits_with_it() -> None:
    waits = says(5.0, 1.0)
    limit = Deadline(SHORT, lambda: next(waits), at_once=True)
    pass_time(limit)
    assert limit.over()


def test_a_neighbour_waits_for_a_server_that_has_no_cpu() -> None:
    """Its timeout passes, and it waits once more, as long as the server has had a CPU."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind("")  # an abstract name that is free
        listener.listen()
        begun: list[int] = []

        def limit() -> Deadline:
            begun.append(0)
            if len(begun) > 1:
                return Deadline(SHORT, lambda: 0.0, at_once=True)
            server.send(b"late")
            return Deadline(1e6, lambda: 0.0, at_once=True)

        client = stack.enter_context(PatientSocket(limit))
        client.settimeout(SHORT)
        client.connect(listener.getsockname())
        server = stack.enter_context(listener.accept()[0])
        assert client.recv(100) == b"late"
        with pytest.raises(TimeoutError):
            client.recv(100)
        assert len(begun) == 2


def test_waits_of_processes() -> None:
    assert waited_for_cpu() > 0
    assert waited_for_cpu(1 << 22) == 0, "there is none"


async def test_a_wait_is_begun_again() -> None:
    begun = 0

    async def wait() -> None:
        nonlocal begun
        begun += 1
        await trio.sleep_forever()

    assert not await ends_within(SHORT, wait)
    assert begun >= 2
    assert await ends_within(SHORT, trio.lowlevel.checkpoint)
