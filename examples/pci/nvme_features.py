"""Features of an NVMe controller, which its driver sets and gets.

Facts: NVM Express Base Specification 2.0c, §5.14 (Get Features), §5.27 (Set Features).
"""

from typing import TYPE_CHECKING

from pci import nvme_formats as formats
from pci.nvme_formats import Command, Failed, Feature, Status

if TYPE_CHECKING:
    from pci.nvme import Nvme

KNOWN = frozenset(Feature)


class Features:
    """Values of the features of ``nvme``; after a controller reset there are new ones."""

    def __init__(self, nvme: "Nvme") -> None:
        self._nvme = nvme
        self._values: dict[tuple[int, int], int] = {}

    def set(self, command: Command) -> int:
        """Result of Set Features. Raises Failed."""
        if command.cdw10 >> 31:
            raise Failed(Status.FEATURE_NOT_SAVEABLE)
        which, value = self._which(command), command.cdw11
        if which[0] == Feature.NUMBER_OF_QUEUES:
            if value & 0xFFFF == 0xFFFF or value >> 16 == 0xFFFF:
                raise Failed(Status.INVALID_FIELD)
            return self._default(which)
        if which[0] == Feature.VOLATILE_WRITE_CACHE:
            self._nvme.disk.write_cache = bool(value & 1)
        self._values[which] = value
        return 0

    def get(self, command: Command) -> int:
        """Result of Get Features. Raises Failed."""
        which = self._which(command)
        if command.cdw10 >> 8 & 7:  # ONCS: there are no saved values
            raise Failed(Status.INVALID_FIELD)
        return self._values.get(which, self._default(which))

    def _which(self, command: Command) -> tuple[int, int]:
        """Identifier, and which of them: of a few kinds there are several."""
        number, value = command.cdw10 & 0xFF, command.cdw11
        if number not in KNOWN:
            raise Failed(Status.INVALID_FIELD)
        if number == Feature.TEMPERATURE_THRESHOLD:
            return number, value >> 20 & 3
        if number == Feature.INTERRUPT_VECTOR:
            if value & 0xFFFF >= len(self._nvme.irq):
                raise Failed(Status.INVALID_FIELD)
            return number, value & 0xFFFF
        return number, 0

    def _default(self, which: tuple[int, int]) -> int:
        number, index = which
        if number == Feature.NUMBER_OF_QUEUES:
            return (self._nvme.num_queues - 1) * 0x0001_0001
        if number == Feature.TEMPERATURE_THRESHOLD:
            return formats.WARNING_KELVIN if index == 0 else 0
        if number == Feature.INTERRUPT_VECTOR:
            return index
        return 1 if number == Feature.VOLATILE_WRITE_CACHE else 0
