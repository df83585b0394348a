"""Watch of a device's registers: the interface of all that look at a driver's register accesses."""

from collections.abc import Sequence
from typing import Protocol

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import Rule
from vfiouser_virtio.virtio import DeviceCore


class Registers(Protocol):
    """Registers of the PCI function, as far as watches have to know them."""

    @property
    def core(self) -> DeviceCore: ...

    @property
    def vectors(self) -> int:
        """Size of the MSI-X table."""
        ...

    @property
    def msix_enabled(self) -> bool: ...


class Watch:
    """Base of the watches of registers: each method is called before the device acts. By default nothing is seen."""

    def __init__(self, registers: Registers, findings: Findings) -> None:
        self.registers = registers
        self.findings = findings

    @property
    def core(self) -> DeviceCore:
        """The device's status, features and queues, as the driver has set them."""
        return self.registers.core

    def broke(self, rule: Rule, seen: str) -> None:
        """See `Findings.broke`."""
        self.findings.broke(rule, seen)

    def field_read(self, name: str, value: int) -> None:
        """The driver has read a field of the common configuration (after the device has answered)."""

    def field_written(self, name: str, value: int) -> None:
        """The driver writes a field of the common configuration; of a 64-bit one perhaps a half."""

    def config_read(self, offset: int, count: int) -> None:
        """The driver reads the device-specific configuration."""

    def config_written(self, offset: int, data: bytes) -> None:
        """The driver writes the device-specific configuration."""

    def notified(self, offset: int, data: bytes) -> None:
        """The driver writes to the notification structure, ``offset`` bytes into it."""

    def isr_read(self) -> None:
        """The driver reads ISR status."""

    def reset(self) -> None:
        """The whole function is reset, not by ``device_status``."""


class Watches:
    """Several watches as one."""

    def __init__(self, watches: Sequence[Watch], findings: Findings) -> None:
        self._all = watches
        self._tell = findings.tell

    def field_read(self, name: str, value: int) -> None:
        """See `Watch`."""
        for watch in self._all:
            self._tell(watch.field_read, name, value)

    def field_written(self, name: str, value: int) -> None:
        """See `Watch`."""
        for watch in self._all:
            self._tell(watch.field_written, name, value)

    def config_read(self, offset: int, count: int) -> None:
        """See `Watch`."""
        for watch in self._all:
            self._tell(watch.config_read, offset, count)

    def config_written(self, offset: int, data: bytes) -> None:
        """See `Watch`."""
        for watch in self._all:
            self._tell(watch.config_written, offset, data)

    def notified(self, offset: int, data: bytes) -> None:
        """See `Watch`."""
        for watch in self._all:
            self._tell(watch.notified, offset, data)

    def isr_read(self) -> None:
        """See `Watch`."""
        for watch in self._all:
            self._tell(watch.isr_read)

    def reset(self) -> None:
        """See `Watch`."""
        for watch in self._all:
            self._tell(watch.reset)
