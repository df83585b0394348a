"""Watch of the headers of packets: flags and gso_type, and what was negotiated (virtio 1.4, 5.1.9.2.1)."""

from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.backends.net.frame import Offload
from vfiouser_virtio.protocols.virtio.net import GSO_UDP_TUNNEL, GsoType, HdrFlags, NetFeature

_SEND = "5.1.9.2.1 Packet Transmission"
_EACH = "the header of each packet"

FLAGS = must("net/flags", _SEND, "Without CSUM, flags of a packet are 0.", _EACH)
RECEIVE_FLAGS = must("net/receive-flags", _SEND, "DATA_VALID and RSC_INFO are not set in flags of a packet.", _EACH)
_FEATURES = {
    GsoType.TCPV4: NetFeature.HOST_TSO4,
    GsoType.TCPV6: NetFeature.HOST_TSO6,
    GsoType.UDP: NetFeature.HOST_UFO,
    GsoType.UDP_L4: NetFeature.HOST_USO,
}
GSO = {
    kind: must(
        f"net/gso-{kind.name.lower().replace('_', '-')}",
        _SEND,
        f"gso_type is {kind.name} only where {feature.name} was negotiated.",
        _EACH,
    )
    for kind, feature in _FEATURES.items()
}
GSO_NONE = must(
    "net/gso-none",
    _SEND,
    "Without HOST_TSO4, HOST_TSO6, HOST_UFO and HOST_USO, gso_type is NONE.",
    "the header of each packet: other values than those that have a feature, and ECN alone",
)
GSO_TUNNEL = must(
    "net/gso-tunnel",
    _SEND,
    "gso_type has a bit of UDP tunnels only where HOST_UDP_TUNNEL_GSO was negotiated, and one of them at most.",
    _EACH,
)
TUNNEL_UDP = must("net/tunnel-udp", _SEND, "A bit of UDP tunnels is not set together with UDP.", _EACH)
GSO_CSUM = must("net/gso-csum", _SEND, "A packet with a gso_type has NEEDS_CSUM.", _EACH)
GSO_SIZE = must("net/gso-size", _SEND, "A packet with a gso_type has a gso_size.", _EACH)
TUNNEL_CSUM = must(
    "net/tunnel-csum",
    _SEND,
    "UDP_TUNNEL_CSUM is set only where that was negotiated, and with a bit of UDP tunnels.",
    _EACH,
)


class HeaderWatch(RequestWatch):
    """Watch of headers."""

    def header(self, where: str, offload: Offload) -> None:
        """The driver has put this before a packet."""
        flags, gso = offload.flags, offload.gso_type
        seen = f"{where}: gso_type {gso:#x}"
        if flags and not self.accepted(NetFeature.CSUM):
            self.broke(FLAGS, f"{where}: flags {flags:#x} without CSUM")
        elif flags & (HdrFlags.DATA_VALID | HdrFlags.RSC_INFO):
            self.broke(RECEIVE_FLAGS, f"{where}: flags {flags:#x}")
        tunnel = gso & GSO_UDP_TUNNEL
        if flags & HdrFlags.UDP_TUNNEL_CSUM and not (tunnel and self.accepted(NetFeature.HOST_UDP_TUNNEL_GSO_CSUM)):
            self.broke(TUNNEL_CSUM, f"{where}: flags {flags:#x}, gso_type {gso:#x}")
        if tunnel and (tunnel == GSO_UDP_TUNNEL or not self.accepted(NetFeature.HOST_UDP_TUNNEL_GSO)):
            self.broke(GSO_TUNNEL, seen)
        kind = gso & ~GsoType.ECN & ~GSO_UDP_TUNNEL
        if tunnel and kind == GsoType.UDP:
            self.broke(TUNNEL_UDP, seen)
        elif kind in GSO and not self.accepted(_FEATURES[GsoType(kind)]):
            self.broke(GSO[GsoType(kind)], f"{seen} without {_FEATURES[GsoType(kind)].name}")
        elif gso and kind not in GSO and not any(map(self.accepted, _FEATURES.values())):
            self.broke(GSO_NONE, seen)
        if not kind:
            return
        if not flags & HdrFlags.NEEDS_CSUM:
            self.broke(GSO_CSUM, f"{seen}, flags {flags:#x}")
        if not offload.gso_size:
            self.broke(GSO_SIZE, f"{seen}, gso_size 0")
