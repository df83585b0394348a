"""Races for the flags and the counter of an eventfd that a client shares with the server.

O_NONBLOCK belongs to the open file, which both ends have: whoever looks at it, and then makes a system call that waits
without it, may find it changed in between, and wait for ever with all its devices.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from random import Random

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import (
    HEADER_CODEC,
    IRQ_SET,
    REGION_IO_FDS,
    Command,
    IrqSetFlags,
    MessageFlags,
    PciIrq,
)
from vfiouser_virtio.testing.fuzz.process.lane import Lane
from vfiouser_virtio.testing.raw.blocking import BlockingClient
from vfiouser_virtio.transports.pci import VIRTIO_BAR

_FULL = (1 << 64) - 2
_ROOM = 256  # sub-regions that a reply may have


def irq_race(
    lane: Lane,
    client: int,
    seconds: float,
    index: int = PciIrq.MSIX,
    batch: int = 500,
    dwell: int = 1,
    full: bool = True,
) -> None:
    """The flag of an interrupt's eventfd changes all the time, while the interrupt is triggered.

    ``full``: its counter cannot be added to. ``dwell`` is how often in a row the flag is set to the same.
    """
    one = lane.clients[client]
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        _set_irqs(one, index, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER, [eventfd])
        if full:
            os.eventfd_write(eventfd, _FULL)
        triggers = _message(index, IrqSetFlags.DATA_BOOL | IrqSetFlags.ACTION_TRIGGER, b"\1") * batch
        for _ in _while_flag_changes(lane, seconds, eventfd, dwell):
            one.socket.sendall(triggers)
    finally:
        os.close(eventfd)


def resample_race(lane: Lane, client: int, seconds: float, spread: int = 100) -> None:
    """The eventfd that unmasks INTx is written to, and its count taken back before the server reads it."""
    one = lane.clients[client]
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        _set_irqs(one, PciIrq.INTX, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_UNMASK, [eventfd])
        _write_and_take(lane, seconds, [eventfd], spread)
    finally:
        os.close(eventfd)


def notification_race(lane: Lane, client: int, seconds: float, spread: int = 100) -> None:
    """Likewise those that the device gives for its queues' notifications (DEVICE_GET_REGION_IO_FDS)."""
    one = lane.clients[client]
    fields = {"argsz": REGION_IO_FDS.sizeof() + 40 * _ROOM, "flags": 0, "index": VIRTIO_BAR, "count": 0}
    _, fds = one.call_for_fds(Command.DEVICE_GET_REGION_IO_FDS, REGION_IO_FDS.build(fields))
    try:
        _write_and_take(lane, seconds, fds, spread)
    finally:
        close_all(fds)


def _write_and_take(lane: Lane, seconds: float, fds: list[int], spread: int) -> None:
    """Write, and take it back up to ``spread`` microseconds later: between the server's wake-up and its read."""
    goes_on = lane.during(seconds)
    random = Random(spread)
    clock = time.perf_counter
    count = [bytearray(8)]
    while goes_on() and fds:
        for fd in fds:
            os.set_blocking(fd, True)
            for _ in range(100):
                until = random.random() * spread / 1e6
                os.eventfd_write(fd, 1)
                until += clock()
                while clock() < until:
                    pass
                with contextlib.suppress(BlockingIOError):
                    os.preadv(fd, count, -1, os.RWF_NOWAIT)


def _while_flag_changes(lane: Lane, seconds: float, fd: int, dwell: int) -> Iterator[None]:
    """Yields now and then while the flag changes as fast as it can."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    choices = [flags | os.O_NONBLOCK] * dwell + [flags & ~os.O_NONBLOCK] * dwell
    goes_on = lane.during(seconds)
    change, set_flags = fcntl.fcntl, fcntl.F_SETFL
    while goes_on():
        yield
        for _ in range(2000 // dwell):
            for choice in choices:
                change(fd, set_flags, choice)


def _message(index: int, flags: int, data: bytes) -> bytes:
    """A SET_IRQS of the first interrupt of an index that is not answered."""
    body = IRQ_SET.build(
        {"argsz": IRQ_SET.sizeof() + len(data), "flags": flags, "index": index, "start": 0, "count": 1}
    )
    size = HEADER_CODEC.size + len(body) + len(data)
    return HEADER_CODEC.pack(1, Command.DEVICE_SET_IRQS, size, MessageFlags.NO_REPLY, 0) + body + data


def _set_irqs(client: BlockingClient, index: int, flags: int, fds: list[int]) -> None:
    body = IRQ_SET.build({"argsz": IRQ_SET.sizeof(), "flags": flags, "index": index, "start": 0, "count": len(fds)})
    client.call(Command.DEVICE_SET_IRQS, body, fds)
