"""Registers of the common configuration that read as what cannot be, or forget (virtio 1.4, 4.1.4.3)."""

from collections.abc import Callable
from typing import Any

import trio

from vfiouser_virtio.faults.core import FaultyCore
from vfiouser_virtio.protocols.virtio.features import Feature
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
        self._stuck: dict[int, float] = {}
        """By queue, until when its reset does not come to its end."""
        for register, fault in _FAULTS.items():
            self._replace_getter(register, self._lying(register, fault, self._getters[register]))
        self._replace_getter("queue_reset", self._resetting(self._getters["queue_reset"]))
        for register, true in self._setters.items():
            setter = self._setters[register] = self._forgetting(register, true)
            at = COMMON_CFG_OFFSETS[register]
            self._write_exact[at] = setter, self._write_exact[at][1]

    def reset(self) -> None:
        """As `CommonCfg.reset`."""
        super().reset()
        self._stuck.clear()

    def _replace_getter(self, register: str, getter: Callable[[], int]) -> None:
        self._getters[register] = self._read_exact[COMMON_CFG_OFFSETS[register]] = getter

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

    def _resetting(self, true: Callable[[], int]) -> Callable[[], int]:
        def read() -> int:
            until = self._stuck.get(self._queue_select)
            return true() if until is None or trio.current_time() >= until else 1

        return read

    def _forgetting(self, register: str, true: Callable[[int], None]) -> Callable[[int], None]:
        def write(value: int) -> None:
            assert isinstance(self.core, FaultyCore)
            hits = self.core.faults.hits("register-write-lost", lambda given: given["register"] in (register, "any"))
            for hit in hits:
                hit.did(f"{register} is not set to {value:#x}")
            if not hits:
                true(value)

        return write

    def _set_queue_reset(self, value: int) -> None:
        queue = self._queue
        super()._set_queue_reset(value)
        assert isinstance(self.core, FaultyCore)
        if queue is None or value != 1 or not self.core.driver_features & Feature.RING_RESET.mask:
            return
        if hit := self.core.faults.hit("queue-reset-stuck", queue.index):
            seconds = hit["time"]
            hit.did("queue_reset stays 1" + ("" if seconds is None else f" for {seconds:g} s"))
            self._stuck[queue.index] = float("inf") if seconds is None else trio.current_time() + seconds
