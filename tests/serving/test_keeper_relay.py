"""A keeper's relay while no process of the device takes what the client sends."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.serving.keeper.relay import MOST_WAITING, Relay
from vfiouser_virtio.vfio_user.wire.connection import request
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket


@contextmanager
def relayed() -> Iterator[tuple[Relay, socket.socket]]:
    """A relay, and its client's end."""
    ours, client = socket.socketpair()
    relay = Relay(ours, DeviceLog(logging.getLogger(__name__), "mine"))
    with client:
        client.setblocking(False)
        try:
            yield relay, client
        finally:
            relay.close()


@pytest.mark.parametrize("size", [0, 4000])
def test_a_client_that_floods_a_dead_device_waits(size: int) -> None:
    """What is taken is bounded by its cost, so small messages count, too; the next process gets all of it, in order."""
    with relayed() as (relay, client):
        one = request(7, Command.DEVICE_GET_INFO, bytes(size))
        messages = one * 64
        sent = 0
        while relay.takes_more:
            try:
                sent += client.send(messages[sent % len(one) :])
            except BlockingIOError:
                assert relay.from_client()
            assert sent < 2 * MOST_WAITING, "it takes without an end"
        mine, device = socket.socketpair()
        relay.attach(mine)
        with device:
            assert relay.was_told()
            relay.go_on()
            assert relay.device is not None
            process, taken = MessageSocket(device), 0
            while not relay.device.flush_nowait() or taken == 0:
                process.receive_nowait()
                while process.connection.next():
                    assert process.connection.message().body == bytes(size)
                    taken += 1
            assert taken > MOST_WAITING // 2 // (len(one) + 256)
