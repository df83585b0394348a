"""Hosting of a `HostedVfioDevice` by libvfio-user: regions, interrupts and memory set up, callbacks answered.

::

    vfu_run_ctx ──▶ region access ──▶ region_read, region_write        at once
                    quiesce       ──▶ quiesce, or later: `quieting`    before each DMA_MAP, DMA_UNMAP and reset
                    dma_register  ──▶ dma_map_alias
                    dma_unregister ─▶ dma_unmap ─▶ Hold ─┐
                    reset         ──▶ reset, disconnected ─▶ `take_hold`, waited for before the next request
                    irq_state     ──▶ set_irqs (INTx is masked, unmasked)

The device's ioeventfds are not offered: the library's entries in that reply have 48 bytes, the protocol's 40. Nothing
waits in here, for C is on the stack. The library answers the client as soon as the callback returns; by then
no request touches the client's memory, because the device has been quiet since the quiesce callback.
"""

import errno
import logging

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.libvfio_user.bindings import Access, Context, DevIrqType, DmaInfo, RegionFlag, ResetType
from vfiouser_virtio.libvfio_user.client import LibraryClient
from vfiouser_virtio.libvfio_user.log import forward_log
from vfiouser_virtio.vfio_device import AnswerLater, Hold, HostedVfioDevice, IrqSetFlags, PciIrq, PciRegion, RegionFlags

logger = logging.getLogger(__name__)

MAX_DMA_MAPS = 15000
"""DMA regions of one client: each takes up to three of the process's 65530 mappings, one of them the library's."""

_PROT_READ, _PROT_WRITE = 1, 2
# Regions without a file descriptor that are worth a word: ROM never has one, RAM always should. Whose RAM has them is
# not told of VGA memory and mapped BARs of other devices, which have none, too (QEMU maps by address: RAM comes first).
_RAM = 1 << 20
_SMALLEST_MEMORY_BAR = 16


class HostedDevice:
    """Device behind one context, with at most one client at a time."""

    def __init__(self, context: Context, vfio_device: HostedVfioDevice, name: str) -> None:
        self.client: LibraryClient | None = None
        self.quieting: Hold | None = None
        """The library waits for the end of this; until then none of its functions may be called but one."""
        self.log = DeviceLog(logger, name)
        self._context = context
        self._vfio_device = vfio_device
        self._name = name
        self._holds: list[Hold] = []
        self._regions: dict[tuple[int, int], int] = {}  # (address, size) -> where the library has mapped it
        self._has_fds = False  # of the client's memory, some has come with a file descriptor
        self._refused = False  # an interrupt that the trigger could not send
        self._accessed = False  # the last request was a region access
        forward_log(context, self.log)
        self._set_up()

    def _set_up(self) -> None:
        context, vfio_device = self._context, self._vfio_device
        for index in PciRegion:
            info = vfio_device.region_info(index)
            if info.size:
                flags = _region_flags(index, info.flags, info.size)
                context.setup_region(index, info.size, self._access(index), flags)
        for irq in (PciIrq.INTX, PciIrq.MSI, PciIrq.MSIX):
            context.setup_device_nr_irqs(irq, _irq_count(vfio_device, irq))
        context.setup_irq_state_callback(DevIrqType.INTX, self._irq_state)
        context.setup_device_dma(self._dma_registered, self._dma_unregistered, MAX_DMA_MAPS)
        context.setup_device_reset_cb(self._reset)
        context.setup_device_quiesce_cb(self._quiesce)
        context.realize_ctx()
        vfio_device.set_trigger(self._trigger)

    # ---- what the server does ------------------------------------------------------------------------------------

    def connected(self, client: LibraryClient) -> None:
        """A client has negotiated."""
        self.log.forget()
        self.client = client
        self._has_fds = False
        self._refused = True
        self._vfio_device.connected(client)

    def gone(self) -> None:
        """The context is no longer served."""
        self._vfio_device.set_trigger(None)

    def take_hold(self) -> Hold | None:
        """What the last callbacks have left to be waited for."""
        if not self._holds:
            return None
        holds, self._holds = self._holds, []
        return Hold.all(holds)

    def quiet(self) -> None:
        """`quieting` has ended: let the library go on with what it has put off, then the device."""
        self.quieting = None
        try:
            self._context.device_quiesced()
        finally:
            self._vfio_device.resume()
            self.request_done()

    def request_done(self) -> None:
        """A request has been handled: if it was none for a region, it may have brought an eventfd that was missing."""
        if self._refused and not self._accessed:
            self._refused = False
            self._vfio_device.retry_interrupts()
        self._accessed = False

    # ---- what the library asks -----------------------------------------------------------------------------------

    def _access(self, index: int) -> Access:
        read, write = self._vfio_device.region_read, self._vfio_device.region_write

        def access(offset: int, buffer: memoryview, is_write: bool) -> None:
            self._accessed = True
            try:
                if is_write:
                    write(index, offset, buffer)
                else:
                    buffer[:] = read(index, offset, len(buffer))
            except AnswerLater as later:
                self.log.once("late", "an answer that was to come later comes at once: libvfio-user cannot wait")
                later.hold.expire()
                if not is_write:
                    buffer[:] = later.data
            except Exception as error:
                raise self._refusal(f"region {index}", error) from None

        return access

    def _quiesce(self) -> bool:
        self.quieting = self._vfio_device.quiesce()
        return self.quieting is None

    def _dma_registered(self, info: DmaInfo) -> None:
        readable, writable = bool(info.prot & _PROT_READ), bool(info.prot & _PROT_WRITE)
        where = (info.iova, info.size)
        if info.vaddr is None:
            if readable and writable and info.size >= _RAM and not self._has_fds:
                self.log.once(
                    "no fd",
                    f"DMA_MAP of {info.iova:#x}+{info.size:#x} without a file descriptor: the device cannot reach "
                    "this memory with --engine libvfio-user. In QEMU use -object memory-backend-memfd,id=mem,size=…,"
                    "share=on -machine …,memory-backend=mem; or use --engine vfio-user",
                )
            return
        self._has_fds = True
        if self._regions.get(where) == info.vaddr:
            return  # the library takes the same DMA_MAP twice
        try:
            self._vfio_device.dma_map_alias(
                *where, readable=readable, writable=writable, vaddr=info.vaddr, page_size=info.page_size
            )
        except PeerError as error:
            if error.errno == errno.EPERM and self.client is not None:
                # By unsealed-memory. No errno reaches the client from here, but the end of its connection does.
                self.log.error("%s; connection closed", error)
                self.client.hang_up()
                return
            message = "%s; the client cannot be told, so it goes on without"
            self.log.once(("dma_map", error.errno), message, error)
        else:
            self._regions[where] = info.vaddr

    def _dma_unregistered(self, info: DmaInfo) -> None:
        where = (info.iova, info.size)
        if self._regions.pop(where, None) is not None:
            self._keep(self._vfio_device.dma_unmap(*where))

    def _reset(self, kind: ResetType) -> None:
        try:
            if kind != ResetType.LOST_CONN:
                self._keep(self._vfio_device.reset())
            elif self.client is not None:
                client, self.client = self.client, None
                client.close()
                self._keep(self._vfio_device.disconnected())
        except Exception as error:
            raise self._refusal(f"reset ({kind.name})", error) from None

    def _irq_state(self, start: int, count: int, mask: bool) -> None:
        action = IrqSetFlags.ACTION_MASK if mask else IrqSetFlags.ACTION_UNMASK
        try:
            self._vfio_device.set_irqs(PciIrq.INTX, IrqSetFlags.DATA_NONE | action, start, count, b"", ())
        except PeerError as error:
            self.log.once("set_irqs", "%s", error)

    def _trigger(self, vector: int) -> bool:
        if self.client is None or self.quieting is not None:
            self._refused = True
            return False
        try:
            self._context.irq_trigger(vector)
        except OSError:
            self._refused = True
            return False
        return True

    def _keep(self, hold: Hold | None) -> None:
        if hold is not None and not hold.done:
            self._holds.append(hold)

    def _refusal(self, what: str, error: Exception) -> OSError:
        """The errno for the client, after a word in our own log."""
        if isinstance(error, PeerError):
            self.log.once((what, error.errno), "%s", error)
            return OSError(error.errno, str(error))
        self.log.once((what, type(error)), "%s: a bug of the device", what, level=logging.ERROR, error=error)
        return OSError(errno.EIO, "a bug of the device")


def _irq_count(vfio_device: HostedVfioDevice, index: PciIrq) -> int:
    """0 where the device has none of that index, whichever way it says so."""
    try:
        return vfio_device.irq_info(index).count
    except PeerError:
        return 0


def _region_flags(index: int, offered: RegionFlags, size: int) -> int:
    """Config space is all ours. The library looks at a BAR's kind only to check its size: the header is ours, too."""
    if index == PciRegion.CONFIG:
        return RegionFlag.RW | RegionFlag.ALWAYS_CB
    flags = RegionFlag.MEM if size >= _SMALLEST_MEMORY_BAR else RegionFlag(0)
    if offered & RegionFlags.READ:
        flags |= RegionFlag.READ
    if offered & RegionFlags.WRITE:
        flags |= RegionFlag.WRITE
    return flags
