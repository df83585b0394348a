"""Network device (virtio 1.4, 5.1): one network interface of a guest, on a back end (netdev).

::

    transmitq1, …  ──▶ net_transmit ──▶ netdev.put                    network
    receiveq1, …   ◀── net_receive  ◀── filter, steering ◀── netdev.run
    controlq       ──▶ filter, steering, offloads

This is its configuration, its features, and what changes them.
"""

import hashlib
import re
from typing import Annotated

import trio

from vfiouser_virtio.backends.changes import tell_changes
from vfiouser_virtio.backends.net.drops import DropReport
from vfiouser_virtio.backends.net.netdev import Netdev, QueuedNetdev
from vfiouser_virtio.backends.net.netdevs import NETDEVS
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.devices.net_commands import Settings
from vfiouser_virtio.devices.net_control import Control
from vfiouser_virtio.devices.net_filter import ReceiveFilter
from vfiouser_virtio.devices.net_read import ReadingReceiver
from vfiouser_virtio.devices.net_receive import Receiver
from vfiouser_virtio.devices.net_receive_queue import does_of
from vfiouser_virtio.devices.net_statistics import counter_of
from vfiouser_virtio.devices.net_steering import HASH_TYPES, MAX_TABLE, Steering
from vfiouser_virtio.devices.net_toeplitz import MAX_KEY
from vfiouser_virtio.devices.net_transmit import Transmitter
from vfiouser_virtio.host_access import HostAccess, confine_all
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.protocols.virtio.net import Duplex, NetFeature, Status
from vfiouser_virtio.virtio import Device, DeviceError, Queue, register
from vfiouser_virtio.virtio.options import OneOf

MAX_PAIRS = 64
QUEUE_SIZE = 256
CONTROL_QUEUE_SIZE = 64

OFFERED = frozenset(
    {
        NetFeature.CSUM,
        NetFeature.GUEST_CSUM,
        NetFeature.GUEST_TSO4,
        NetFeature.GUEST_TSO6,
        NetFeature.GUEST_ECN,
        NetFeature.GUEST_USO4,
        NetFeature.GUEST_USO6,
        NetFeature.HOST_TSO4,
        NetFeature.HOST_TSO6,
        NetFeature.HOST_ECN,
        NetFeature.HOST_USO,
        NetFeature.MAC,
        NetFeature.MRG_RXBUF,
        NetFeature.STATUS,
        NetFeature.SPEED_DUPLEX,
        NetFeature.CTRL_VQ,
        NetFeature.CTRL_RX,
        NetFeature.CTRL_RX_EXTRA,
        NetFeature.CTRL_VLAN,
        NetFeature.CTRL_MAC_ADDR,
        NetFeature.CTRL_GUEST_OFFLOADS,
        NetFeature.GUEST_ANNOUNCE,
        NetFeature.DEVICE_STATS,
        NetFeature.NOTF_COAL,
        NetFeature.VQ_NOTF_COAL,
    }
)
"""What every device offers: what its netdev cannot do is done in software."""

_DUPLEX = {"half": Duplex.HALF, "full": Duplex.FULL, "unknown": Duplex.UNKNOWN}


NetdevOption = Annotated[
    Netdev | None,
    OneOf(NETDEVS, shares=("queues",)),
    "network that it is on; hub=NAME says netdev=hub as well; default: null",
]
MacOption = Annotated[str, "address, such as 52:54:00:12:34:56; default: made up from the device's id"]


@register
class Net(Device):
    """Network interface. ``Annotated`` parameters are the user's options; `close` closes the netdev."""

    device_id = net.DEVICE_ID
    made_in_thread = True
    feature_bits = NetFeature

    def __init__(
        self,
        *,
        netdev: NetdevOption = None,
        mac: MacOption = "",
        mtu: Annotated[
            int | None, "longest packet in bytes without Ethernet header, 68 to 65535; told to the guest"
        ] = None,
        queues: Annotated[
            int, "pairs of queues, 1 to 64; a guest uses up to one per CPU, and netdev=tap has one for each"
        ] = 1,
        speed: Annotated[int | None, "what the guest shows as its speed, in Mbit/s; default: unknown"] = None,
        duplex: Annotated[str, "what it shows beside that: half, full, unknown"] = "full",
        hash: Annotated[  # noqa: A002 - QEMU's name for it
            bool, "tell the guest the RSS hash of each packet, which takes time for each, even if it has no use for it"
        ] = False,
        host_tunnel: Annotated[
            bool, "let the guest send packets in UDP tunnels (VXLAN, GENEVE) uncut, up to 64 KiB; Linux: from 6.17 on"
        ] = False,
        host_tunnel_csum: Annotated[
            bool, "and with an outer UDP checksum that is not computed either; goes with host-tunnel=on"
        ] = False,
        guest_tunnel: Annotated[bool, "hand such packets to the guest uncut, where it takes them"] = False,
        guest_tunnel_csum: Annotated[
            bool, "and those with an outer UDP checksum that is not computed; goes with guest-tunnel=on"
        ] = False,
    ) -> None:
        if not 1 <= queues <= MAX_PAIRS:
            raise DeviceError(f"queues={queues}: expected 1 to {MAX_PAIRS}")
        if mtu is not None and not net.MIN_MTU <= mtu <= net.MAX_MTU:
            raise DeviceError(f"mtu={mtu}: expected {net.MIN_MTU} to {net.MAX_MTU}")
        if speed is not None and not 0 <= speed <= 0x7FFF_FFFF:
            raise DeviceError(f"speed={speed}: expected Mbit/s, 0 to {0x7FFF_FFFF}")
        if duplex not in _DUPLEX:
            raise DeviceError(f"duplex={duplex}: expected {', '.join(_DUPLEX)}")
        for name, csum, tunnel in (
            ("host-tunnel", host_tunnel_csum, host_tunnel),
            ("guest-tunnel", guest_tunnel_csum, guest_tunnel),
        ):
            if csum and not tunnel:
                raise DeviceError(f"{name}-csum=on: goes with {name}=on")
        address = parse_mac(mac) if mac else None
        offered = set(OFFERED)
        if mtu is not None:
            offered.add(NetFeature.MTU)
        if queues > 1:
            offered |= {NetFeature.MQ, NetFeature.RSS}
        if hash:
            offered.add(NetFeature.HASH_REPORT)
        offered |= {
            feature
            for feature, wanted in (
                (NetFeature.HOST_UDP_TUNNEL_GSO, host_tunnel),
                (NetFeature.HOST_UDP_TUNNEL_GSO_CSUM, host_tunnel_csum),
                (NetFeature.GUEST_UDP_TUNNEL_GSO, guest_tunnel),
                (NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM, guest_tunnel_csum),
            )
            if wanted
        }
        self.netdev: Netdev = netdev or NullNetdev()
        self._link = True
        super().__init__(
            config=net.Config(
                mac=address or bytes(net.ETH_ALEN),
                status=Status.LINK_UP if self.netdev.link else 0,
                max_virtqueue_pairs=queues,
                mtu=mtu or 0,
                speed=net.SPEED_UNKNOWN if speed is None else speed,
                duplex=_DUPLEX[duplex] if speed is not None else Duplex.UNKNOWN,
                rss_max_key_size=MAX_KEY,
                rss_max_indirection_table_length=MAX_TABLE,
                supported_hash_types=HASH_TYPES,
            ),
            features=mask_of(offered),
        )
        self._mac = address or made_up_mac(self.log.device)
        self.config.set(mac=self._mac)
        for _ in range(2 * queues):
            self.add_queue(QUEUE_SIZE)
        self.add_queue(CONTROL_QUEUE_SIZE)
        self.pairs = queues
        """Pairs of queues that there are."""
        steering = Steering(self.netdev.use) if isinstance(self.netdev, QueuedNetdev) else Steering()
        wanted = ReceiveFilter()
        self.receiver: Receiver = ReadingReceiver(self.queues[0 : 2 * queues : 2], wanted, steering, self.log)
        """The way from the network to the driver."""
        self.transmitter = Transmitter(self.queues[1 : 2 * queues : 2], self.netdev, steering, self.log)
        """The way from the driver to the network."""
        self.drops = DropReport(
            self.log,
            self.netdev.describe,
            to_guest=(self.netdev.counters.rx_drops, self.receiver.drops),
            from_guest=(self.netdev.counters.tx_drops, self.transmitter.drops),
            totals=lambda: str(self.netdev.counters),
        )
        """What the user is told of frames that were dropped."""
        counters = [
            counter_of(each, each.queue)
            for pair in zip(self.receiver.queues, self.transmitter.queues, strict=True)
            for each in pair
        ]
        self.control = Control(
            Settings(
                device=self,
                pairs=queues,
                filter=wanted,
                steering=steering,
                set_offloads=lambda features: self.receiver.set_offloads(does_of(features)),
                counters=counters,
            )
        )
        """What the driver has set by its commands."""

    # ---- configuration -------------------------------------------------------------------------------------------

    @property
    def control_queue(self) -> Queue | None:
        """The control queue, which comes after as many pairs as the driver knows of (5.1.2); None without CTRL_VQ."""
        if not self.negotiated(NetFeature.CTRL_VQ):
            return None
        several = self.negotiated(NetFeature.MQ) or self.negotiated(NetFeature.RSS)
        return self.queues[2 * (self.pairs if several else 1)]

    @property
    def link(self) -> bool:
        """Whether the driver is told that its link is up: where it is by `set_link`, and by the netdev."""
        return self._link and self.netdev.link

    def set_link(self, up: bool) -> None:
        """Take the link down, or let it be up again where the netdev's is; the driver is told. For tests of drivers."""
        self._link = up
        self._follow_link()
        self._show_link()

    def announce(self) -> bool:
        """Ask the driver to make itself known on its network (5.1.9.5.4), as when it is at another place of it.

        False where it has not negotiated GUEST_ANNOUNCE. A device that takes over does so by itself.
        """
        return self.control.announce()

    def _follow_link(self) -> None:
        """Carry frames, or drop them, from now on."""
        up = self.transmitter.link = self.link
        self.receiver.set_link(up)

    def _show_link(self) -> bool:
        """Tell the driver, where it does not know; whether that was so."""
        status = self.config["status"]
        assert isinstance(status, int)
        if bool(status & Status.LINK_UP) == self.link:
            return False
        self.log.info("the link is %s", "up" if self.link else "down")
        self.config.update(status=status ^ Status.LINK_UP)
        return True

    def describe(self) -> str:
        """The address, and where the other end is: ``52:54:00:12:34:56 on hub lan``."""
        return f"{format_mac(self.mac)} on {self.netdev.describe()}"

    @property
    def mac(self) -> bytes:
        """The address as it is: the driver may have changed it."""
        mac = self.config["mac"]
        assert isinstance(mac, bytes)
        return mac

    # ---- the driver ----------------------------------------------------------------------------------------------

    def features_ok(self) -> bool:
        """Settle what the features decide: header, offloads, filter."""
        features = self.driver_features
        mtu = self.config["mtu"]
        assert isinstance(mtu, int)
        self.receiver.begin(features, mtu if self.negotiated(NetFeature.MTU) else None)
        self.transmitter.begin(features)
        self.control.settings.filter.begin(
            self.mac,
            by_address=self.negotiated(NetFeature.CTRL_RX),
            by_vlan=self.negotiated(NetFeature.CTRL_VLAN),
        )
        return True

    def take_over(self, predecessor: Device) -> None:
        super().take_over(predecessor)
        if isinstance(predecessor, Net):
            self._link = predecessor._link  # noqa: SLF001 - of the same class
            self.control.take_over(predecessor.control)

    def reset(self) -> None:
        self.config.set(mac=self._mac)
        self.control.reset()
        self.receiver.reset()
        self.transmitter.reset()
        self.log.forget()
        self.drops.driver_left()

    def confine(self) -> HostAccess:
        return confine_all([self.netdev])

    def close(self) -> None:
        self.drops.end()
        self.netdev.close()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.receiver.run, self.netdev)
            nursery.start_soon(tell_changes, self.netdev.wait_link, self._show_link, self._follow_link)
            nursery.start_soon(self.drops.run)
            await trio.lowlevel.checkpoint()  # the netdev runs before it is given a frame
            for receiveq, transmitq in zip(self.receiver.queues, self.transmitter.queues, strict=True):
                receiveq.queue.replied_in(transmitq.queue)
            for queue in self.transmitter.queues:
                nursery.start_soon(self.transmitter.serve, queue)
            if self.control_queue is not None:
                nursery.start_soon(self.control.serve, self.control_queue)


_MAC = re.compile(r"[0-9a-f]{1,2}([:-])(?:[0-9a-f]{1,2}\1){4}[0-9a-f]{1,2}", re.ASCII | re.IGNORECASE)


def parse_mac(text: str) -> bytes:
    """The address that is spelled so, with colons or dashes. Raises DeviceError for none, and for a group's address."""
    found = _MAC.fullmatch(text)
    if found is None:
        raise DeviceError(f"mac={text}: expected six bytes in hex, such as 52:54:00:12:34:56")
    mac = bytes(int(part, 16) for part in text.split(found[1]))
    if mac[0] & 1:
        raise DeviceError(
            f"mac={text}: {mac[0]:02x} as the first byte makes it the address of a group; use an even one"
        )
    if not any(mac):
        raise DeviceError(f"mac={text}: an interface's address is not zero")
    return mac


def format_mac(mac: bytes) -> str:
    """An address as users write it."""
    return mac.hex(":")


def made_up_mac(name: str) -> bytes:
    """An address for a device of this name, always the same; it is locally administered (IEEE 802, 8.4).

    Two of the same name, in two servers, have the same: who joins their networks gives them other names, or addresses.
    """
    return b"\x02" + hashlib.sha256(f"vfiouser-virtio {name}".encode()).digest()[: net.ETH_ALEN - 1]


def example() -> Net:
    """An interface with two pairs of queues and everything that can be offered, on a cable without a network."""
    return Net(
        queues=2,
        mtu=9000,
        speed=10_000,
        hash=True,
        host_tunnel=True,
        host_tunnel_csum=True,
        guest_tunnel=True,
        guest_tunnel_csum=True,
    )
