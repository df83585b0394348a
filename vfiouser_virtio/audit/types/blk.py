"""Watch of a disk's requests (virtio 1.4, 5.2.6)."""

from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import Rule, must, should
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.protocols.virtio.blk import (
    ID_BYTES,
    REQUEST_HEADER_CODEC,
    SECTOR_SIZE,
    SEGMENT_CODEC,
    RequestType,
)
from vfiouser_virtio.virtio import DeviceCore

_OPERATION = "5.2.6.1 Device Operation"
_ANY = 1 << 64

SHORT = must(
    "blk/layout",
    "5.2.6 Device Operation (prose)",
    "A request has a header of 16 bytes to be read, and a byte of status to be written.",
    "lengths of each request",
)
CAPACITY = must(
    "blk/capacity",
    _OPERATION,
    "No request would read or write beyond capacity.",
    "sector and length of IN and OUT, and of the segments of DISCARD, WRITE_ZEROES and SECURE_ERASE; "
    "the largest capacity since the device's reset, of a disk that has shrunk",
)
FLUSH_SECTOR = must("blk/flush-sector", _OPERATION, "sector is 0 in a FLUSH.", "sector of each FLUSH")
FLUSH_DATA = should("blk/flush-data", _OPERATION, "A FLUSH has no data.", "length of each FLUSH")
DATA = must(
    "blk/data-length", _OPERATION, "The data of IN and OUT are multiples of 512 bytes.", "length of each IN and OUT"
)
SEGMENTS = must(
    "blk/segments-length",
    _OPERATION,
    "The data of DISCARD, WRITE_ZEROES and SECURE_ERASE are multiples of 16 bytes, the size of a segment.",
    "length of each of these requests",
)
GET_ID = must("blk/get-id-length", _OPERATION, "The data of GET_ID have 20 bytes.", "length of each GET_ID")
_MOST: dict[RequestType, tuple[str, Rule]] = {
    kind: (
        f"max_{name}_seg",
        must(
            f"blk/{name.replace('_', '-')}-segments",
            _OPERATION,
            f"{kind.name} has no more than max_{name}_seg segments.",
            f"length of each {kind.name}",
        ),
    )
    for kind, name in (
        (RequestType.DISCARD, "discard"),
        (RequestType.WRITE_ZEROES, "write_zeroes"),
        (RequestType.SECURE_ERASE, "secure_erase"),
    )
}
UNMAP = must("blk/discard-unmap", _OPERATION, "unmap is 0 in the segments of DISCARD.", "flags of each segment")


class BlkWatch(RequestWatch):
    """Watch of all request queues."""

    def __init__(self, core: DeviceCore, findings: Findings) -> None:
        super().__init__(core, findings)
        self._capacity = self.config("capacity", _ANY)

    def reset(self) -> None:
        """The driver will read the capacity anew."""
        self._capacity = self.config("capacity", _ANY)

    def available(self, chain: SeenChain) -> None:
        """A whole request."""
        header = chain.peek(REQUEST_HEADER_CODEC.size)
        where = f"queue {chain.queue}"
        if chain.out_length < REQUEST_HEADER_CODEC.size or chain.in_length < 1:
            self.broke(SHORT, f"{where}: a request of {chain.out_length:#x} and {chain.in_length:#x} bytes")
            return
        if len(header) < REQUEST_HEADER_CODEC.size:
            return  # in memory that cannot be looked at now
        kind, _, sector = REQUEST_HEADER_CODEC.unpack(header)
        data, room = chain.out_length - REQUEST_HEADER_CODEC.size, chain.in_length - 1
        if kind in (RequestType.IN, RequestType.OUT):
            length = room if kind == RequestType.IN else data
            what = f"{where}: {RequestType(kind).name} of {length:#x} bytes at sector {sector:#x}"
            if length % SECTOR_SIZE:
                self.broke(DATA, what)
            self._check_capacity(sector, -(-length // SECTOR_SIZE), what)
        elif kind == RequestType.FLUSH:
            if sector:
                self.broke(FLUSH_SECTOR, f"{where}: FLUSH of sector {sector:#x}")
            if data or room:
                self.broke(FLUSH_DATA, f"{where}: FLUSH with {data + room:#x} bytes of data")
        elif kind == RequestType.GET_ID:
            if room != ID_BYTES:
                self.broke(GET_ID, f"{where}: GET_ID with room for {room:#x} bytes")
        elif kind in _MOST:
            self._check_segments(RequestType(kind), chain, data, where)

    def _check_segments(self, kind: RequestType, chain: SeenChain, data: int, where: str) -> None:
        count, rest = divmod(data, SEGMENT_CODEC.size)
        if rest:
            self.broke(SEGMENTS, f"{where}: {kind.name} with {data:#x} bytes of data")
        field, rule = _MOST[kind]
        most = self.config(field, _ANY)
        if count > most:
            self.broke(rule, f"{where}: {kind.name} of {count:#x} segments; {field} is {most:#x}")
        raw = chain.peek()[REQUEST_HEADER_CODEC.size :]
        for sector, sectors, flags in SEGMENT_CODEC.iter_unpack(raw[: len(raw) // 16 * 16]):
            what = f"{where}: {kind.name} of {sectors:#x} sectors at {sector:#x}"
            if kind == RequestType.DISCARD and flags & 1:
                self.broke(UNMAP, f"{what} with unmap")
            self._check_capacity(sector, sectors, what)

    def _check_capacity(self, sector: int, sectors: int, what: str) -> None:
        # When a driver learns that the disk has shrunk, and which requests it has made before, is not to be seen.
        self._capacity = max(self._capacity, self.config("capacity", _ANY))
        if sector + sectors > self._capacity:
            self.broke(CAPACITY, f"{what}; capacity is {self._capacity:#x}")
