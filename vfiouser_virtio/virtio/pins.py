"""Pins of guest memory by requests: what DMA_UNMAP and resets wait for, and may cancel."""

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from vfiouser_virtio.memory import GuestMemory, Pin, Ranges

if TYPE_CHECKING:
    from vfiouser_virtio.virtio.virtqueue import Virtqueue


class Pins:
    """Pins of one queue."""

    def __init__(self) -> None:
        self._pins: dict[Pin, GuestMemory] = {}
        self._when_idle: list[Callable[[], None]] = []
        # Not in `Virtqueue`: with more than 30 attributes, CPython (3.11) looks each of them up in a slower way.
        self.held = 0
        """How many of them are no tasks: see `Queue.hold`."""
        self.reap: Callable[[], bool] | None = None
        self.at_kick: Callable[[], bool] | None = None
        """See `Queue.bursts` for both."""
        self.replies: Virtqueue | None = None
        """See `Queue.replied_in`."""

    @property
    def busy(self) -> bool:
        """Whether the buffers of a chain are in use now, perhaps by the kernel."""
        return bool(self._pins)

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call once when nothing is pinned: at once if nothing is."""
        if self._pins:
            self._when_idle.append(callback)
        else:
            callback()

    def cancel(self) -> None:
        """Make all those requests fail. What the kernel is doing it still does."""
        for pin in list(self._pins):
            pin.cancel()

    def add(self, memory: GuestMemory, ranges: Callable[[], Ranges], cancel: Callable[[], None]) -> Pin:
        """One more request; `remove` ends it."""
        pin = memory.pin(ranges, cancel)
        self._pins[pin] = memory
        return pin

    def remove(self, pin: Pin) -> None:
        """Nothing touches its buffers any more."""
        self._pins.pop(pin).unpin(pin)
        if not self._pins:
            callbacks, self._when_idle = self._when_idle, []
            for callback in callbacks:
                callback()


class Pinned:
    """Pin of a chain's buffers, from `Queue.pinned`; a context manager around a cancel scope.

    The pin holds from the call on: the block may be another task's, and nothing can unmap the buffers before it starts.
    """

    __slots__ = ("_pin", "_pins", "_scope", "revoked")

    def __init__(self, pins: Pins, memory: GuestMemory, ranges: Callable[[], Ranges]) -> None:
        self._pins = pins
        self._scope = trio.CancelScope()
        self._pin = pins.add(memory, ranges, self._scope.cancel)
        self.revoked = False
        """After the block: it was cancelled because its memory went away."""

    def __enter__(self) -> "Pinned":
        self._scope.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        swallow = self._scope.__exit__(kind, error, traceback)
        self.revoked = self._scope.cancelled_caught
        self._pins.remove(self._pin)
        return swallow
