"""`EchoDevice` for engines that keep eventfds and mappings themselves."""

import ctypes
from collections.abc import Callable
from typing import Any

from support.echo_device import EchoDevice

from vfiouser_virtio.vfio_device import Hold, Trigger


class HostedEcho(EchoDevice):
    """Keeps the trigger and where memory is; `quiesce_hold` is what the next `quiesce` gives."""

    def __init__(self) -> None:
        super().__init__()
        self.trigger: Trigger | None = None
        self.aliases: dict[int, tuple[int, int]] = {}
        self.quiesce_hold: Hold | None = None
        self.on_retry: Callable[[], Any] = lambda: None
        self.alias_error: Exception | None = None

    def set_trigger(self, trigger: Trigger | None) -> None:
        self.trigger = trigger

    def retry_interrupts(self) -> None:
        self.on_retry()

    def dma_map_alias(
        self, address: int, size: int, *, readable: bool, writable: bool, vaddr: int, page_size: int
    ) -> None:
        if self.alias_error is not None:
            raise self.alias_error
        self.calls.append(("dma_map_alias", address, size, readable, writable, page_size))
        self.aliases[address] = vaddr, size

    def memory(self, address: int, size: int) -> bytes:
        """What the engine's mapping holds."""
        vaddr, mapped = self.aliases[address]
        assert size <= mapped
        return ctypes.string_at(vaddr, size)

    def quiesce(self) -> Hold | None:
        self.calls.append(("quiesce",))
        hold, self.quiesce_hold = self.quiesce_hold, None
        return hold

    def resume(self) -> None:
        self.calls.append(("resume",))
