"""Intel 82540EM, a gigabit network card, for Linux' e1000 and the drivers of nearly every other system.

Facts: Intel, PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual, 317453: receive (§3.2),
transmit, checksums and segmentation (§3.3 to §3.6), EEPROM (§5), PHY (§8, §11), registers (§13), statistics (§13.7).

The other end of its cable is any netdev of virtio-net (docs/networking.md). Moderation is by ITR alone, as the manual
recommends: the delay timers (RDTR, RADV, TIDV, TADV) can be written, and nothing waits for them. There is no wake-up,
no management, and no flow control: the netdev itself waits.

::

    netdev ─▶ Nic: FIFO ─▶ e1000_receive ─▶ ring in memory ─▶ ICR ─▶ ITR ─▶ interrupt
    netdev ◀─ Nic.send  ◀─ e1000_transmit ◀─ ring ◀─ TDT        EEPROM, PHY: e1000_serial
"""

import trio
from pci.e1000_banks import STATISTICS, Address, Ring, Statistics
from pci.e1000_receive import ReceiveControl, Receiver
from pci.e1000_serial import Eeprom, EepromWires, Phy, eeprom_words
from pci.e1000_transmit import TransmitControl, Transmitter

from vfiouser_virtio.backends.net.nic import Nic
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.devices.net import MacOption, NetdevOption, format_mac, made_up_mac, parse_mac
from vfiouser_virtio.host_access import HostAccess, confine_all
from vfiouser_virtio.pci import BarKind, Identity, PciDevice, Register, array, banks, bar, field, flag, interrupts
from vfiouser_virtio.trio_timer import sleep_briefly

LSC, MDAC = 0x04, 0x200
"""Causes of an interrupt: the link has changed, the PHY was accessed."""
FULL_DUPLEX_1000, LINK_UP = 0x0281, 0x0002
"""STATUS (§13.4.2)"""


class DeviceControl(Register):
    set_link_up = flag(6)
    device_reset = flag(26)
    vlan_mode = flag(30)
    phy_reset = flag(31)


class Throttling(Register):
    interval = field(15, 0)
    """In units of 256 ns."""


class E1000(PciDevice):
    """The card, with its EEPROM and PHY, on a ``netdev``."""

    identity = Identity(0x8086, 0x100E, subsystem_vendor=0x8086, subsystem=0x001E, class_code=0x020000, revision=2)
    irq = interrupts(1, msi=True)
    express = False
    made_in_thread = True

    regs = bar(0, size=0x20000)
    ctrl = DeviceControl(0x00000, writable=0xFFFF_FFFF, reset=0x0201)
    status = Register(0x00008, access="ro")
    eecd = EepromWires(0x00010, writable=0x7F, reset=0x0100)
    eerd = Register(0x00014)
    ctrl_ext = Register(0x00018)
    mdic = Register(0x00020, reset=1 << 28)
    fcal = Register(0x00028)
    fcah = Register(0x0002C, writable=0xFFFF)
    fct = Register(0x00030, writable=0xFFFF)
    vet = Register(0x00038, reset=0x8100, writable=0xFFFF)
    icr = Register(0x000C0, access="w1c")
    itr = Throttling(0x000C4)
    ics = Register(0x000C8, access="wo")
    ims = Register(0x000D0, access="w1s")
    imc = Register(0x000D8, access="wo")
    rctl = ReceiveControl(0x00100, writable=0xFFFF_FFFF)
    fcttv = Register(0x00170, writable=0xFFFF)
    txcw = Register(0x00178)
    tctl = TransmitControl(0x00400, writable=0xFFFF_FFFF)
    tipg = Register(0x00410)
    ait = Register(0x00458)
    ledctl = Register(0x00E00, reset=0x0706_8302)
    pba = Register(0x01000, reset=0x0010_0030)
    flow_thresholds = array(Register(0x02160), count=2, stride=8)
    rings = banks(Ring, 0x02800, count=2, stride=0x1000)
    """The receive ring, and the transmit ring."""
    rsrpd = Register(0x02C00)
    txdmac = Register(0x03000)
    tspmt = Register(0x03830)
    statistics = banks(Statistics, STATISTICS, count=1, stride=0x100)
    rxcsum = Register(0x05000)
    mta = array(Register(0x05200), count=128)
    addresses = banks(Address, 0x05400, count=16, stride=8)
    vfta = array(Register(0x05600), count=128)
    wuc = Register(0x05800)
    wufc = Register(0x05808)
    wus = Register(0x05810, access="ro")
    manc = Register(0x05820)

    ports = bar(2, size=64, kind=BarKind.IO)
    io_addr = Register(0x00)
    io_data = Register(0x04)

    def __init__(
        self,
        *,
        netdev: NetdevOption = None,
        mac: MacOption = "",
    ) -> None:
        super().__init__()
        address = parse_mac(mac) if mac else made_up_mac(self.log.device)
        self.eeprom = Eeprom(eeprom_words(address, self.identity))
        self.nic = Nic(netdev or NullNetdev(), self.log)
        self.receiver, self.transmitter = Receiver(self), Transmitter(self)
        self.nic.wants = self.receiver.wants
        self.nic.on_link = lambda: self.cause(LSC)
        self._throttle = trio.Event()
        self.reset()

    def describe(self) -> str:
        """The address, and where the other end is."""
        return f"{format_mac(self.eeprom.mac)} on {self.nic.netdev.describe()}"

    def confine(self) -> HostAccess:
        return confine_all([self.nic.netdev])

    def close(self) -> None:
        self.nic.close()

    def reset(self) -> None:
        self.phy = Phy()
        self.addresses[0].set(self.eeprom.mac)
        self.receiver.reset()
        self.transmitter.reset()
        self._asserted = self._throttled = False

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.nic.run)
            nursery.start_soon(self._moderate)
            await trio.lowlevel.checkpoint()  # the netdev runs before it is given a frame
            nursery.start_soon(self.receiver.run)
            nursery.start_soon(self.transmitter.run)

    # ---- control, EEPROM, PHY ------------------------------------------------------------------------------------

    @ctrl.on_write
    def control_written(self, value: int) -> None:
        self.ctrl.phy_reset = False
        if self.ctrl.device_reset:
            self.soft_reset()
        elif value >> 31:
            self.phy = Phy()

    @ctrl_ext.on_write
    def control_extension_written(self, value: int) -> None:
        self.ctrl_ext.value = value & ~(1 << 13)  # EE_RST: what the EEPROM says is there at once

    @status.on_read
    def status_read(self) -> int:
        return FULL_DUPLEX_1000 | (LINK_UP if self.nic.link and self.ctrl.set_link_up else 0)

    @eerd.on_write
    def eeprom_read(self, value: int) -> None:
        if value & 1:
            self.eerd.value = self.eeprom.words[value >> 8 & 0x3F] << 16 | value & 0xFF00 | 0x10

    @eecd.on_write
    def wires_written(self) -> None:
        wires = self.eecd
        wires.grant = wires.request
        wires.data_out = self.eeprom.wires(wires.chip_select, wires.clock, wires.data_in)

    @mdic.on_write
    def phy_accessed(self, value: int) -> None:
        number, address, command = value >> 16 & 31, value >> 21 & 31, value >> 26 & 3
        value = value & ~(1 << 30) | 1 << 28  # done, and no error
        if address != 1 or command not in (1, 2):
            value |= 1 << 30
        elif command == 2:
            value = value & 0xFFFF_0000 | self.phy.read(number, self.nic.link)
        else:
            self.phy.write(number, value & 0xFFFF)
            if number == 0:
                self.cause(LSC)  # negotiation, if it was for that, is over
        self.mdic.value = value
        if value >> 29 & 1:
            self.cause(MDAC)

    # ---- ports: registers by another way (§13.2) -----------------------------------------------------------------

    @io_data.on_read
    def port_read(self) -> int:
        return int.from_bytes(self.bars[0][1].read(self.io_addr.value & 0x1FFFC, 4), "little")

    @io_data.on_write
    def port_written(self, value: int) -> None:
        self.bars[0][1].write(self.io_addr.value & 0x1FFFC, value.to_bytes(4, "little"))

    # ---- rings ---------------------------------------------------------------------------------------------------

    @rctl.on_write
    def receive_control_written(self) -> None:
        self.nic.receiving = self.rctl.enable
        self.rings[0].kick()

    @tctl.on_write
    def transmit_control_written(self) -> None:
        self.rings[1].kick()

    # ---- interrupts ----------------------------------------------------------------------------------------------

    def cause(self, causes: int) -> None:
        """Causes of an interrupt (§13.4.17), which comes if the driver wants it."""
        self.icr.value |= causes
        self._update()

    @icr.on_read
    def causes_read(self) -> int:
        causes, self.icr.value = self.icr.value, 0
        self._update()
        return causes

    @icr.on_write
    def causes_written(self) -> None:
        self._update()

    @ics.on_write
    def causes_set(self, value: int) -> None:
        self.cause(value & 0x1FFFF)

    @ims.on_write
    def mask_set(self) -> None:
        self._update()

    @imc.on_write
    def mask_cleared(self, value: int) -> None:
        self.ims.value &= ~value
        self._update()

    def _update(self) -> None:
        wanted = bool(self.icr.value & self.ims.value)
        if wanted and not self._asserted and not self._throttled:
            self._asserted = True
            self.irq[0].set(True)
            self._throttled = bool(self.itr.interval) and self.dma.bus_master
            self._throttle.set()
        elif not wanted:
            self._asserted = False
            self.irq[0].clear()

    async def _moderate(self) -> None:
        """From one interrupt to the next it takes as long as ITR says (§13.4.18)."""
        self._throttled = False
        while True:
            self._update()
            await self._throttle.wait()
            self._throttle = trio.Event()
            if self._throttled:
                await sleep_briefly(self.itr.interval * 256e-9)
                self._throttled = False
