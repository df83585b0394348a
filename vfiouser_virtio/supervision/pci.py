"""Virtio over PCI with a journal: the registers as their driver has left them, for the next process of the device."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vfiouser_virtio.errors import ConfigError, GuestError
from vfiouser_virtio.memory import NeedsMessages
from vfiouser_virtio.supervision.core import SupervisedCore
from vfiouser_virtio.supervision.errors import CannotResume
from vfiouser_virtio.transports.pci import NOTIFY, VIRTIO_BAR, VirtioPci
from vfiouser_virtio.vfio_device import Buffer, DmaClient, Hold
from vfiouser_virtio.virtio import Device, DeviceError
from vfiouser_virtio.virtio.author_line import log_bug


class SupervisedPci(VirtioPci):
    """`VirtioPci` that saves its registers in the memfd ``journal_fd`` whenever they have changed.

    ``notifications`` are eventfds of the queues, of which copies are used where there are some. With ``resuming`` it is
    that of a process that has died, and `resume` is called when its client's memory and eventfds are there again; until
    then nothing is saved. The rest of the arguments are those of `VirtioPci`.
    """

    def __init__(
        self,
        device: Device,
        *,
        journal_fd: int,
        notifications: Sequence[int] = (),
        resuming: bool = False,
        **named: Any,
    ) -> None:
        if vars(device).get("shared_regions"):
            raise ConfigError(
                f"{device.name}: it has memory that the client maps, which another process cannot take over: serve it "
                "without --supervise"
            )
        made: list[SupervisedCore] = []

        def core(*arguments: Any, **options: Any) -> SupervisedCore:
            made.append(SupervisedCore(*arguments, journal_fd=journal_fd, **options))
            return made[0]

        super().__init__(device, core=core, **named)
        [self._supervised] = made
        self._notifications = notifications
        self._resuming = resuming
        self._told = False
        self._in_change = False
        # Number of the keeper's request, and how many changes of registers there were for it: now, and at the last one.
        self._request = self._done = 0, 0
        self._supervised.on_change = self.save

    # ---- what changes the registers ------------------------------------------------------------------------------

    def connected(self, client: DmaClient) -> None:
        """As `PciFunction.connected`."""
        super().connected(client)
        self.save()

    def disconnected(self) -> Hold | None:
        """As `PciFunction.disconnected`."""
        hold = super().disconnected()
        self._resuming = False  # whoever comes next begins with this one's registers
        self.save()
        return hold

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        """As `PciFunction.region_write`; nothing where the process before this one has done it."""
        if index == VIRTIO_BAR and offset >= NOTIFY:
            super().region_write(index, offset, data)
        elif not self._was_done():
            self._in_change = True
            try:
                super().region_write(index, offset, data)
                self._done = self._request
            finally:
                self._end_change()

    def reset(self) -> Hold | None:
        """As `PciFunction.reset`; nothing where the process before this one has done it."""
        if self._in_change:  # by a write to the configuration space
            return super().reset()
        if self._was_done():
            return None
        self._in_change = True
        try:
            hold = super().reset()
            self._done = self._request
        finally:
            self._end_change()
        return hold

    def _was_done(self) -> bool:
        """Whether this change of registers was saved before a death. Each of one REGION_WRITE_MULTI is asked for."""
        asked = self._supervised.journal.asked
        if asked != self._request[0]:
            self._request = asked, 0
        self._request = asked, self._request[1] + 1
        # Of others than a keeper, all are number 0.
        return asked > 0 and asked == self._done[0] and self._request[1] <= self._done[1]

    def _end_change(self) -> None:
        """Save the registers, and which change was made, as one step."""
        self._in_change = False
        self.save()

    def save(self) -> None:
        """Save all registers. Takes some 20 µs, so not done for notifications."""
        # In the middle of a change they would be half of it, which is not to be done again on top of that.
        if self._resuming or self._in_change:
            return
        state = {
            "done": self._done,
            "config": self.config.state().hex(),
            "decodes": self._client_decodes,
            "msix": "" if self.msix is None else self.msix.state().hex(),
            "common": self._common.state(),
            "core": self._supervised.state(),
            "device": {
                "id": self.device.device_id,
                "features": self.device.features,
                "config": self.device.config.read(0, self.device.config.size).hex(),
            },
        }
        if not self._supervised.journal.save(json.dumps(state, separators=(",", ":")).encode()) and not self._told:
            self._told = True
            self._log.warning("it has too many queues to be resumed if its process dies")

    # ---- after a death -------------------------------------------------------------------------------------------

    def resume(self, why_not: str = "") -> None:
        """Go on where the process before this one has died, as far as that can be; one line says how.

        ``why_not``: do not, but tell the driver that the device needs a reset.
        """
        try:
            if self._resuming:
                self._restore_saved(why_not)
        finally:
            self._resuming = False
            self.save()

    def _restore_saved(self, why_not: str) -> None:
        try:
            state = json.loads(self._supervised.journal.load() or b"")
            number, changes = state["done"]
        except (ValueError, KeyError, TypeError, RecursionError):  # too long, or the process had gone mad
            self._log.error(
                "cannot be resumed: its journal has no registers that can be read; the device needs a reset"
            )
            self._supervised.lose(known=False)
            return
        self._done = number, changes
        self._restore(state, why_not)

    def _restore(self, state: dict[str, Any], why_not: str) -> None:
        core = self._supervised
        known = True
        try:
            self.config.restore(bytes.fromhex(state["config"]))
            self._client_decodes = state["decodes"]
            if self.msix is not None:
                self.msix.restore(bytes.fromhex(state["msix"]))
                self._msix_written(0, b"")
            self._command_written()
            self._common.restore(**state["common"])
            if what := core.restore(state["core"], why_not):
                self._log.warning("resumed: %s", what)
            return
        except CannotResume as error:
            self._log.error("cannot be resumed: %s; the device needs a reset", error)
        except NeedsMessages:
            self._log.error(
                "cannot be resumed: requests lie in memory without a file descriptor (see share=on); "
                "the device needs a reset"
            )
        except (GuestError, DeviceError) as error:
            self._log.error("cannot be resumed, the device needs a reset: %s", error)
        except Exception as error:
            log_bug(self._log, "cannot be resumed, the device needs a reset: a bug", error)
            known = False
        core.lose(known=known)

    def _make_event_fd(self, queue: int) -> int:
        if queue < len(self._notifications):
            return os.dup(self._notifications[queue])
        return super()._make_event_fd(queue)


def supervised(journal_fd: int, notifications: Sequence[int], *, resuming: bool) -> Callable[..., SupervisedPci]:
    """What makes such a function, for `serving.serve`."""
    return partial(SupervisedPci, journal_fd=journal_fd, notifications=notifications, resuming=resuming)
