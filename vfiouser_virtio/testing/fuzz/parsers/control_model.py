"""Commands of the control queue read plainly (virtio 1.4, 5.1.9.5): what a network device must be told, and answer."""

import struct

PAIRS, QUEUES = 4, 8
"""Pairs of queues, and queues without the control queue."""
ENABLED = (0, 1, 2, 3, 5)
"""Queues that the driver has enabled."""
_MOST_MACS, _MOST_TABLE, _MOST_KEY, _HASH_TYPES = 256, 128, 40, 0x1FF
_MAC = 1 << 5
OFFLOADS = {1: 1, 7: 7, 8: 8, 9: 9, 10: 10, 54: 54, 55: 55, 46: 65, 47: 66}
"""Feature of each bit of GUEST_OFFLOADS_SET (5.1.9.5.7)."""
STATISTICS = (8, 1)
STATISTICS_KINDS = (0, 1, 2, 16, 17, 18, 32)
"""Kinds of statistics that there are (5.1.9.5.11)."""
# Features that commands need (5.1.9.5), by class and command.
NEEDS = {(0, 0): 18, (0, 1): 18, (0, 2): 20, (0, 3): 20, (0, 4): 20, (0, 5): 20, (1, 0): 18, (1, 1): 23, (2, 0): 19}
NEEDS |= {(2, 1): 19, (3, 0): 21, (4, 0): 22, (4, 1): 60, (4, 2): 57, (5, 0): 2, (6, 0): 53, (6, 1): 53, (6, 2): 52}
NEEDS |= {(6, 3): 52, (8, 0): 50, STATISTICS: 50}
ALL_FEATURES = sum(1 << bit for bit in {*NEEDS.values(), *OFFLOADS.values(), 5})

Told = tuple[object, ...]
"""What one of the objects behind the commands is told: a word, and what comes with it."""


class RefusedCommand(Exception):
    """Command that is answered with ERR, and changes nothing."""


def _check(right: object) -> None:
    if not right:
        raise RefusedCommand


def expected_of(command: bytes, room: int, features: int) -> tuple[list[Told], bytes]:
    """What is told, and the result (5.1.9.5). Raises `RefusedCommand`."""
    _check(len(command) >= 2)
    kind, number, data = command[0], command[1], command[2:]
    _check((kind, number) in NEEDS)
    _check(features >> NEEDS[kind, number] & 1)
    if kind == 0:
        _check(len(data) == 1)
        _check(data[0] <= 1)
        return [("set_mode", number, bool(data[0]))], b""
    if kind == 2:
        _check(len(data) == 2)
        vlan = int.from_bytes(data, "little")
        _check(vlan < 4096)
        return [("remove_vlan" if number else "add_vlan", vlan)], b""
    if kind == 3:
        _check(not data)
        return [("set", ("status", 1))], b""
    if kind == 5:
        _check(len(data) == 8)
        bits = [bit for bit in range(64) if int.from_bytes(data, "little") >> bit & 1]
        _check(all(bit in OFFLOADS and features >> OFFLOADS[bit] & 1 for bit in bits))
        return [("set_offloads", sum(1 << OFFLOADS[bit] for bit in bits))], b""
    if kind == 8:
        _check(not data)
        _check(room >= 8)
        return [], struct.pack("<Q", sum(1 << kind for kind in STATISTICS_KINDS))
    if kind == 1:
        return _addresses(number, data, features), b""
    return (_queues(number, data), b"") if kind == 4 else _coalescing(number, data, room, features)


def _addresses(number: int, data: bytes, features: int) -> list[Told]:
    if number == 1:
        _check(len(data) == 6)
        _check(any(data) and not data[0] & 1)
        told: list[Told] = [("set", ("mac", data))] if features & _MAC else []
        return [*told, ("set_mac", data)]
    tables: list[object] = []
    for group in (0, 1):
        _check(len(data) >= 4)
        count = int.from_bytes(data[:4], "little")
        _check(6 * count <= len(data) - 4)
        macs = [data[4 + 6 * each : 10 + 6 * each] for each in range(count)]
        data = data[4 + 6 * count :]
        _check(count > _MOST_MACS or all(mac[0] & 1 == group for mac in macs))
        tables.append(None if count > _MOST_MACS else tuple(macs))
    _check(not data)
    return [("set_macs", *tables)]


def _queues(number: int, data: bytes) -> list[Told]:
    if number == 0:
        _check(len(data) == 2)
        pairs = int.from_bytes(data, "little")
        _check(0 < pairs <= PAIRS)
        return [("set_pairs", pairs)]
    if number == 2:
        _check(len(data) >= 13)
        types = int.from_bytes(data[:4], "little")
        return [("set_hash", types, _key(types, data[12], data[13:]))]
    _check(len(data) >= 8)
    types, mask, unclassified = struct.unpack_from("<IHH", data)
    count = mask + 1
    _check(count.bit_count() == 1 and count <= _MOST_TABLE and len(data) >= 8 + 2 * count + 3)
    table = struct.unpack_from(f"<{count}H", data, 8)
    pairs, length = struct.unpack_from("<HB", data, 8 + 2 * count)
    _check(max(unclassified, *table) < PAIRS and 0 < pairs <= PAIRS)
    key = _key(types, length, data[8 + 2 * count + 3 :])
    return [("set_rss", (unclassified, table), types, key, pairs)]


def _key(types: int, length: int, data: bytes) -> bytes:
    _check(not types & ~_HASH_TYPES and length <= _MOST_KEY and (length or not types) and length <= len(data))
    return data[:length]


def _coalescing(number: int, data: bytes, room: int, features: int) -> tuple[list[Told], bytes]:
    count = QUEUES if features >> 22 & 1 or features >> 60 & 1 else 2
    if number < 2:
        _check(len(data) == 8)
        packets, usecs = struct.unpack("<II", data)
        # 0 is for what is sent, whose queues are the odd ones.
        return [("coalesce", index, packets, usecs, False) for index in range(1 - number, count, 2)], b""
    _check(len(data) == (12 if number == 2 else 4))
    index = int.from_bytes(data[:2], "little")
    if number == 3:
        _check(room >= 8)
    _check(index < count and index in ENABLED)
    if number == 3:
        return [], struct.pack("<II", index, 7)
    return [("coalesce", index, *struct.unpack_from("<II", data, 4), True)], b""
