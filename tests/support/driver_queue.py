"""What tests of the driver's virtqueues share: the fixture's type, and a callback."""

from typing import Any, Protocol

from support.guest import Hand

from vfiouser_virtio.guest import DriverVirtqueue

NEXT, WRITE, INDIRECT = 1, 2, 4


class Make(Protocol):
    """See `conftest.Maker`."""

    notified: list[int]

    def __call__(self, size: int = 8, callback: Any = None, **features: Any) -> tuple[DriverVirtqueue, Hand]: ...


def keep_on(vq: DriverVirtqueue) -> bool:
    return True


def a_buffer(vq: DriverVirtqueue, hand: Hand, token: object = "token") -> int:
    """One with room for eight bytes, which the device takes."""
    vq.add_buf([(0x1000, 8)], 0, 1, token)
    vq.kick()
    taken = hand.take()
    assert taken is not None
    return taken[0]
