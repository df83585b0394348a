"""Virtio over PCI (virtio 1.4, 4.1): a PCI function that is only a transport, for one child device of the virtio bus.

::

    BAR1   4 KiB          MSI-X table @0, PBA @0x800 (grows past 128 vectors); its own BAR: QEMU owns the table
    BAR4  16 KiB  @0x0000 common configuration, 64 bytes
                  @0x1000 ISR status, 1 byte
                  @0x2000 device configuration
                  @0x3000 notifications, 4 bytes a queue (more than 1024 queues make the BAR grow)

QEMU's own virtio devices and SPDK's have the same layout, and SPDK's client knows it by heart.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.eventfd_watch import watch
from vfiouser_virtio.eventfds import CAN_TAKE
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.memory import UnsealedMemory
from vfiouser_virtio.pci import Bar, BarKind, Identity, vendor_capability
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import CFG_SPACE_SIZE
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import (
    CAP,
    CAP_BODY,
    CFG_CAP,
    COMMON_CFG_SIZE,
    NO_VECTOR,
    NOTIFY_CAP,
    CfgType,
    Isr,
)
from vfiouser_virtio.protocols.virtio.ring import NOTIFICATION_DATA_CODEC
from vfiouser_virtio.transports.common_cfg import CommonCfg
from vfiouser_virtio.transports.identity import Style, identity
from vfiouser_virtio.transports.served_function import CONFIG_SIZE, ServedFunction
from vfiouser_virtio.vfio_device import Buffer, Hold, IoEventFd
from vfiouser_virtio.virtio import Device, DeviceCore, Offer, Stop
from vfiouser_virtio.virtio.device_checks import close_device

if TYPE_CHECKING:
    from vfiouser_virtio.transports.shared_memory import SharedWindow
    from vfiouser_virtio.virtio import Limits

logger = logging.getLogger(__name__)

MSIX_BAR, VIRTIO_BAR = 1, 4
COMMON, ISR, DEVICE, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
NOTIFY_MULTIPLIER = 4
_PAGE = 0x1000
_CFG = offsets(CFG_CAP)
# Plain ints: an interrupt is worth more than the microsecond that arithmetic with enums takes.
_ISR_QUEUE, _ISR_CONFIG = int(Isr.QUEUE), int(Isr.CONFIG)
# Features with which a notification is more than the queue's index in 16 bits.
_NOTIFIED_OTHERWISE = Feature.NOTIFICATION_DATA.mask | Feature.NOTIF_CONFIG_DATA.mask


class VirtioPci(ServedFunction):
    """Virtio device on PCI. Serve it with a protocol engine, and run `serve` beside that.

    ``ids`` is an identity style or an `Identity` of your own. ``vectors`` is the number of MSI-X vectors: by default
    one per queue and one for configuration changes; 0 leaves only INTx. ``name`` is for log lines. ``offer`` is what a
    driver may choose from, beside the features of the device's type. ``unsealed_memory`` says what becomes of memory
    whose file could become shorter. ``limits`` are those of how much the device does. ``core`` makes the
    device's core, as `DeviceCore` does.
    """

    common_cfg: type[CommonCfg] = CommonCfg
    """Class of its common configuration's registers."""

    def __init__(
        self,
        device: Device,
        *,
        ids: Style | Identity = "default",
        vectors: int | None = None,
        name: str = "",
        offer: Offer | None = None,
        limits: "Limits | None" = None,
        unsealed_memory: UnsealedMemory = "auto",
        core: Callable[..., DeviceCore] = DeviceCore,
    ) -> None:
        shown = ids if isinstance(ids, Identity) else identity(device.device_id, ids)
        # The capability of PCI Express leaves room for those of one shared memory region.
        regions = vars(device).get("shared_regions", {})  # the core says so below where its __init__ was not called
        self._express = len(regions) <= 1
        super().__init__(
            shown,
            DeviceLog(logger, name or device.name),
            config_size=CONFIG_SIZE if self._express else CFG_SPACE_SIZE,
            unsealed_memory=unsealed_memory,
        )
        self.core = core(device, self.memory, self, name=name, offer=offer, limits=limits)
        self.core.stop(Stop.NO_BUS_MASTER)
        vectors = min(len(device.queues) + 1, 2048) if vectors is None else vectors
        self._isr = 0
        self._common = self.common_cfg(self.core, vectors, on_reset=self._clear_isr)
        self._names = [queue.index.to_bytes(2, "little") for queue in device.queues]
        self._notify_size = max(_PAGE, _power_of_two(NOTIFY_MULTIPLIER * len(device.queues)))
        size = _power_of_two(NOTIFY + self._notify_size)
        self.add_bar(VIRTIO_BAR, Bar(size, self._read, self._write, BarKind.MEM64, prefetchable=True))
        self._shared = _shared_window(device) if device.shared_regions else None
        if self._shared is not None:
            self.add_bar(self._shared.index, self._shared.bar())
        self._add_capabilities(vectors)
        self.on_reset = self._reset
        self.on_bus_master = self._bus_master_changed
        self.on_quiesce = self._quiesce
        self.on_disconnected = self._client_left
        self._io_event_fds: list[IoEventFd] = []

    @property
    def device(self) -> Device:
        """The child device."""
        return self.core.device

    def _add_capabilities(self, vectors: int) -> None:
        def structure(
            cfg_type: CfgType, offset: int, length: int, tail: bytes = b"", *, bar: int = VIRTIO_BAR, shmid: int = 0
        ) -> bytes:
            body = {"cfg_type": cfg_type, "bar": bar, "id": shmid, "padding": bytes(2), "offset": offset}
            body |= {"cap_len": CAP.sizeof() + len(tail), "length": length}
            # vendor_capability() writes id, next and cap_len itself.
            return CAP_BODY.build(body)[1:] + tail

        multiplier = NOTIFY_MULTIPLIER.to_bytes(NOTIFY_CAP.sizeof() - CAP.sizeof(), "little")
        self.add_capability(vendor_capability(structure(CfgType.COMMON, COMMON, COMMON_CFG_SIZE)))
        self.add_capability(vendor_capability(structure(CfgType.ISR, ISR, 1)))
        self.add_capability(vendor_capability(structure(CfgType.DEVICE, DEVICE, _PAGE)))
        self.add_capability(vendor_capability(structure(CfgType.NOTIFY, NOTIFY, self._notify_size, multiplier)))
        if self._shared is not None:
            bar = self._shared.index
            for shmid, offset in self._shared.offsets.items():
                size = self.device.shared_regions[shmid].size
                high = b"".join((value >> 32).to_bytes(4, "little") for value in (offset, size))
                low = offset & 0xFFFF_FFFF, size & 0xFFFF_FFFF
                self.add_capability(
                    vendor_capability(structure(CfgType.SHARED_MEMORY, *low, high, bar=bar, shmid=shmid))
                )
        window = bytearray(CFG_CAP.sizeof())
        for field in ("bar", "offset", "length", "pci_cfg_data"):
            at, size = _CFG[field]
            window[at : at + size] = b"\xff" * size
        self._cfg_cap = self.add_capability(
            vendor_capability(
                CAP_BODY.build(
                    {
                        "cap_len": 0,
                        "cfg_type": CfgType.PCI,
                        "bar": 0,
                        "id": 0,
                        "padding": bytes(2),
                        "offset": 0,
                        "length": 0,
                    }
                )[1:]
                + bytes(4),
                writable=bytes(window),
                on_read=self._window_read,
                on_write=self._window_written,
            )
        )
        if vectors:
            self.add_msix(vectors, bar=MSIX_BAR)
        self.add_pm()
        if self._express:
            self.add_pcie()

    # ---- BAR 4 ---------------------------------------------------------------------------------------------------

    def _read(self, offset: int, count: int) -> bytes:
        if offset < ISR:
            return self._common.read(offset, count)
        if offset >= NOTIFY:
            return bytes(count)  # nothing is defined to be read there
        if offset >= DEVICE:
            return self.core.read_config(offset - DEVICE, count)
        return self._read_isr().ljust(count, b"\0") if offset == ISR else bytes(count)

    def _write(self, offset: int, data: Buffer) -> None:
        if offset >= NOTIFY:
            self._notified((offset - NOTIFY) // NOTIFY_MULTIPLIER, data)
        elif offset < ISR:
            self._common.write(offset, data)
        elif offset >= DEVICE:
            self.core.write_config(offset - DEVICE, bytes(data))

    def _notified(self, index: int, data: Buffer) -> None:
        """A write to a queue's notification address: its name in 16 bits, and perhaps 16 bits of data (4.1.5.2)."""
        if index >= len(self.core.queues):
            return
        size = len(data)
        if size == 2 and not self.core.device.driver_features & _NOTIFIED_OTHERWISE and data == self._names[index]:
            self.core.queues[index].kick()  # what nearly all of them are; `notify_queue` has nothing to check then
            return
        if size not in (2, NOTIFICATION_DATA_CODEC.size):
            self.core.complain("notification size", f"notified queue {index} with {size} bytes, not 2 or 4")
        elif self.core.running:
            name = int.from_bytes(data[:2], "little")
            by_config_data = self.core.device.negotiated(Feature.NOTIF_CONFIG_DATA)
            due = self.core.notif_config_data(index) if by_config_data else index
            if name != due:
                what = "queue_notif_config_data" if by_config_data else "index"
                self.core.complain("notification name", f"notified queue {index} as {name:#x}; its {what} is {due:#x}")
        following = int.from_bytes(data[2:], "little") if size == NOTIFICATION_DATA_CODEC.size else None
        self.core.notify_queue(index, following)

    def _read_isr(self) -> bytes:
        """Reading clears, and de-asserts INTx (IS1, IS3)."""
        value, self._isr = self._isr, 0
        self.set_intx(False)
        return bytes([value])

    # ---- the window in config space (4.1.4.9) --------------------------------------------------------------------

    def _window(self) -> tuple[int, int, int] | None:
        """BAR, offset and length that the driver has set; None when they name no access that a BAR can have."""
        bar, offset, length = (
            self.config.load(self._cfg_cap + at, size) for at, size in (_CFG["bar"], _CFG["offset"], _CFG["length"])
        )
        if length not in (1, 2, 4) or offset % length or not 0 < offset + length <= self.bars.size(bar):
            return None
        return bar, offset, length

    def _touches_data(self, offset: int, count: int) -> bool:
        at, size = _CFG["pci_cfg_data"]
        return offset < at + size and offset + count > at

    def _window_read(self, offset: int, count: int) -> None:
        window = self._window() if self._touches_data(offset, count) else None
        if window is not None:
            data = bytes(self.bars.read(*window))
            self.config.store(self._cfg_cap + _CFG["pci_cfg_data"][0], data.ljust(4, b"\0"))

    def _window_written(self, offset: int, data: bytes) -> None:
        window = self._window() if self._touches_data(offset, len(data)) else None
        if window is not None:
            bar, at, length = window
            value = self.config.load(self._cfg_cap + _CFG["pci_cfg_data"][0], 4).to_bytes(4, "little")
            self.bars.write(bar, at, value[:length])

    # ---- interrupts: what virtio.InterruptSink asks ---------------------------------------------------

    def queue_interrupt(self, index: int) -> None:
        """A used buffer notification: the queue's vector, or bit 0 of ISR status and INTx (4.1.5.2)."""
        msix = self.msix
        if msix is not None and msix.enabled:
            vector = self._common.queue_vectors[index]
            if vector != NO_VECTOR:
                msix.fire(vector)
        else:
            self._isr |= _ISR_QUEUE
            self.set_intx(True)

    def config_interrupt(self) -> None:
        """A configuration change notification: bit 1 of ISR status in any case (IS2), then the vector or INTx."""
        self._isr |= _ISR_CONFIG
        if not self.msix_enabled:
            self.set_intx(True)
        elif self._common.config_vector != NO_VECTOR:
            self.raise_msix(self._common.config_vector)

    # ---- the life of the function --------------------------------------------------------------------------------

    def _reset(self) -> Hold | None:
        self._common.reset()
        self._clear_isr()
        return self.core.reset()

    def _clear_isr(self) -> None:
        self._isr = 0
        self.set_intx(False)

    def _bus_master_changed(self, allowed: bool) -> None:
        self._log.debug("bus master %s", "on" if allowed else "off")
        if allowed:
            self.core.start(Stop.NO_BUS_MASTER)
        else:
            self.core.stop(Stop.NO_BUS_MASTER)

    def _quiesce(self, quiet: bool) -> None:
        if quiet:
            self.core.stop(Stop.QUIESCED)
        else:
            self.core.start(Stop.QUIESCED)

    def _client_left(self) -> None:
        # The device keeps its state, but memory that the next client maps at the same addresses may be another guest's:
        # nothing is touched before that client kicks a queue or resets the device.
        self.core.stop(Stop.UNTIL_KICK)

    def io_fds(self, index: int) -> Sequence[IoEventFd]:
        """An ioeventfd per queue notification, made when a client first asks.

        None where NOTIFICATION_DATA is offered: an eventfd says that something was written, and not what;
        and where this kernel cannot read one without waiting.
        """
        if index != VIRTIO_BAR or self._nursery is None or self.core.offer.notification_data or not CAN_TAKE:
            return super().io_fds(index)
        if not self._io_event_fds:
            for queue in self.core.queues:
                fd = self._make_event_fd(queue.index)
                self._io_event_fds.append(IoEventFd(NOTIFY + NOTIFY_MULTIPLIER * queue.index, 2, fd))
                self._nursery.start_soon(watch, fd, queue.kick)
        return self._io_event_fds

    def _make_event_fd(self, _queue: int) -> int:
        """The eventfd of a queue's notifications."""
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    async def _run_device(self) -> None:
        await self.core.serve()

    def _close(self) -> None:
        close_all(entry.fd for entry in self._io_event_fds)
        self._io_event_fds = []
        super()._close()
        if self._shared is not None:
            self._shared.mapping.close()
        close_device(self.device, self.core.name)


def _shared_window(device: Device) -> "SharedWindow":
    from vfiouser_virtio.transports.shared_memory import SharedWindow  # only here: few devices have any

    return SharedWindow(device.shared_regions.values())


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()
