"""Configuration as the driver sees it: values, generations, notifications (virtio 1.4, 2.5).

A suspended device may change, but must not show it: what the driver reads stays as it is, and the notification waits
until the driver resumes the device ("Device Suspend").
"""

from collections.abc import Callable

from vfiouser_virtio.virtio.device import Config


class ShownConfig:
    """Configuration of one device; ``interrupt`` sends the configuration change notification."""

    def __init__(self, config: Config, interrupt: Callable[[], None]) -> None:
        self._config = config
        self._interrupt = interrupt
        self._generation = 0
        self._seen = True
        self._frozen: bytes | None = None
        self._changed_unseen = self._notification_due = False
        config.on_change = self.changed

    def replace(self, config: Config) -> None:
        """Show another device's configuration from now on; the driver is told if it is another one."""
        same = config.read(0, config.size) == self._config.read(0, self._config.size)
        self._config.on_change = None
        self._config = config
        config.on_change = self.changed
        if not same:
            self.changed()

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes; beyond the end there are zeros."""
        if self._frozen is None:
            return self._config.read(offset, count)
        return self._frozen[offset : offset + count].ljust(count, b"\0")

    def read_generation(self) -> int:
        """``config_generation``: another number than before if anything has changed since it was read (CC4)."""
        if not self._seen:
            self._generation = (self._generation + 1) & 0xFF
            self._seen = True
        return self._generation

    @property
    def generation(self) -> int:
        """The number that the next read of ``config_generation`` gives if nothing changes until then."""
        return self._generation if self._seen else (self._generation + 1) & 0xFF

    def restore(self, generation: int) -> None:
        """The driver has seen this number, of values that may have been others."""
        self._generation = generation & 0xFF
        self._seen = False

    def changed(self) -> None:
        """The device has changed its configuration."""
        if self._frozen is None:
            self._seen = False
        else:
            self._changed_unseen = True
        self.notify()

    def notify(self) -> None:
        """Send the configuration change notification: now, or when the device is resumed."""
        if self._frozen is None:
            self._interrupt()
        else:
            self._notification_due = True

    def freeze(self) -> None:
        """The device is suspended."""
        self._frozen = self._config.read(0, self._config.size)

    def thaw(self) -> None:
        """The device is resumed: show what has changed, and tell the driver."""
        self._frozen = None
        changed, due = self._changed_unseen, self._notification_due
        self._changed_unseen = self._notification_due = False
        if changed:
            self._seen = False
        if due:
            self._interrupt()

    def reset(self) -> None:
        """The driver starts anew, and reads everything."""
        self._frozen = None
        self._seen = self._seen and not self._changed_unseen
        self._changed_unseen = self._notification_due = False
