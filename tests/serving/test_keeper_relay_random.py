"""A keeper's relay between a client and processes of a device that send anything, and die at any time."""

import logging
import os
import random
import socket
from collections.abc import Callable
from contextlib import suppress

import pytest
from support.amounts import Amounts

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    DMA_MAP,
    DMA_UNMAP,
    HEADER_CODEC,
    IOEVENTFD,
    IRQ_SET,
    REGION_ACCESS,
    REGION_IO_FDS,
    Command,
)
from vfiouser_virtio.serving.keeper.errors import RelayError
from vfiouser_virtio.serving.keeper.mappings import MAPPINGS
from vfiouser_virtio.serving.keeper.relay import MOST_WAITING, Relay
from vfiouser_virtio.supervision.journal import make_journal
from vfiouser_virtio.vfio_user.wire.connection import Message
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket

VERSION = b"\0\0\1\0{}\0"
COMMANDS = [*map(int, Command), MAPPINGS, 0, 0xFFFF]
FREQUENT = [int(Command.DMA_MAP), int(Command.DMA_UNMAP), int(Command.DEVICE_SET_IRQS), int(Command.REGION_WRITE)]
NUMBERS = [0, 1, 2, 4, 0x1000, 0x3000, 0x3004, 0xFFFF, 0xFFFF_FFFF]


class Peer:
    """One that says what it likes, mostly of the right form."""

    def __init__(self, rng: random.Random, sock: socket.socket) -> None:
        self.rng = rng
        self.socket = MessageSocket(sock)
        self.heard: list[tuple[int, int]] = []
        """Id and command of the requests that it has heard, and may answer."""

    def body(self, command: int) -> bytes:
        number: Callable[[], int] = lambda: self.rng.choice(NUMBERS)  # noqa: E731 - a short name for many
        kind = self.rng.choice([command, command, command, self.rng.choice(COMMANDS)])
        if kind == Command.VERSION:
            return VERSION
        if kind == Command.DMA_MAP:
            page, size = self.rng.randrange(16) << 12, self.rng.choice([0x1000, 0x2000, 0])
            return codec(DMA_MAP).pack(32, 3, 0, page, size)
        if kind == Command.DMA_UNMAP:
            return codec(DMA_UNMAP).pack(24, self.rng.choice([0, 2]), self.rng.randrange(16) << 12, number())
        if kind == Command.DEVICE_SET_IRQS:
            flags = self.rng.choice([0x24, 0x14, 0x21, 0x9, 0x11, 0x22, number()])
            data = bytes(self.rng.randrange(3))
            return codec(IRQ_SET).pack(20, flags, self.rng.randrange(4), self.rng.randrange(4), number()) + data
        if kind == Command.DEVICE_GET_REGION_IO_FDS:
            count = self.rng.choice([0, 1, 2, 5000])
            queue = codec(IOEVENTFD).pack(number(), 2, self.rng.randrange(3), 0, 0, 0)
            return codec(REGION_IO_FDS).pack(16, 0, 4, count) + queue * self.rng.choice([count % 7, 0, 1])
        if kind in (Command.REGION_READ, Command.REGION_WRITE):
            return codec(REGION_ACCESS).pack(number(), self.rng.choice([4, 4, 7]), 2) + bytes(
                self.rng.choice([2, 2, 0])
            )
        return self.rng.randbytes(self.rng.choice([0, 3, 16, 40, 4000]))

    def say(self) -> None:
        """One message, an answer or a request; now and then with descriptors, or none at all but a few bytes."""
        rng = self.rng
        if self.heard and rng.random() < 0.6:
            number, command = self.heard.pop(0 if rng.random() < 0.97 else -1)
            flags = rng.choice([1, 1, 1, 1, 0x21])
        else:
            number, command = rng.randrange(4), rng.choice(COMMANDS if rng.random() < 0.3 else FREQUENT)
            flags = rng.choice([0, 0x10]) if rng.random() < 0.98 else rng.randrange(0x40)
        body = self.body(command)
        size = 16 + len(body) if rng.random() < 0.995 else rng.choice([0, 15, 17, 1 << 21, 1 << 31])
        data = HEADER_CODEC.pack(number, command, size, flags, rng.choice([0, 22])) + body
        count = rng.choice([0, 0, 0, 1, 1, 2, 17])
        fds = [os.eventfd(0) if rng.random() < 0.8 else os.memfd_create("any") for _ in range(count)]
        self.socket.send(data if rng.random() < 0.995 else data[: rng.randrange(1, len(data) + 1)], fds)
        close_all(fds)

    def hear(self) -> None:
        with suppress(BlockingIOError, PeerError):
            while self.socket.receive_nowait():
                while self.socket.connection.next():
                    message: Message = self.socket.connection.message()
                    close_all(message.take_fds())
                    if not message.is_reply:
                        self.heard.append((message.id, message.command))


def play(seed: int) -> None:
    rng = random.Random(seed)
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    client, journal = Peer(rng, theirs), make_journal()
    relay = Relay(ours, DeviceLog(logging.getLogger(__name__), "mine"))
    device: Peer | None = None
    try:
        client.socket.send(HEADER_CODEC.pack(0, 1, 16 + len(VERSION), 0, 0) + VERSION)
        for _ in range(300):
            if device is None:
                mine, its = socket.socketpair()
                device = Peer(rng, its)
                relay.attach(mine, journal)
            for peer in (client, device):
                peer.hear()
                for _ in range(rng.choice([0, 1, 1, 5])):
                    peer.say()
            dies = rng.random() < 0.01
            try:
                relay.client.flush_nowait()
                relay.send_requests()
                if not relay.from_client():
                    break
                dies |= relay.from_device() is False
                if relay.was_told():
                    relay.go_on()
            except PeerError:
                break
            except RelayError:
                dies = True
            if relay.client_failure or not relay.takes_more:
                break
            assert {*relay.fds(), *relay.notifications} <= {int(name) for name in os.listdir("/proc/self/fd")}
            if dies or relay.device_failure:
                device.socket.close()
                device = None
                relay.detach()
            assert relay.client.queued < 2 * MOST_WAITING
    finally:
        relay.close()
        client.socket.close()
        if device is not None:
            device.socket.close()
        os.close(journal)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.filterwarnings("error")
def test_nothing_that_they_send_ends_the_keeper_or_stays_open(amounts: Amounts) -> None:
    for seed in range(10 * amounts.fuzz_cases):
        play(seed)
