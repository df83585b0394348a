"""PCI endpoint (PCI Local Bus 3.0 §6, PCIe 4.0 §7.5) behind the seam of ``vfiouser_virtio.vfio_device``."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.pci.bars import Bar, Bars
from vfiouser_virtio.pci.capabilities import (
    Capability,
    exp_capability,
    pm_capability,
)
from vfiouser_virtio.pci.config_space import ConfigSpace
from vfiouser_virtio.pci.function_interrupts import InterruptingFunction, check_index
from vfiouser_virtio.pci.header import define_header
from vfiouser_virtio.pci.identity import Identity
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import (
    CFG_SPACE_SIZE,
    EXP_CAP,
    MSI_CAP,
    MSIX_CAP,
    PM_CAP,
    TYPE0_HEADER,
    ExpDevCtl,
    PciCommand,
    PciStatus,
    PmCtrl,
    PowerState,
)
from vfiouser_virtio.protocols.vfio_user import SPARSE_MMAP, RegionInfoCap
from vfiouser_virtio.vfio_device import (
    Buffer,
    DeviceFlags,
    DeviceInfo,
    DmaClient,
    Hold,
    IoEventFd,
    PciIrq,
    PciRegion,
    RegionFlags,
    RegionInfo,
)

if TYPE_CHECKING:
    from vfiouser_virtio.pci.extended_capabilities import ExtendedCapability, ExtendedChain
    from vfiouser_virtio.pci.option_rom import OptionRom

_COMMAND, _COMMAND_SIZE = offsets(TYPE0_HEADER)["command"]
_STATUS, _ = offsets(TYPE0_HEADER)["status"]
_INTERRUPT = int(PciStatus.INTERRUPT)  # a plain int: arithmetic with flags costs a microsecond, and INTx is hot
_PM_CTRL, _ = offsets(PM_CAP)["ctrl"]
_MSIX_FLAGS, _MSIX_FLAGS_SIZE = offsets(MSIX_CAP)["flags"]
_MSI = offsets(MSI_CAP)
_DEVCTL, _DEVCTL_SIZE = offsets(EXP_CAP)["devctl"]


def _nothing(_: object = None) -> None:
    """The default of every callback."""


class PciFunction(InterruptingFunction):
    """PCI function: config space, BARs, capabilities and interrupts; satisfies the seam's ``HostedVfioDevice``.

    A device with one BAR that holds a scratch register and interrupts when it is written::

        class Scratch:
            def __init__(self) -> None:
                self.value = bytearray(0x1000)
                self.function = PciFunction(Identity(vendor=0x1234, device=0x5678, class_code=0xFF0000))
                self.function.add_bar(0, Bar(len(self.value), self.read, self.write))
                self.function.add_msix(vectors=1, bar=1)

            def read(self, offset: int, count: int) -> bytes:
                return bytes(self.value[offset : offset + count])

            def write(self, offset: int, data: Buffer) -> None:
                self.value[offset : offset + len(data)] = data
                self.function.raise_msix(0)

    It is built with the ``add_`` methods before the first client comes; capabilities are chained in the order of the
    calls. The callbacks are plain attributes that do nothing until they are set:

    - ``on_connected()`` and ``on_disconnected() -> Hold | None``: a client comes, goes.
    - ``on_reset() -> Hold | None``: DEVICE_RESET, a function level reset, or D3hot→D0 without No_Soft_Reset. Config
      space has its power-on values already. Only DEVICE_RESET waits for the hold: a config write has no late reply.
    - ``on_bus_master(bool)``: the function may, or may no longer, reach memory. Comes before ``on_reset``.
    - ``on_quiesce(bool)``: begin no more work that reaches memory, or go on; what has begun ends first.
    - ``on_resample_fd(int | None)``: another eventfd tells the end of an INTx (then `Intx.unmask`); the one before is
      closed when the call returns, so stop waiting on it.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        interrupt_pin: int = 1,
        config_size: int = CFG_SPACE_SIZE,
        memory: GuestMemory | None = None,
    ) -> None:
        """``interrupt_pin``: 1 to 4 are INTA# to INTD#, 0 none. ``config_size``: 256, or 4096 for PCI Express."""
        config = ConfigSpace(config_size)
        super().__init__(config, Bars(config), interrupt_pin)
        self.identity = identity
        self.memory = GuestMemory() if memory is None else memory
        self.rom: OptionRom | None = None
        self.bus_master = False
        self.io_event_fds: dict[int, list[IoEventFd]] = {}

        self.on_connected: Callable[[], None] = _nothing
        self.on_disconnected: Callable[[], Hold | None] = _nothing
        self.on_reset: Callable[[], Hold | None] = _nothing
        self.on_bus_master: Callable[[bool], None] = _nothing
        self.on_quiesce: Callable[[bool], None] = _nothing

        self._extended_chain: ExtendedChain | None = None
        self._pm_cap: int | None = None
        self._client_decodes = False
        define_header(self.config, identity, interrupt_pin)
        self.config.hook(_COMMAND, _COMMAND_SIZE, on_write=self._command_written)

    # Building

    def add_bar(self, index: int, bar: Bar) -> None:
        """Put ``bar`` at BAR ``index``, 0 to 5; a 64-bit one takes the next as well. ValueError when not free."""
        self.bars.add(index, bar)

    def add_capability(self, capability: Capability) -> int:
        """Append a capability; returns its offset in config space. ValueError when there is no room."""
        return self._chain.add(capability)

    def add_extended_capability(self, capability: "ExtendedCapability") -> int:
        """Append an extended capability, from 0x100 on; returns its offset. ValueError when there is no room."""
        from vfiouser_virtio.pci.extended_capabilities import ExtendedChain  # only here: no virtio device has one

        if self._extended_chain is None:
            self._extended_chain = ExtendedChain(self.config)
        return self._extended_chain.add(capability)

    def add_rom(self, image: bytes) -> None:
        """Add an expansion ROM for the machine's firmware, at most 16 MiB; QEMU reads no more than 1 MiB.

        Raises ValueError for one that firmware would pass over: without signatures, or for another device.
        """
        from vfiouser_virtio.pci.option_rom import OptionRom  # only here: likewise

        self.rom = OptionRom(image, self.identity, self.config)

    def add_pm(self, *, no_soft_reset: bool = True) -> int:
        """Add power management with D0 and D3hot; ``no_soft_reset``: a return to D0 keeps all state."""
        self._pm_cap = self._chain.add(pm_capability(no_soft_reset=no_soft_reset, on_write=self._pm_written))
        return self._pm_cap

    def add_pcie(self, *, flr: bool = True) -> int:
        """Add the PCI Express capability of an endpoint; ``flr``: with function level reset."""
        return self._chain.add(exp_capability(flr=flr, on_write=self._exp_written if flr else None))

    # The seam (vfiouser_virtio.vfio_device.VfioDevice)

    def connected(self, client: DmaClient) -> None:
        """A client has come; its memory follows. Until it sets COMMAND.MEMORY or IO for once, BARs answer without.

        Raises PeerError where memory of the client before it is still mapped, see `GuestMemory.attach`, and where it
        has kept memory of a BAR that cannot be replaced.
        """
        self.bars.renew_mappings()
        self.memory.attach(client)
        self._client_decodes = False
        self._command_written()
        self.on_connected()

    def disconnected(self) -> Hold | None:
        """The client is gone, with its memory and eventfds; registers keep their values."""
        # Whatever goes wrong in between, the next client must not be served with this one's memory and eventfds.
        with ExitStack() as stack:
            holds: list[Hold | None] = []
            stack.callback(lambda: holds.append(self.memory.clear()))
            for release in self._interrupt_releases():
                stack.callback(release)
            holds.append(self.on_disconnected())
        return Hold.all(holds)

    def device_info(self) -> DeviceInfo:
        """A resettable PCI device with all of vfio's PCI regions and interrupt indexes."""
        return DeviceInfo(DeviceFlags.PCI | DeviceFlags.RESET, num_regions=len(PciRegion), num_irqs=len(PciIrq))

    def region_info(self, index: int) -> RegionInfo:
        """BARs, ROM and config space; the VGA region and what is not used have size 0."""
        check_index(PciRegion, index, "GET_REGION_INFO")
        if index == PciRegion.ROM and self.rom is not None:
            return RegionInfo(RegionFlags.READ, self.rom.size)
        size = self.config.size if index == PciRegion.CONFIG else self.bars.size(index)
        flags, mapping = RegionFlags.READ | RegionFlags.WRITE, self.bars.mapping(index)
        if mapping is None or mapping.fd < 0:  # it has been closed
            return RegionInfo(flags, size) if size else RegionInfo()
        areas = SPARSE_MMAP.build({"areas": [{"offset": offset, "size": length} for offset, length in mapping.areas]})
        sparse = (RegionInfoCap.SPARSE_MMAP, 1, areas)  # without it, all of the region may be mapped
        capabilities = () if mapping.whole else (sparse,)
        return RegionInfo(flags | RegionFlags.MMAP, size, capabilities=capabilities, fds=(mapping.give(),))

    def io_fds(self, index: int) -> Sequence[IoEventFd]:
        """What the owner has put into ``io_event_fds`` for this BAR."""
        check_index(PciRegion, index, "GET_REGION_IO_FDS")
        return self.io_event_fds.get(index, ())

    def region_read(self, index: int, offset: int, count: int) -> Buffer:
        """Config space, or a BAR: all-ones while it is not decoded. PeerError outside a region."""
        bar = self.bars.decoded.get(index)
        if bar is not None and 0 <= offset < offset + count <= bar.size:
            return bar.read(offset, count)  # nearly always: a vCPU waits for it
        if index == PciRegion.CONFIG:
            return self.config.read(offset, count)
        if index == PciRegion.ROM and self.rom is not None:
            return self.rom.read(offset, count)
        return self.bars.decoded_read(index, offset, count)

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        """Config space, or a BAR: lost while it is not decoded. PeerError outside a region."""
        bar = self.bars.decoded.get(index)
        if bar is not None and 0 <= offset < offset + len(data) <= bar.size:
            bar.write(offset, data)
        elif index == PciRegion.CONFIG:
            self.config.write(offset, data)
        elif index == PciRegion.ROM and self.rom is not None:
            raise PeerError(f"write of {len(data)} bytes at {offset:#x} of the ROM, which cannot be written")
        else:
            self.bars.decoded_write(index, offset, data)

    def dma_map(self, address: int, size: int, *, readable: bool, writable: bool, fd: int | None, offset: int) -> None:
        """Client memory comes; see `GuestMemory.map`."""
        self.memory.map(address, size, readable=readable, writable=writable, fd=fd, offset=offset)

    def dma_unmap(self, address: int, size: int) -> Hold | None:
        """Client memory goes; see `GuestMemory.unmap`."""
        return self.memory.unmap(address, size)

    def reset(self) -> Hold | None:
        """Registers to their power-on values; memory and eventfds stay, because QEMU does not send them again."""
        self.config.reset()
        self._reset_interrupts()
        self._command_written()
        return self.on_reset()

    # The rest of the seam, for engines that keep eventfds and mappings themselves (HostedVfioDevice)

    def dma_map_alias(
        self, address: int, size: int, *, readable: bool, writable: bool, vaddr: int, page_size: int
    ) -> None:
        """Client memory comes; see `GuestMemory.map_alias`."""
        self.memory.map_alias(address, size, vaddr, readable=readable, writable=writable, page_size=page_size)

    def quiesce(self) -> Hold | None:
        """None while no request is under way; else no new ones, and a hold that ends with the last."""
        hold = self.memory.settle()
        if hold is not None:
            self.on_quiesce(True)
        return hold

    def resume(self) -> None:
        """Go on after the hold of `quiesce`."""
        self.on_quiesce(False)

    # What writes to config space cause

    def _command_written(self, _offset: int = 0, _data: bytes = b"") -> None:
        command = self.config.load(_COMMAND, _COMMAND_SIZE)
        memory, io = bool(command & PciCommand.MEMORY), bool(command & PciCommand.IO)
        # Linux' vfio hands devices out with decoding on, so SPDK's driver writes 0x404 and goes on to the BARs. Only a
        # client that has enabled decoding itself is held to it; QEMU does so before the first access that it forwards.
        self._client_decodes |= memory or io
        awake = self._power_state() == PowerState.D0  # in D3hot only config space answers (PCI PM 1.2 §5.4.1)
        self.bars.set_decode(
            memory=awake and (memory or not self._client_decodes), io=awake and (io or not self._client_decodes)
        )
        messages = self.msix_enabled or (self.msi is not None and self.msi.enabled)
        self.intx.set_blocked(messages or bool(command & PciCommand.INTX_DISABLE))
        bus_master = awake and bool(command & PciCommand.MASTER)
        if bus_master != self.bus_master:
            self.bus_master = bus_master
            self.on_bus_master(bus_master)

    def _pm_written(self, offset: int, data: bytes) -> None:
        assert self._pm_cap is not None
        if not offset <= _PM_CTRL < offset + len(data):
            return
        state, old = int(data[_PM_CTRL - offset] & PmCtrl.STATE_MASK), self._power_state()
        if state not in (PowerState.D0, PowerState.D3HOT):
            return  # a write of a state that is not supported is discarded (PCI PM 1.2 §3.2.4)
        ctrl = self.config.load(self._pm_cap + _PM_CTRL, 1) & ~PmCtrl.STATE_MASK | state
        self.config.store(self._pm_cap + _PM_CTRL, bytes([ctrl]))
        if old == PowerState.D3HOT and state == PowerState.D0 and not ctrl & PmCtrl.NO_SOFT_RESET:
            self.reset()
        else:
            self._command_written()

    def _exp_written(self, offset: int, data: bytes) -> None:
        # BCR_FLR is bit 15 of DEVCTL: bit 7 of its second byte.
        at = _DEVCTL + _DEVCTL_SIZE - 1 - offset
        if 0 <= at < len(data) and data[at] << 8 & ExpDevCtl.BCR_FLR:
            self.reset()

    def _power_state(self) -> int:
        if self._pm_cap is None:
            return PowerState.D0
        return int(self.config.load(self._pm_cap + _PM_CTRL, 1) & PmCtrl.STATE_MASK)
