"""Requests of a client that does not wait, while its device's process dies between any two lines of what it does.

Each change of registers is made once, in order, and each request is answered once, as it would have been without a
death. The processes of the device are objects, and the keeper is its `Relay`.
"""

import logging
import os
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

from support.adder import ADD, TOTAL, Adder, added
from support.amounts import Amounts
from support.killing import NEVER, Killed, apart, killing
from support.pci import Client

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    REGION_ACCESS_CODEC,
    WRITE_MULTI_ENTRY,
    WRITE_MULTI_REPLY,
    Command,
    MessageFlags,
)
from vfiouser_virtio.serving.keeper.mappings import dispatch_with_mappings
from vfiouser_virtio.serving.keeper.relay import Relay
from vfiouser_virtio.supervision.journal import make_journal
from vfiouser_virtio.supervision.pci import SupervisedPci
from vfiouser_virtio.transports.pci import COMMON, VIRTIO_BAR
from vfiouser_virtio.vfio_user.server.version import Negotiated
from vfiouser_virtio.vfio_user.wire.connection import Message, error_reply, reply, request
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket

_ENTRY, _COUNT = codec(WRITE_MULTI_ENTRY), codec(WRITE_MULTI_REPLY)
_SELECT, _FEATURE, _STATUS = COMMON + 0x08, COMMON + 0x0C, COMMON + 0x14
_NO_REPLY = int(MessageFlags.NO_REPLY)


class Process:
    """What a device's process does for its client, with answers that wait for room in the socket now and then."""

    def __init__(self, sock: socket.socket, journal: int, *, resuming: bool) -> None:
        self.socket = MessageSocket(sock)
        self.function = SupervisedPci(Adder(), journal_fd=journal, resuming=resuming)
        self._waiting: list[bytes] = []

    def serve(self, *, room: bool) -> None:
        """Carry out what there is, and answer all, or nothing where there is no ``room``."""
        with suppress(BlockingIOError):
            while self.socket.receive_nowait():
                while self.socket.connection.next():
                    self._waiting.append(self._answer(self.socket.connection.message()))
        if room:
            while self._waiting:
                self.socket.send(self._waiting.pop(0))

    def _answer(self, message: Message) -> bytes:
        if message.command == Command.VERSION:
            self.function.connected(Client())
            return reply(message.id, message.command, message.body)
        try:
            response = dispatch_with_mappings(self.function, message, Negotiated(write_multiple=True))
            for _ in response.work:
                pass
        except PeerError as error:
            return error_reply(message.id, message.command, error.errno)
        return reply(message.id, message.command, response.payload)


class Answer(NamedTuple):
    """What a client is to be answered."""

    id: int
    error: int
    body: bytes


class Game:
    """A client, a keeper, and processes that die."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        ours, client = socket.socketpair()
        self.client = MessageSocket(client)
        self.relay = Relay(ours, DeviceLog(logging.getLogger(__name__), "mine"))
        self.journal = make_journal()
        self.process: Process | None = None
        self.live = self.due = False
        self.total = self.sent = 0
        self.expected: list[Answer] = []
        self.seen: list[Answer] = []
        self.longest = self.deaths = 0

    def close(self) -> None:
        self.relay.close()
        self.client.close()
        if self.process is not None:
            self.process.socket.close()
        os.close(self.journal)

    # ---- the client ----------------------------------------------------------------------------------------------

    def ask(self, command: int, body: bytes, answer: bytes, *, error: int = 0, posted: bool = False) -> None:
        self.sent += 1
        self.client.send(request(self.sent & 0xFFFF, command, body, _NO_REPLY if posted else 0))
        if not posted:
            self.expected.append(Answer(self.sent & 0xFFFF, error, answer))

    def write(self, offset: int, value: int, size: int = 4) -> None:
        access = REGION_ACCESS_CODEC.pack(offset, VIRTIO_BAR, size)
        posted = self.rng.random() < 0.7
        self.ask(Command.REGION_WRITE, access + value.to_bytes(size, "little"), access, posted=posted)

    def bring_up(self) -> None:
        for offset, value, size in (
            (_STATUS, 1, 1),
            (_STATUS, 3, 1),
            (_SELECT, 1, 4),
            (_FEATURE, 1, 4),
            (_STATUS, 0xB, 1),
        ):
            self.write(offset, value, size)

    def add(self) -> int:
        value = self.rng.randrange(1 << 32)
        self.total = added(self.total, value)
        return value

    def say(self) -> None:
        """One request of any kind."""
        kind = self.rng.choice(["add"] * 6 + ["read"] * 4 + ["status", "wrong", "many", "reset"])
        if kind == "add":
            self.write(ADD, self.add())
        elif kind == "read":
            access = REGION_ACCESS_CODEC.pack(TOTAL, VIRTIO_BAR, 8)
            self.ask(Command.REGION_READ, access, access + self.total.to_bytes(8, "little"))
        elif kind == "status":
            access = REGION_ACCESS_CODEC.pack(_STATUS, VIRTIO_BAR, 1)
            self.ask(Command.REGION_READ, access, access + b"\x0b")
        elif kind == "wrong":
            access = REGION_ACCESS_CODEC.pack(0, 77, 4)
            self.ask(Command.REGION_WRITE, access + bytes(4), b"", error=22)
        elif kind == "many":
            count = self.rng.randint(1, 4)
            entries = [_ENTRY.pack(ADD, VIRTIO_BAR, 4, self.add().to_bytes(8, "little")) for _ in range(count)]
            self.ask(Command.REGION_WRITE_MULTI, _COUNT.pack(count) + b"".join(entries), _COUNT.pack(count))
        else:
            self.total = 0
            if self.rng.random() < 0.5:
                self.ask(Command.DEVICE_RESET, b"", b"")
            else:
                self.write(_STATUS, 0, 1)
            self.bring_up()

    def listen(self) -> None:
        with suppress(BlockingIOError):
            while self.client.receive_nowait():
                while self.client.connection.next():
                    message = self.client.connection.message()
                    self.seen.append(Answer(message.id, message.error, bytes(message.body)))

    # ---- the keeper ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        self.process = Process(theirs, self.journal, resuming=self.relay.begun)
        self.live = self.due = False
        self.relay.attach(ours, self.journal)

    def keep(self) -> None:
        self.relay.from_client()
        if self.relay.device is not None:
            self.relay.from_device()
        self.relay.send_requests()
        if self.process is not None and not self.live and self.relay.was_told():
            self.due = True

    @contextmanager
    def dying(self, after: int) -> Iterator[None]:
        """A block after so many lines of which the process is killed, and nothing is left but its journal."""
        left = b""

        def keep_journal() -> None:
            nonlocal left
            left = os.pread(self.journal, os.fstat(self.journal).st_size, 0)

        with killing(after, "supervision/", "serve", "_answer", at_death=keep_journal) as lines:
            try:
                yield
            except Killed:
                os.pwrite(self.journal, left, 0)
                if self.process is not None:
                    self.process.socket.close()
                self.process = None
        self.longest = max(self.longest, lines())

    def turn(self, after: int) -> None:
        self.keep()
        if self.process is None:
            self.start()
        else:
            with self.dying(after):
                self.process.serve(room=self.rng.random() < 0.7)
                if self.due and self.relay.begun:
                    self.process.function.resume()
        if self.process is None:
            self.deaths += 1
            self.relay.detach()
        elif self.due:
            self.relay.go_on()
            self.live, self.due = True, False
        self.listen()


def play(seed: int, most: int) -> Game:
    game = Game(random.Random(seed))
    try:
        game.ask(Command.VERSION, b"\0\0\1\0{}\0", b"\0\0\1\0{}\0")
        game.bring_up()
        turns = 0
        while turns < 30 or len(game.seen) < len(game.expected):
            turns += 1
            assert turns < 2000, f"{len(game.seen)} of {len(game.expected)} answers"
            if turns < 30:
                for _ in range(game.rng.choice([0, 0, 1, 5])):
                    game.say()
            if turns == 30:
                access = REGION_ACCESS_CODEC.pack(TOTAL, VIRTIO_BAR, 8)
                game.ask(Command.REGION_READ, access, access + game.total.to_bytes(8, "little"))
            game.turn(game.rng.randint(1, most) if turns < 200 and game.rng.random() < 0.5 else NEVER)
        assert game.seen == game.expected
    finally:
        game.close()
    return game


def test_each_change_of_registers_is_made_once(amounts: Amounts) -> None:
    longest = play(0, NEVER).longest
    games = [apart(partial(play, seed, longest)) for seed in range(amounts.ring_deaths)]
    assert sys.exc_info() == (None, None, None)
    assert sum(game.deaths for game in games) > amounts.ring_deaths
