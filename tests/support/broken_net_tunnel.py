"""Broken network devices (see `support.broken`), for the checks of packets in UDP tunnels."""

from support.broken import breaks
from support.broken_net import OFFLOADS_SET
from support.spoilt_net import OK, Kind, SpoiltNet, SpoiltReceiver, SpoiltTransmitter

from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.backends.net.offload import BadOffload, finish
from vfiouser_virtio.protocols.virtio.net import GSO_UDP_TUNNEL, GsoType, HdrFlags, NetFeature

_DROPS = "packet is dropped"
_OUTER_LENGTH, _OUTER_CHECKSUM = slice(38, 40), slice(40, 42)  # of UDP over IPv4
_OUTER_HEADERS = 42

# ---- transmission ------------------------------------------------------------------------------------------------


@breaks("virtio14/NU1", device="net")
class TakesBothTunnelBits(SpoiltNet):
    def reads(self, frame: Frame, fields: tuple[int, ...]) -> tuple[int, ...]:
        both = fields[1] & GSO_UDP_TUNNEL == GSO_UDP_TUNNEL
        return (fields[0], fields[1] & ~int(GsoType.UDP_TUNNEL_IPV6), *fields[2:]) if both else fields


@breaks("virtio14/NU2", device="net", logs=_DROPS)
class TakesATunnelsPacketWithoutNeedsCsum(SpoiltNet):
    def reads(self, frame: Frame, fields: tuple[int, ...]) -> tuple[int, ...]:
        return (fields[0] | HdrFlags.NEEDS_CSUM, *fields[1:]) if fields[1] & GSO_UDP_TUNNEL else fields


@breaks("virtio14/NU3", device="net")
class IgnoresTheOuterChecksumOfNoTunnel(SpoiltNet):
    def reads(self, frame: Frame, fields: tuple[int, ...]) -> tuple[int, ...]:
        return fields if fields[1] & GSO_UDP_TUNNEL else (fields[0] & ~int(HdrFlags.UDP_TUNNEL_CSUM), *fields[1:])


@breaks("virtio14/NU4", device="net", logs=_DROPS)
class BelievesInOffsetsOfNoTunnel(SpoiltNet):
    def reads(self, frame: Frame, fields: tuple[int, ...]) -> tuple[int, ...]:
        if not fields[1] & GSO_UDP_TUNNEL and any(offset > frame.length for offset in fields[10:]):
            raise BadOffload("an offset beyond the end of its packet")
        return fields


class CutsItself(SpoiltNet):
    """It cuts packets of tunnels, and spoils the segments."""

    of_flags = 0
    """Bits of flags that those packets have."""

    def segment(self, data: bytearray, whole: bytes) -> None:
        """Spoil one of them."""

    def sends(self, frame: Frame) -> Frame | None:
        offload = frame.offload
        if offload is None or not offload.gso_type & GSO_UDP_TUNNEL or not offload.flags & self.of_flags:
            return frame
        whole = frame.tobytes()
        for piece in finish(frame, 0):
            data = bytearray(piece.tobytes())
            self.segment(data, whole)
            self.netdev.put(frame_of(data))
        return None


@breaks("virtio14/NU5", device="net", also=("virtio14/NU6",))
class RepeatsTheOuterHeaderAsItIs(CutsItself):
    of_flags = HdrFlags.NEEDS_CSUM

    def segment(self, data: bytearray, whole: bytes) -> None:
        data[_OUTER_LENGTH] = whole[_OUTER_LENGTH]


@breaks("virtio14/NU6", device="net")
class LeavesOuterChecksumsOpen(CutsItself):
    of_flags = HdrFlags.UDP_TUNNEL_CSUM

    def segment(self, data: bytearray, whole: bytes) -> None:
        data[_OUTER_CHECKSUM] = whole[_OUTER_CHECKSUM]


class HasShortReceiveHeaders(SpoiltReceiver):
    def begin(self, features: int, mtu: int | None) -> None:
        super().begin(features & ~NetFeature.HOST_UDP_TUNNEL_GSO.mask, mtu)


@breaks("virtio14/NU7", device="net")
class LengthensHeadersForTheDriversTunnelsOnly(SpoiltNet):
    receiver_class = HasShortReceiveHeaders


# ---- received packets --------------------------------------------------------------------------------------------


class HasShortTransmitHeaders(SpoiltTransmitter):
    def begin(self, features: int) -> None:
        super().begin(features & ~NetFeature.GUEST_UDP_TUNNEL_GSO.mask)


@breaks("virtio14/NP1", device="net", logs="the sender's address was none")
class LengthensHeadersForTheDevicesTunnelsOnly(SpoiltNet):
    transmitter_class = HasShortTransmitHeaders


class SpoiltTunnels(SpoiltNet):
    """It spoils the headers of packets that the driver is to segment, where they are of a tunnel."""

    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return self.tunnel_header(numbers) if numbers[1] & GSO_UDP_TUNNEL else numbers

    def tunnel_header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """The first seven fields."""
        return numbers


@breaks("virtio14/NP2", device="net")
class SaysOfSegmentsThatTheyAreOfATunnel(SpoiltNet):
    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Of those only that no other check looks at: with all that a tunnel requires, and without the tunnel."""
        wrong = self.negotiated(NetFeature.GUEST_USO6) and not self.negotiated(NetFeature.GUEST_UDP_TUNNEL_GSO)
        return (numbers[0], numbers[1] | GsoType.UDP_TUNNEL_IPV4, *numbers[2:]) if wrong else numbers


@breaks("virtio14/NP3", device="net")
class HasOneTunnelBitForAll(SpoiltTunnels):
    def tunnel_header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (numbers[0], numbers[1] ^ GSO_UDP_TUNNEL, *numbers[2:])


@breaks("virtio14/NP4", device="net")
class TakesOneOffsetForTheOther(SpoiltNet):
    def offsets(self, *offsets: int) -> tuple[int, ...]:
        return offsets[::-1]


@breaks("virtio14/NP5", device="net")
class VouchesForPacketsOfTunnels(SpoiltTunnels):
    def tunnel_header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (numbers[0] | HdrFlags.DATA_VALID, *numbers[1:])


@breaks("virtio14/NP5-hdr-len", device="net")
class CountsTheOuterHeadersOnly(SpoiltTunnels):
    def tunnel_header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (*numbers[:2], _OUTER_HEADERS, *numbers[3:])


@breaks("virtio14/NP6", device="net")
class SaysThatAllOuterChecksumsAreOpen(SpoiltNet):
    def header(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        csum = self.negotiated(NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM)
        wrong = self.negotiated(NetFeature.GUEST_UDP_TUNNEL_GSO) and not csum
        return (numbers[0] | HdrFlags.UDP_TUNNEL_CSUM, *numbers[1:]) if wrong else numbers


def _without_the_flag(frame: Frame) -> Frame:
    assert frame.offload is not None
    flags = frame.offload.flags & ~int(HdrFlags.UDP_TUNNEL_CSUM)
    return frame_of(frame.tobytes(), frame.offload._replace(flags=flags))


def _has_an_open_outer_checksum(frame: Frame) -> bool:
    return frame.offload is not None and bool(frame.offload.flags & HdrFlags.UDP_TUNNEL_CSUM)


class TakesOuterChecksums(SpoiltReceiver):
    def set_offloads(self, does: Does) -> None:
        super().set_offloads(does | Does.TUNNEL_CSUM if does & Does.TUNNEL else does)


@breaks("virtio14/NP7", device="net")
class LeavesAnyDriverWithOpenOuterChecksums(SpoiltNet):
    receiver_class = TakesOuterChecksums

    def receives(self, frame: Frame) -> Frame | None:
        csum = self.negotiated(NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM)
        return _without_the_flag(frame) if _has_an_open_outer_checksum(frame) and not csum else frame


@breaks("virtio14/NP8", device="net")
class ClearsOpenOuterChecksums(SpoiltNet):
    def receives(self, frame: Frame) -> Frame | None:
        if not _has_an_open_outer_checksum(frame) or not self.negotiated(NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM):
            return frame
        data = bytearray(frame.tobytes())
        data[_OUTER_CHECKSUM] = bytes(2)
        return frame_of(data, frame.offload)


@breaks("virtio14/NP9", device="net")
class KeepsItsTunnels(SpoiltNet):
    def perform(self, kind: Kind, data: bytes, room: int) -> bytes:
        wrong = kind == OFFLOADS_SET and self.negotiated(NetFeature.GUEST_UDP_TUNNEL_GSO)
        return OK if wrong else super().perform(kind, data, room)
