"""Sabotage of one rule at a time, to prove that the games find it: changes of classes in one process, or in both.

A look that is left out after asking for a notification is found within thousands of buffers, one that comes too early
within a hundred thousand. A missing barrier takes luck: the processor must keep a store to itself for longer than
Python takes for some hundred instructions, just when the other side goes to sleep. That it does keep stores
to itself, and that our barriers end that, is shown by ``tests/test_barrier.py`` in a second.
"""

import os
from collections.abc import Callable
from importlib import import_module
from itertools import count
from types import SimpleNamespace
from typing import Any

from vfiouser_virtio.guest import DriverVirtqueue
from vfiouser_virtio.vring import Chain, PackedRing, SplitRing

_DEVICE: Any = import_module("vfiouser_virtio.testing.stress.device")
_WITH_BARRIERS = (
    "vfiouser_virtio.vring.split",
    "vfiouser_virtio.vring.packed",
    "vfiouser_virtio.guest.split_virtqueue",
    "vfiouser_virtio.guest.packed_virtqueue",
)


def no_barriers() -> None:
    """Neither side waits for its stores before it looks whether it may sleep, or must wake the other one."""
    for name in _WITH_BARRIERS:
        module: Any = import_module(name)
        module.full_barrier = lambda: None


def device_look() -> None:
    """The device asks for a notification and sleeps, without looking once more."""
    for kind in (SplitRing, PackedRing):
        original = kind.request_notification

        def request_notification(self: Any, original: Callable[[Any], bool] = original) -> bool:
            original(self)
            return False

        kind.request_notification = request_notification  # type: ignore[method-assign]  # that is what this is for


def device_early_look() -> None:
    """The device looks, then asks for a notification, and believes what it has seen before."""
    for kind in (SplitRing, PackedRing):
        original = kind.request_notification

        def request_notification(self: Any, original: Callable[[Any], bool] = original) -> bool:
            seen = bool(self.has_available())
            original(self)
            return seen

        kind.request_notification = request_notification  # type: ignore[method-assign]


def driver_look() -> None:
    """The driver turns callbacks on and sleeps, without looking once more."""

    def restart(self: Any) -> bool:
        self._callbacks = True
        self._enable_interrupts()
        return True

    DriverVirtqueue.restart = restart  # type: ignore[method-assign]


def device_silence() -> None:
    """Every 256th interrupt is forgotten."""
    number = count(1)

    def eventfd_write(fd: int, value: int) -> None:
        if next(number) % 256:
            os.eventfd_write(fd, value)

    _DEVICE.os = SimpleNamespace(**{**vars(os), "eventfd_write": eventfd_write})


def device_contents() -> None:
    """One answer in 256 is that of another buffer."""
    original: Callable[[Chain, int], None] = _DEVICE.serve
    _DEVICE.serve = lambda chain, number: original(chain, number ^ (number % 256 == 255))


SABOTAGE: dict[str, tuple[str, Callable[[], None]]] = {
    function.__name__.replace("_", "-"): (side, function)
    for side, function in (
        ("device", device_look),
        ("device", device_early_look),
        ("driver", driver_look),
        ("device", device_silence),
        ("device", device_contents),
        ("both", no_barriers),
    )
}
"""By name: in which process, and how."""
