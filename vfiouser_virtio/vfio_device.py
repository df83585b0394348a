"""VFIO device interface: the seam between a protocol engine and a device, in both directions.

::

    vfio_user.server    ──▶  VfioDevice:  device_info, region_read, dma_map, set_irqs, reset, …
    libvfio_user.server ──▶     │
                                ▼
    Client (dma_read, dma_write)  ◀── memory that has no file descriptor

An engine calls a ``VfioDevice`` from one task (one thread), one call at a time, in the order of the client's messages.
No call may block or await. Where work must end before the client gets its answer, the call returns a `Hold`; an access
of a region that is answered later raises `AnswerLater`.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from vfiouser_virtio.protocols.vfio_user import (
    DeviceFlags,
    IrqInfoFlags,
    IrqSetFlags,
    PciIrq,
    PciRegion,
    RegionFlags,
)

__all__ = [
    "MAX_DMA_MAPS",
    "AnswerLater",
    "Buffer",
    "DeviceFlags",
    "DeviceInfo",
    "DmaClient",
    "Hold",
    "HostedVfioDevice",
    "IoEventFd",
    "IrqInfo",
    "IrqInfoFlags",
    "IrqSetFlags",
    "PciIrq",
    "PciRegion",
    "RegionFlags",
    "RegionInfo",
    "VfioDevice",
]

MAX_DMA_MAPS = 28000
"""DMA mappings of one client. Each may take two of the process's memory mappings, of which Linux allows 65530
(vm.max_map_count) and `address_space` gives 7/8 to devices: as many as one device alone can have."""

Buffer = bytes | bytearray | memoryview

Trigger = Callable[[int], bool]
"""Signals an interrupt vector; INTx is vector 0. False: not now, because the client has given no eventfd for it."""


class DeviceInfo(NamedTuple):
    """Answer to DEVICE_GET_INFO."""

    flags: DeviceFlags
    num_regions: int
    num_irqs: int


_NONE = RegionFlags(0)


class RegionInfo(NamedTuple):
    """Answer to DEVICE_GET_REGION_INFO; a region of ``size`` 0 is absent.

    ``capabilities`` are (id, version, body) triples of linux/vfio.h's ``vfio_info_cap_header`` chain; the engine lays
    them out. ``fds`` stay the device's own: the engine sends duplicates.
    """

    flags: RegionFlags = _NONE
    size: int = 0
    offset: int = 0
    capabilities: tuple[tuple[int, int, bytes], ...] = ()
    fds: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class IrqInfo:
    """Answer to DEVICE_GET_IRQ_INFO: how many interrupts the index has and what can be done with them."""

    flags: IrqInfoFlags
    count: int


class IoEventFd(NamedTuple):
    """Sub-region of DEVICE_GET_REGION_IO_FDS for an ioeventfd: a write of ``size`` bytes at ``offset`` signals ``fd``.

    ``size`` 0 matches a write of any width. ``fd`` stays the device's own.
    """

    offset: int
    size: int
    fd: int
    flags: int = 0
    datamatch: int = 0


class Hold:
    """Deferred completion: work that must end before a reply is sent, or before the next client is let in.

    The engine adds one callback with `when_done` and calls `expire` if its timeout ends first. ``expire`` asks the
    work to fail quickly; the hold still ends only when nothing touches the client's memory any more.
    """

    __slots__ = ("_callbacks", "_on_expire", "_pending")

    def __init__(self, pending: int = 1, on_expire: Callable[[], None] | None = None) -> None:
        self._pending = pending
        self._on_expire = on_expire
        self._callbacks: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """Whether all the work has ended."""
        return self._pending == 0

    def finish(self) -> None:
        """One piece of work has ended. The last one runs the callbacks."""
        assert self._pending > 0, "finish() called more often than there was work"
        self._pending -= 1
        if self._pending == 0:
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, when all the work has ended: at once if it has."""
        if self._pending == 0:
            callback()
        else:
            self._callbacks.append(callback)

    def expire(self) -> None:
        """Patience is over: make the work fail. Does not end the hold by itself."""
        if self._pending and self._on_expire is not None:
            on_expire, self._on_expire = self._on_expire, None
            on_expire()

    @staticmethod
    def all(holds: Sequence["Hold | None"]) -> "Hold | None":
        """One hold that ends with the last of several; None when none of them is pending."""
        pending = [hold for hold in holds if hold is not None and not hold.done]
        if not pending:
            return None
        if len(pending) == 1:
            return pending[0]

        def expire() -> None:
            for hold in pending:
                hold.expire()

        joined = Hold(len(pending), expire)
        for hold in pending:
            hold.when_done(joined.finish)
        return joined


class AnswerLater(Exception):
    """Region access that has been taken, and whose answer is to be sent when ``hold`` has ended.

    ``data`` is what was read, or a function that returns it then, and may raise what the access itself may. What the
    client sends meanwhile waits behind it, in order. When the engine's timeout ends first (`Hold.expire`), a device
    that waits for others should have an answer at once: QEMU gives up on a server after 5 s. With ``--engine
    libvfio-user`` that is before the answer is waited for at all.
    """

    def __init__(self, hold: Hold, data: Buffer | Callable[[], Buffer] = b"") -> None:
        super().__init__("the answer comes later")
        self.hold = hold
        self._data = data

    @property
    def data(self) -> Buffer:
        """What was read; nothing for a write."""
        return self._data() if callable(self._data) else self._data

    def kept(self) -> "AnswerLater":
        """Itself, to be kept by what has caught it: without the frames that it came through, which may have it."""
        self.__traceback__ = self.__context__ = None
        return self

    @staticmethod
    def joined(pieces: "Sequence[AnswerLater | Buffer]") -> "AnswerLater":
        """One of several pieces of an access, in order, of which some have their answer."""
        hold = Hold.all([each.kept().hold for each in pieces if isinstance(each, AnswerLater)])
        return AnswerLater(
            hold or Hold(0),
            lambda: b"".join(each.data if isinstance(each, AnswerLater) else each for each in pieces),
        )


class DmaClient(Protocol):
    """Client of a connection, for access to memory that came without a file descriptor."""

    @property
    def name(self) -> str:
        """Who this is, for messages: ``/run/x/blk0.sock (pid 4711)``."""
        ...

    @property
    def uid(self) -> int | None:
        """The user of its process when it connected (SO_PEERCRED); None where it is this process."""
        ...

    def dma_read(self, address: int, count: int) -> Awaitable[bytes]:
        """Read ``count`` bytes of client memory with DMA_READ messages of a size that every client survives.

        Raises PeerError with the client's errno when it refuses, or when the connection ends first.
        """
        ...

    def dma_write(self, address: int, data: Buffer) -> Awaitable[None]:
        """Write client memory with DMA_WRITE; returns when the client has confirmed it. Errors as `dma_read`."""
        ...


class VfioDevice(Protocol):
    """Device as a protocol engine sees it. Every method may raise PeerError, whose errno becomes the reply.

    File descriptors given to `dma_map` and `set_irqs` are the device's from the call on, whether it raises or not.
    """

    def connected(self, client: DmaClient) -> None:
        """A client has negotiated its version; no other call comes before this."""
        ...

    def disconnected(self) -> Hold | None:
        """The client is gone: drop its memory and interrupt fds, keep the rest of the device's state.

        (vfio-user "Client Disconnection".) The next client is served when the hold ends.
        """
        ...

    def device_info(self) -> DeviceInfo:
        """DEVICE_GET_INFO."""
        ...

    def region_info(self, index: int) -> RegionInfo:
        """DEVICE_GET_REGION_INFO of one region."""
        ...

    def irq_info(self, index: int) -> IrqInfo:
        """DEVICE_GET_IRQ_INFO of one interrupt index."""
        ...

    def io_fds(self, index: int) -> Sequence[IoEventFd]:
        """DEVICE_GET_REGION_IO_FDS of one region."""
        ...

    def region_read(self, index: int, offset: int, count: int) -> Buffer:
        """REGION_READ: exactly ``count`` bytes. ``offset + count`` has not been checked against the region's size.

        Raises `AnswerLater` with them.
        """
        ...

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        """REGION_WRITE. ``data`` is only valid during the call; ``offset`` has not been checked.

        Raises `AnswerLater`.
        """
        ...

    def dma_map(self, address: int, size: int, *, readable: bool, writable: bool, fd: int | None, offset: int) -> None:
        """DMA_MAP: ``size`` bytes of client memory at DMA address ``address``; ``offset`` is that in ``fd``."""
        ...

    def dma_unmap(self, address: int, size: int) -> Hold | None:
        """DMA_UNMAP of every mapping inside the range. The reply waits for the hold."""
        ...

    def set_irqs(
        self, index: int, flags: IrqSetFlags, start: int, count: int, data: Buffer, fds: Sequence[int]
    ) -> None:
        """DEVICE_SET_IRQS: ``data`` is the array of DATA_BOOL (else empty), ``fds`` the eventfds of DATA_EVENTFD.

        The engine has checked it (`irq_set.check_irq_set`); ``fds`` are the device's from now on.
        """
        ...

    def reset(self) -> Hold | None:
        """DEVICE_RESET: back to power-on state, but for DMA mappings and eventfds. The reply waits for the hold."""
        ...


class HostedVfioDevice(VfioDevice, Protocol):
    """Device for an engine that keeps the client's eventfds and mappings to itself, as libvfio-user does.

    It calls `dma_map_alias` instead of `VfioDevice.dma_map`, and `VfioDevice.set_irqs` only to mask and unmask INTx.
    """

    def set_trigger(self, trigger: Trigger | None) -> None:
        """Signal interrupts with ``trigger`` from now on, or again with eventfds from `VfioDevice.set_irqs`.

        What it refuses stays pending until `retry_interrupts`.
        """
        ...

    def retry_interrupts(self) -> None:
        """The trigger may take now what it has refused."""
        ...

    def dma_map_alias(
        self, address: int, size: int, *, readable: bool, writable: bool, vaddr: int, page_size: int
    ) -> None:
        """As `VfioDevice.dma_map`, of a file that the engine has mapped at ``vaddr`` in pages of ``page_size`` bytes.

        The device takes a mapping of its own: the engine may unmap its one as soon as this has returned.
        """
        ...

    def quiesce(self) -> Hold | None:
        """Stop all accesses to the client's memory. None: there is none, before other tasks have their turn again.

        Else no more requests are begun until `resume`, and the hold ends with the last that was under way.
        """
        ...

    def resume(self) -> None:
        """The hold of `quiesce` has ended, and what was to be done in the quiet is done."""
        ...
