"""Findings about known drivers, for docs/audit.md."""

from typing import NamedTuple


class Peer(NamedTuple):
    """BrokenRule of a driver that somebody ships, or that there is none."""

    driver: str
    date: str
    rule: str
    seen: str


_DATE = "2026-11-29"
_SINCE = "2026-11-30"
"""With the rules about frames, statistics, queries of input devices and free page hints."""
_SEABIOS = "SeaBIOS 1.17.0, as QEMU 11.1.3 of Debian has it (blk)"
_SPDK = "SPDK 26.09-pre, bdevperf over vfio-user (blk)"
_IPXE = "iPXE 1.21.1+git20250501, as QEMU 11.1.3 of Debian has it (net)"
_BALLOON = "kicks statsq (queue 2) in its probe, before DRIVER_OK (drivers/virtio/virtio_balloon.c: init_vqs)"

PEERS: list[Peer] = [
    Peer(
        _SEABIOS,
        _DATE,
        "`status/reset-wait`",
        "writes device_status 0, then 3, with no read of it but one of ISR status (src/hw/virtio-pci.c: vp_reset)",
    ),
    Peer(_SEABIOS, _DATE, "`init/acknowledge-first`", "sets ACKNOWLEDGE and DRIVER in one write"),
    Peer(_SEABIOS, _DATE, "`config/optional`", "reads the geometry of a disk that does not offer GEOMETRY"),
    Peer(_SEABIOS, _DATE, "`config/generation` (SHOULD)", "reads capacity with no config_generation around it"),
    Peer(
        _SPDK,
        _DATE,
        "`config/width`",
        "reads the 64 bits of capacity at once (module/bdev/virtio/bdev_virtio_blk.c:418)",
    ),
    Peer(
        _SPDK,
        _DATE,
        "`queue/enable-zero`",
        "writes queue_enable 0 for each queue when it lets go of the device (lib/virtio/virtio_vfio_user.c:355)",
    ),
    Peer(
        "OVMF 2025.02 of Debian (net, rng)",
        _SINCE,
        "`status/reset-wait`",
        "writes ACKNOWLEDGE with no read of 0 since the reset; a boot by net shows nothing else "
        "(tests/interop/test_net_boot.py)",
    ),
    Peer(_IPXE, _SINCE, "none", "DHCP, and Linux by TFTP (tests/interop/test_net_boot.py)"),
    Peer("Linux 6.1, 6.12 and 7.3 (balloon)", _SINCE, "`init/notify-early`", _BALLOON),
    Peer(
        "Linux 7.3 (net)",
        _SINCE,
        "`net/tunnel-inner`",
        "VXLAN, GENEVE of IPv6 over IPv4: packets to be cut have UDP_TUNNEL_IPV4, and of IPv4 over IPv6 the other bit: "
        "it is that of the outer header (include/linux/virtio_net.h: virtio_net_hdr_tnl_from_skb, by skb->protocol)",
    ),
    Peer(
        "Linux 6.12 (blk, net, rng)",
        _DATE,
        "`features/notif-config-data` (SHOULD)",
        "notif-config-data=on: not accepted",
    ),
    Peer(
        "Linux 6.1, 6.12 and 7.3 (blk, net, rng, console, input)",
        _SINCE,
        "none",
        "a boot each, with reads, writes, random bytes and a few packets (tests/interop/test_audit.py)",
    ),
    Peer(
        "Linux 6.1, 6.12 and 7.3 (net)",
        _SINCE,
        "none",
        "two guests on a hub: TCP in segments that are to be cut, by IPv4, IPv6 and in a VLAN, number of queues, "
        "statistics (tests/interop/test_audit.py)",
    ),
    Peer(
        "Linux 6.12 and 7.3 (net)",
        _SINCE,
        "none",
        "by hand: UDP in segments, RSS tables, coalescing, ring sizes; with GUEST_HDRLEN, forwarded TCP as well; VXLAN "
        "and GENEVE with and without an outer checksum, in 7.3 with IP headers of the same version; GRE with and "
        "without a checksum, IPIP, FOU, GUE; GRE and IP over IPv6",
    ),
    Peer(
        "Linux 6.12 (balloon, input)",
        _SINCE,
        "none but that of balloons above",
        "by hand: inflation, reporting and free page hints; keyboard, mouse, tablet, touch screen, with a rebind",
    ),
    Peer(
        "Linux 6.12 (blk, net, rng)", _DATE, "no MUST", "packed=on; with in-order=on and notification-data=on as well"
    ),
]
