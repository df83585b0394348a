"""Where the conversations of records take place: a recorded libvfio-user, a folder, and what has been opened there."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.vfu_peer import Peer
from support.vfu_recorder import RecordedFunctions

from vfiouser_virtio.libvfio_user.bindings import Context, Functions, PciType, RegionFlag

MEM = RegionFlag.RW | RegionFlag.MEM
PAGE = 4096


class Stage:
    """Where a conversation takes place: the recorded library, a folder, and what has been opened there."""

    def __init__(self, functions: Functions, folder: Path) -> None:
        self.functions = RecordedFunctions(functions)
        self.path = folder / "s"
        self._fds: list[int] = []
        self._peers: list[Peer] = []

    @contextmanager
    def device(self, set_up: Callable[[Context], None] = lambda context: None) -> Iterator[Context]:
        """A realized PCI Express device."""
        with Context(self, self.path) as context:
            context.pci_init(PciType.EXPRESS)
            set_up(context)
            context.realize_ctx()
            yield context

    @contextmanager
    def driven(self, set_up: Callable[[Context], None]) -> Iterator[tuple[Context, Peer]]:
        """A device and a client that it has agreed on a version with."""
        with self.device(set_up) as context:
            peer = self.peer()
            peer.version()
            context.attach_ctx()
            peer.receive()
            yield context, peer
            peer.close()

    def peer(self) -> Peer:
        self._peers.append(peer := Peer(self.path, self.functions.client))
        return peer

    def memory(self, size: int, content: bytes = b"") -> int:
        """A memfd."""
        self._fds.append(fd := os.memfd_create("conversation"))
        os.truncate(fd, size)
        os.pwrite(fd, content, 0)
        return fd

    def eventfd(self) -> int:
        self._fds.append(fd := os.eventfd(0, os.EFD_NONBLOCK))
        return fd

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        for peer in self._peers:
            peer.close()


def ask(context: Context, peer: Peer, request: Callable[..., None], *arguments: Any, **options: Any) -> Any:
    """One request, handled, and its reply."""
    request(*arguments, **options)
    context.run_ctx()
    return peer.receive()


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """A call that fails; with which errno is in the record."""
    try:
        call(*arguments, **options)
    except OSError:
        return
    raise AssertionError("the call succeeded")
