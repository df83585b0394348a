"""Calls of `dispatch`, and how one is refused."""

import os
from collections.abc import Callable

import pytest

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.vfio_user.server.dispatch import Response

Send = Callable[..., Response]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def refused(
    send: Send, number: int, command: int, payload: bytes = b"", fds: tuple[int, ...] = (), **agreed: object
) -> str:
    with pytest.raises(PeerError) as caught:
        send(command, payload, fds, **agreed)
    assert caught.value.errno == number
    assert not caught.value.fatal
    assert not any(map(is_open, fds))
    return str(caught.value)
