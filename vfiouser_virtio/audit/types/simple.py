"""Watches of entropy and input devices (virtio 1.4, 5.4.6 and 5.8.6)."""

from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.protocols.virtio.input import EVENT

_INPUT = "5.8.6.1 Device Operation"

RNG_READABLE = must(
    "rng/readable",
    "5.4.6.1 Device Operation",
    "No device-readable buffers are put into the queue of an entropy device.",
    "WRITE of each buffer",
)
EVENT_BUFFER = must(
    "input/event-buffer",
    _INPUT,
    "Buffers of eventq are device-writable, of at least 8 bytes.",
    "buffers of queue 0",
)
STATUS_BUFFER = must("input/status-buffer", _INPUT, "Buffers of statusq have at least 8 bytes.", "buffers of queue 1")


class RngWatch(RequestWatch):
    """Watch of an entropy device's queue."""

    def available(self, chain: SeenChain) -> None:
        """All of it is to be written."""
        if chain.readable:
            self.broke(RNG_READABLE, f"a buffer with {chain.out_length:#x} readable bytes")


class InputWatch(RequestWatch):
    """Watch of an input device's queues."""

    def available(self, chain: SeenChain) -> None:
        """An event's buffer, or a status."""
        size = EVENT.sizeof()
        if chain.queue == 0 and (chain.readable or chain.in_length < size):
            seen = f"a buffer of eventq with {chain.out_length:#x} readable and {chain.in_length:#x} writable bytes"
            self.broke(EVENT_BUFFER, seen)
        elif chain.queue == 1 and chain.out_length < size:
            self.broke(STATUS_BUFFER, f"a buffer of statusq with {chain.out_length:#x} readable bytes")
