"""Configuration that reads as something else."""

from collections.abc import Mapping
from typing import Any

from vfiouser_virtio.faults.input import spoil_absinfo
from vfiouser_virtio.faults.net import NetStatus
from vfiouser_virtio.faults.plan import FaultPlan
from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.virtio import Device


class ConfigLies:
    """Faults of what one device's driver reads of its configuration, and of config_generation."""

    def __init__(self, faults: FaultPlan) -> None:
        self._faults = faults
        self._first_generation: int | None = None
        self.net = NetStatus()

    def show(self, device: Device, true: bytes, offset: int) -> bytes:
        """What is read at ``offset`` instead of ``true``."""
        data, faults, count = bytearray(true), self._faults, len(true)
        fields = device.config.layout

        def touched(given: Mapping[str, Any]) -> bool:
            at, size = fields[given["field"]]
            return bool(offset < at + size and at < offset + count)

        if device.device_id == DeviceId.NET and "status" in fields:
            self.net.show(data, fields["status"][0] - offset)
        if device.device_id == DeviceId.INPUT and "input-absinfo" in faults:
            spoil_absinfo(faults, device, data, offset)
        for hit in faults.hits("config-value", touched):
            at, size = fields[hit["field"]]
            value = (hit["value"] & (1 << 8 * size) - 1).to_bytes(size, "little")
            begin, end = max(at, offset), min(at + size, offset + count)
            data[begin - offset : end - offset] = value[begin - at : end - at]
            hit.did(f"{hit['field']} reads as {hit['value']:#x}")
        if data and (ones := faults.hit("config-all-ones")):
            ones.did(f"{count:#x} bytes at {offset:#x}")
            data[:] = b"\xff" * count
        if data and (change := faults.hit("config-changes")):
            at, flips = change.draw(count), 1 + change.draw(255)
            change.did(f"byte {offset + at:#x} reads as {data[at] ^ flips:#x} instead of {data[at]:#x}")
            data[at] ^= flips
        return bytes(data)

    def generation(self, value: int) -> int:
        """What config_generation reads as."""
        if self._first_generation is None:
            self._first_generation = value
        if hit := self._faults.hit("generation-stuck"):
            hit.did(f"{self._first_generation:#x}, and not {value:#x}")
            value = self._first_generation
        if hit := self._faults.hit("generation-moves"):
            moved = value + hit.n & 0xFF
            hit.did(f"{moved:#x} instead of {value:#x}")
            value = moved
        return value
