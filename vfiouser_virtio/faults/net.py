"""Faults of network devices: headers of received frames, answers to commands, status."""

from vfiouser_virtio.faults.payload import UsedBuffer, number
from vfiouser_virtio.faults.plan import FaultPlan, Hit
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio.net import HDR, HDR_HASH, TYPE, HdrFlags, NetFeature, Status, hdr_size
from vfiouser_virtio.virtio import Device

_AT = offsets(HDR_HASH)
_NUM_BUFFERS, _ = offsets(HDR)["num_buffers"]


class NetPayload:
    """Faults of one queue of a network device; it is asked when the driver has chosen its features."""

    def __init__(self, device: Device, faults: FaultPlan, queue: int) -> None:
        self._faults, self._queue = faults, queue
        features, config = device.driver_features, device.config
        pairs = config["max_virtqueue_pairs"] if "max_virtqueue_pairs" in config.layout else 1
        assert TYPE.sets is not None
        assert isinstance(pairs, int)
        name = TYPE.queue_name(queue, TYPE.sets.number(features, pairs))
        self._receives, self._answers = name.startswith("receiveq"), name == TYPE.last
        self._header = hdr_size(features)
        self._mergeable = bool(features & NetFeature.MRG_RXBUF.mask)
        self._hashes = bool(features & NetFeature.HASH_REPORT.mask)
        self._following = 0

    def spoil(self, buffer: UsedBuffer) -> None:
        """As `Payload.spoil`."""
        if self._receives:
            if self._following:  # of a frame that has begun in a buffer before
                self._following -= 1
            elif buffer.length >= self._header:
                self._spoil_frame(buffer)
        elif self._answers and buffer.length and (hit := self._faults.hit("net-ack", self._queue)):
            ack = number(hit, "value", 1)
            hit.did(f"ack is {ack[0]:#x} instead of {buffer.read(0, 1)[0]:#x}")
            buffer.write(0, ack)

    def _spoil_frame(self, buffer: UsedBuffer) -> None:
        if self._mergeable:
            self._following = int.from_bytes(buffer.read(_NUM_BUFFERS, 2), "little") - 1
        if hit := self._hit("net-num-buffers"):
            self._store(buffer, hit, num_buffers="value")
        if hit := self._hit("net-gso"):
            self._store(buffer, hit, gso_type="type", gso_size="size", hdr_len="hdr-len")
        if hit := self._hit("net-csum"):
            flags = buffer.read(_AT["flags"][0], 1)[0] | HdrFlags.NEEDS_CSUM
            buffer.write(_AT["flags"][0], bytes([flags]))
            self._store(buffer, hit, csum_start="start", csum_offset="offset")
        if hit := self._hit("net-flags"):
            self._store(buffer, hit, flags="value")
        if hit := self._hit("net-hash", self._hashes):
            if hit["value"] is None:
                buffer.write(_AT["hash_value"][0], hit.bytes(4))
                self._store(buffer, hit, hash_report="report")
            else:
                self._store(buffer, hit, hash_value="value", hash_report="report")
        short = self._hit("net-frame-short")
        if short:
            length = max(self._header + short["len"], 0)
            short.did(f"length {length:#x} instead of {buffer.length:#x}")
            buffer.length = length & 0xFFFF_FFFF
        if hit := self._hit("net-frame-long", not short):
            hit.did(f"length {buffer.room:#x} instead of {buffer.length:#x}")
            buffer.length = buffer.room

    def _hit(self, name: str, possible: bool = True) -> Hit | None:
        return self._faults.hit(name, self._queue, possible=possible)

    @staticmethod
    def _store(buffer: UsedBuffer, hit: Hit, **fields: str) -> None:
        """Store arguments in fields of the header."""
        said = []
        for field, argument in fields.items():
            at, size = _AT[field]
            value = number(hit, argument, size)
            was = int.from_bytes(buffer.read(at, size), "little")
            said.append(f"{field} is {int.from_bytes(value, 'little'):#x} instead of {was:#x}")
            buffer.write(at, value)
        hit.did(", ".join(said))


class NetStatus:
    """Field ``status`` of a network device as its driver is to see it."""

    def __init__(self) -> None:
        self._flipped = self._announce = False

    def flap(self) -> str:
        """The link goes the other way; what has happened, in words."""
        self._flipped = not self._flipped
        return "the link is not what it is" if self._flipped else "the link is what it is again"

    def announce(self) -> str:
        """ANNOUNCE is set until it is read."""
        self._announce = True
        return "ANNOUNCE is set"

    def reset(self) -> None:
        """The driver starts anew."""
        self._flipped = self._announce = False

    def show(self, data: bytearray, at: int) -> None:
        """Change ``status`` where ``data`` has its first byte, at ``at``."""
        if 0 <= at < len(data):
            data[at] ^= Status.LINK_UP if self._flipped else 0
            data[at] |= Status.ANNOUNCE if self._announce else 0
            self._announce = False
