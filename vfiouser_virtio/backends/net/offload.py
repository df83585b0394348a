"""Offloads in software: checksums completed, packets cut into segments, for those who take no offload header.

::

    Offload ──▶ needs: what a sink must do ──▶ it does: the frame as it is
                                           └─ else: finish ──▶ segmentation, tunnel, or the checksum alone

The same as Linux does with CHECKSUM_PARTIAL for a device without these abilities.
"""

from collections.abc import Iterator, Sequence

from vfiouser_virtio.backends.net import tunnel
from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.headers import HEAD, find_headers
from vfiouser_virtio.backends.net.netdev import LONG_FRAME, Does
from vfiouser_virtio.backends.net.segmentation import MAX_SEGMENTS as MAX_SEGMENTS
from vfiouser_virtio.backends.net.segmentation import U16, check_csum, cut, ones_complement_sum, plan
from vfiouser_virtio.backends.net.segmentation import BadOffload as BadOffload
from vfiouser_virtio.protocols.virtio.net import GSO_UDP_TUNNEL, GsoType, HdrFlags

_CSUM, _LONG_TCP = Does.CSUM.value, Does.LONG_TCP.value
_and = int.__and__  # of IntFlag too, whose own & takes twenty times as long
_NEEDS_CSUM = int(HdrFlags.NEEDS_CSUM)
_CSUM_FLAGS = int(HdrFlags.NEEDS_CSUM | HdrFlags.DATA_VALID)
_UDP_TUNNEL_CSUM = int(HdrFlags.UDP_TUNNEL_CSUM)
_ECN, _UDP_L4 = int(GsoType.ECN), int(GsoType.UDP_L4)

_GSO_NEEDS = {
    int(GsoType.TCPV4): Does.TSO4,
    int(GsoType.TCPV6): Does.TSO6,
    int(GsoType.UDP_L4): Does.USO,
    GsoType.TCPV4 | GsoType.ECN: Does.TSO4 | Does.ECN,
    GsoType.TCPV6 | GsoType.ECN: Does.TSO6 | Does.ECN,
}
_TUNNEL_NEEDS = {
    kind | bit: need | Does.TUNNEL
    for kind, need in _GSO_NEEDS.items()
    for bit in (GsoType.UDP_TUNNEL_IPV4, GsoType.UDP_TUNNEL_IPV6)
}
_NOBODY = 1 << 30
# By gso_type and by flags, of which a byte has 256, as plain integers. Unknown types go to nobody, and so to `finish`,
# which refuses them, or knows better: ECN beside nothing says nothing.
_NEEDS = [0] + [
    int(need | Does.CSUM) if (need := (_GSO_NEEDS | _TUNNEL_NEEDS).get(kind)) else _NOBODY for kind in range(1, 256)
]
_FLAGS_NEED = [
    (_CSUM if flags & _CSUM_FLAGS else 0) | (Does.TUNNEL_CSUM.value if flags & _UDP_TUNNEL_CSUM else 0)
    for flags in range(256)
]


def needs(offload: Offload) -> int:
    """The `Does` that a sink must have to take a frame with this as it is, as a plain int."""
    return _NEEDS[offload.gso_type] | _FLAGS_NEED[offload.flags]


def takes(does: int, frame: Frame) -> bool:
    """Whether a sink with these abilities can take the frame as it is."""
    offload = frame.offload
    if offload is None:
        return True
    need = needs(offload)
    return _and(need, does) == need


def check(frame: Frame) -> None:
    """Compare what an offload header says with its frame; whoever makes one from a driver's or peer's bytes does this.

    The numbers lie within the frame, the segments are at most `MAX_SEGMENTS`, the headers are those of ``gso_type``.
    In a guest's memory the headers can be changed afterwards: who relies on them looks at a copy, as `finish` does.

    Raises BadOffload.
    """
    offload = frame.offload
    if offload is None:
        return
    gso_type = offload.gso_type & ~_ECN
    if gso_type & GSO_UDP_TUNNEL:
        tunnel.plan(frame.head(HEAD), frame.length, offload)
    elif gso_type:
        head = frame.head(HEAD)
        plan(head, frame.length, offload, find_headers(head))
    elif offload.flags & _UDP_TUNNEL_CSUM:
        raise BadOffload(f"flags {offload.flags:#x} have UDP_TUNNEL_CSUM, without a packet of a tunnel to be cut")
    elif offload.flags & _NEEDS_CSUM:
        check_csum(frame.length, offload)


def finish(frame: Frame, does: int) -> Sequence[Frame] | Iterator[Frame]:
    """Frames that a sink with these abilities (`Does`) can take, in the order in which they go out.

    Where nothing is to be done to its bytes, the frame itself, or one with the same ``segments``, which is as little to
    be kept as the frame is. Else frames with memory of their own, made one by one when they are asked for, from a copy:
    the original is not looked at again after the call.

    Raises BadOffload, as `check`: before the first frame is made.
    """
    offload = frame.offload
    if offload is None:
        return (frame,)
    does = int(does)
    need = needs(offload)
    if need & does == need:
        return (frame,)
    csum = bool(does & _CSUM)
    gso_type = offload.gso_type & ~_ECN
    if gso_type:
        data = frame.tobytes()
        head = data[:HEAD]
        if gso_type & GSO_UDP_TUNNEL:
            return tunnel.cut(data, tunnel.plan(head, len(data), offload), partial=csum)
        how = plan(head, len(data), offload, find_headers(head))
        if does & _LONG_TCP and gso_type != _UDP_L4:
            how = how._replace(size=LONG_FRAME - how.payload)
        return cut(data, how, partial=csum)
    if csum:
        return (Frame(frame.segments, frame.length, offload._replace(flags=offload.flags & _CSUM_FLAGS, gso_type=0)),)
    if offload.flags & _NEEDS_CSUM:
        return (Frame([complete(frame, offload)], frame.length),)
    return (Frame(frame.segments, frame.length),)  # with DATA_VALID, which the sink has not asked for


def complete(frame: Frame, offload: Offload) -> memoryview:
    """A copy of a frame whose checksum, with NEEDS_CSUM, is complete: what ``skb_checksum_help`` does.

    Raises BadOffload, as `check`.
    """
    check_csum(frame.length, offload)
    segments = frame.segments
    data = bytearray(segments[0]) if len(segments) == 1 else bytearray().join(segments)
    view = memoryview(data)
    start = offload.csum_start
    # 0xffff, and not 0, where the sum is a zero: in UDP 0 would be "no checksum".
    U16.pack_into(data, start + offload.csum_offset, 0xFFFF - ones_complement_sum(view[start:]) % 0xFFFF)
    return view
