"""Receive filter of a network device (virtio 1.4, 5.1.9.5.1 to 5.1.9.5.3): which frames the driver gets to see.

::

    frame ──▶ VLAN tag in the table? ──▶ address: own, in a table, broadcast? ──▶ mode for all others ──▶ driver
              (CTRL_VLAN)                 one look-up in a dictionary              (multicast, unicast)

What the driver says is worked out when it says it, so that a frame costs a slice and a look-up. Promiscuous mode lets
VLANs through that are not in the table as well, as in QEMU: who listens to all wants to see all.
"""

from collections.abc import Collection

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.protocols.virtio.net import ETH_ALEN, CtrlRx

MAX_MACS = 256
"""Addresses of each table. Of more, all unicast or all multicast frames are let through, as the specification allows:
a driver could name as many as fill its memory, and each would take some of ours."""

BROADCAST = b"\xff" * ETH_ALEN
_TAG = 0x81
"""First byte of the EtherType of 802.1Q, 0x8100. Linux filters no other (``NETIF_F_HW_VLAN_CTAG_FILTER``)."""
_HEAD = 16
"""Bytes up to the end of the VLAN identifier."""


class ReceiveFilter:
    """Addresses, VLANs and receive modes. Until `begin` says what was negotiated, it lets everything through."""

    def __init__(self) -> None:
        self.everything = True
        """No frame is refused, so that `accepts` need not be asked."""
        self._mac = bytes(ETH_ALEN)
        self._forget()
        self._modes: set[CtrlRx] | None = None
        self._vlans: set[int] | None = None
        self._refresh()

    def begin(self, mac: bytes, *, by_address: bool, by_vlan: bool) -> None:
        """A driver begins: ``by_address`` is CTRL_RX, ``by_vlan`` CTRL_VLAN. All tables are empty, all modes off."""
        self._mac = mac
        self._forget()
        self._modes = set() if by_address else None
        self._vlans = set() if by_vlan else None
        self._refresh()

    def reset(self) -> None:
        """The driver has reset the device: it has said nothing, and negotiated nothing."""
        self.begin(self._mac, by_address=False, by_vlan=False)

    def take_over(self, predecessor: "ReceiveFilter") -> None:
        """What the driver had told that one holds here."""
        vars(self).update(vars(predecessor))

    def _forget(self) -> None:
        self._macs: tuple[Collection[bytes], Collection[bytes]] = ((), ())
        self._overflow = (False, False)

    # ---- what the driver says ------------------------------------------------------------------------------------

    def set_mac(self, mac: bytes) -> None:
        """The device's own address."""
        self._mac = mac
        self._refresh()

    def set_mode(self, mode: CtrlRx, on: bool) -> None:
        """Turn a receive mode on or off."""
        if self._modes is not None:
            (self._modes.add if on else self._modes.discard)(mode)
            self._refresh()

    def set_macs(self, unicast: Collection[bytes] | None, multicast: Collection[bytes] | None) -> None:
        """Tables of addresses, `MAX_MACS` each at most; None: too many, so all."""
        self._macs = unicast or (), multicast or ()
        self._overflow = unicast is None, multicast is None
        self._refresh()

    def add_vlan(self, vlan: int) -> None:
        """Let this VLAN through, 0 to 4095."""
        if self._vlans is not None:
            self._vlans.add(vlan)

    def remove_vlan(self, vlan: int) -> None:
        """Do not let it through any more."""
        if self._vlans is not None:
            self._vlans.discard(vlan)

    def _refresh(self) -> None:
        modes = self._modes
        if modes is None:  # all addresses
            self._known: dict[bytes, bool] = {}
            self._unicast = self._multicast = True
            self.everything = self._vlans is None
            return
        unicast, multicast = CtrlRx.NOUNI not in modes, CtrlRx.NOMULTI not in modes
        self.everything = CtrlRx.PROMISC in modes
        self._unicast = unicast and (CtrlRx.ALLUNI in modes or self._overflow[0])
        self._multicast = multicast and (CtrlRx.ALLMULTI in modes or self._overflow[1])
        self._known = {
            **dict.fromkeys(self._macs[0], unicast),
            **dict.fromkeys(self._macs[1], multicast),
            self._mac: unicast,
            BROADCAST: CtrlRx.NOBCAST not in modes,
        }

    # ---- frames --------------------------------------------------------------------------------------------------

    def accepts(self, frame: Frame) -> bool:
        """Whether the driver is to see this frame."""
        if self.everything:
            return True
        try:
            head = frame.segments[0][:_HEAD].tobytes()
        except IndexError:
            head = b""
        if len(head) < _HEAD:
            head = frame.head(_HEAD).ljust(_HEAD, b"\0")
        vlans = self._vlans
        # A byte is compared in half of the time of a slice, and nearly no frame has a tag.
        if head[12] == _TAG and head[13] == 0 and vlans is not None and (head[14] << 8 | head[15]) & 0xFFF not in vlans:
            return False
        known = self._known.get(head[:ETH_ALEN])
        if known is not None:
            return known
        return self._multicast if head[0] & 1 else self._unicast
