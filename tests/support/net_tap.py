"""TAP interface in a network namespace, at whose other end is a guest with an address."""

from support.net_namespace import NetNamespace

from vfiouser_virtio.backends.net.tap import TapNetdev

GUEST_MAC = bytes.fromhex("525400123456")
HOST, GUEST = "192.0.2.1", "192.0.2.2"
PORT = 5000
ETHERNET, IP_HEADER, UDP_HEADER = 14, 20, 8
HEADERS = ETHERNET + IP_HEADER + UDP_HEADER


def new_tap(namespace: NetNamespace, *, queues: int = 1) -> TapNetdev:
    """``tap7``, with a neighbour that the host need not ask for; to be closed."""
    made = namespace.run(lambda: TapNetdev(ifname="tap7", queues=queues))
    namespace.ip(f"addr add {HOST}/24 dev tap7")
    namespace.ip(f"neigh add {GUEST} lladdr {GUEST_MAC.hex(':')} dev tap7")
    return made
