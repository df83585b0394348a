"""Ports of the driver side: memory that a device can reach, PCI accesses, a virtio transport.

::

    drivers ─▶ VirtioBus ─▶ DriverVirtqueue ─▶ Transport ─┬─▶ guest.pci_transport ─▶ PciPort ─┬─▶ vfio_user client
                                                          │                                   └─▶ QEMU by qtest
                                                          └─▶ transports.loopback (in process)

These are structural: who implements them does not import this module. Whatever may have to wait for the other side is
async; what never waits is not: memory, and the notification of a queue.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from vfiouser_virtio.dma import DmaBuffer


class Ids(Protocol):
    """PCI-style numbers by which drivers are matched; a transport that is not PCI shows what PCI would."""

    @property
    def vendor(self) -> int: ...

    @property
    def device(self) -> int: ...

    @property
    def subsystem_vendor(self) -> int: ...

    @property
    def subsystem(self) -> int: ...

    @property
    def class_code(self) -> int:
        """24 bits: base class, sub-class, programming interface."""
        ...

    @property
    def virtio_id(self) -> int:
        """Virtio device type (virtio 1.4, 5): from the PCI device id, 0x1040 + type."""
        ...


class DmaMemory(Protocol):
    """Allocator of memory that devices may reach."""

    def alloc(self, size: int, align: int = 16) -> DmaBuffer:
        """``size`` zeroed bytes at a multiple of ``align`` (a power of two). Raises MemoryError if there is no room."""
        ...

    def free(self, buffer: DmaBuffer) -> None:
        """Give it back."""
        ...


class PciPort(Protocol):
    """PCI function as a guest's CPU reaches it; sizes are 1, 2, 4 or 8 bytes, values unsigned, little-endian."""

    @property
    def name(self) -> str:
        """For messages: the socket, or the slot."""
        ...

    @property
    def memory(self) -> DmaMemory: ...

    async def config_read(self, offset: int, size: int) -> int: ...

    async def config_write(self, offset: int, size: int, value: int) -> None: ...

    async def bar_read(self, bar: int, offset: int, size: int) -> int: ...

    async def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Returns when the device has seen the write."""
        ...

    def bar_post(self, bar: int, offset: int, size: int, value: int) -> None:
        """A write without a reply, in order with all others (vfio-user: NO_REPLY)."""
        ...

    async def connect_msix(self, handlers: list[Callable[[], None]]) -> None:
        """Route MSI-X vectors 0 … len-1 to handlers; an empty list takes all routes away.

        The caller has sized that against the capability, and enables MSI-X in the capability itself.
        """
        ...

    async def connect_intx(self, handler: Callable[[], None] | None) -> None:
        """Route INTx to a handler, which must make the device lower the line (read its ISR status); None: no route.

        The port unmasks the line again after the handler has run.
        """
        ...


@runtime_checkable
class MappingPort(Protocol):
    """Port over which memory of a BAR can be mapped, beside what `PciPort` has."""

    async def bar_map(self, bar: int, offset: int, size: int) -> memoryview:
        """That memory, reached without a word to the device. Raises PeerError where the device has not said so."""
        ...


@runtime_checkable
class MsiPort(Protocol):
    """Port that has MSI, beside what `PciPort` has."""

    async def connect_msi(self, handlers: Sequence[Callable[[], None]]) -> None:
        """As `PciPort.connect_msix`, for MSI."""
        ...


class Transport(Protocol):
    """Virtio device as its driver reaches it (virtio 1.4, 2 and 3), without any notion of registers."""

    @property
    def name(self) -> str: ...

    @property
    def ids(self) -> Ids: ...

    @property
    def memory(self) -> DmaMemory: ...

    @property
    def num_queues(self) -> int: ...

    async def map_shared_memory(self, region_id: int) -> memoryview:
        """A shared memory region (2.10), all of it. Raises LookupError where the device has none of that id.

        Raises ConfigError where it cannot be mapped here.
        """
        ...

    async def read_status(self) -> int: ...

    async def write_status(self, value: int) -> None: ...

    async def read_features(self) -> int:
        """All bits that the device offers."""
        ...

    async def write_features(self, features: int) -> None:
        """What the driver accepts of them."""
        ...

    async def read_config(self, offset: int, size: int) -> bytes: ...

    async def write_config(self, offset: int, data: bytes) -> None: ...

    async def read_generation(self) -> int: ...

    async def queue_max_size(self, index: int) -> int:
        """0: there is no such queue."""
        ...

    async def enable_queue(self, index: int, size: int, desc: int, driver: int, device: int) -> None:
        """Set a queue's size and the addresses of its three parts, and enable it."""
        ...

    async def reset_queue(self, index: int) -> None:
        """Reset one queue (RING_RESET) and wait until that is complete."""
        ...

    def notify(self, index: int, next_available: int | None = None) -> None:
        """The available buffer notification; with NOTIFICATION_DATA also next_off and next_wrap, as 16 bits (2.9).

        How the queue is named, by its index or (NOTIF_CONFIG_DATA) as the device wants it, is the transport's matter.
        """
        ...

    async def connect_interrupts(self, on_queue: Callable[[int], None], on_config: Callable[[], None]) -> None:
        """From now on used buffer and configuration change notifications arrive at these; never both at once."""
        ...

    async def disconnect_interrupts(self) -> None: ...
