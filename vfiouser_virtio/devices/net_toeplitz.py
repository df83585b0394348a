"""Toeplitz hash, by tables that are made once for a key (virtio 1.4, 5.1.9.4.3; the hash of Microsoft's RSS).

Each bit of the input that is set adds (xor) the 32 bits of the key from there on. So each byte of the input adds one of
256 numbers, which depend on its place and the key only.
"""

MAX_KEY = 40
"""Bytes of a key: what the longest input has, two IPv6 addresses and two ports, and the 32 bits from its end on."""
MAX_INPUT = 36


class Toeplitz:
    """Hash with one key, of `MAX_KEY` bytes at most: what it lacks is zero."""

    __slots__ = ("_tables", "key")

    def __init__(self, key: bytes) -> None:
        self.key = key
        bits = int.from_bytes(key.ljust(MAX_KEY, b"\0"), "big")
        self._tables = [_table(bits >> 8 * (MAX_INPUT - 1 - place) & 0xFF_FFFF_FFFF) for place in range(MAX_INPUT)]

    def __call__(self, data: bytes) -> int:
        """The hash of up to `MAX_INPUT` bytes, 32 bits."""
        value = 0
        for table, byte in zip(self._tables, data):  # noqa: B905 - the input may be shorter; strict takes longer
            value ^= table[byte]
        return value


def _table(bits: int) -> list[int]:
    """What each byte adds where these 40 bits of the key begin."""
    table = [0]
    for bit in range(8):  # of a byte, the lowest first: its window begins 7 - bit after the highest one's
        window = bits >> 1 + bit & 0xFFFF_FFFF
        table += [each ^ window for each in table]
    return table
