"""Registers of the common configuration that read as what cannot be (virtio 1.4, 4.1.4.3)."""

from collections.abc import Callable
from typing import Any

from vfiouser_virtio.faults.core import FaultyCore
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS, NO_VECTOR
from vfiouser_virtio.transports.common_cfg import CommonCfg

_FAULTS = {
    "num_queues": "num-queues",
    "queue_size": "queue-size",
    "queue_notify_off": "queue-notify-off",
    "queue_msix_vector": "vector-refused",
}


class FaultyCommonCfg(CommonCfg):
    """Common configuration with the faults of its core's plan."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for register, fault in _FAULTS.items():
            self._getters[register] = self._read_exact[COMMON_CFG_OFFSETS[register]] = self._lying(
                register, fault, self._getters[register]
            )

    def _lying(self, register: str, fault: str, true: Callable[[], int]) -> Callable[[], int]:
        size = COMMON_CFG_OFFSETS[register][1]

        def read() -> int:
            value = true()
            queue = None if register == "num_queues" else self._queue_select
            assert isinstance(self.core, FaultyCore)
            if queue is not None and queue >= len(self.core.queues):
                return value  # one that does not exist
            hit = self.core.faults.hit(fault, queue)
            if hit is None:
                return value
            lie = NO_VECTOR if fault == "vector-refused" else int(hit["value"]) & (1 << 8 * size) - 1
            hit.did(f"{register} reads as {lie:#x} instead of {value:#x}")
            return lie

        return read
