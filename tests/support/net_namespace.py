"""A network namespace of a test's own: what is made in it is seen by nothing else, and goes with it. Takes root."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest

from vfiouser_virtio.libc import libc

Result = TypeVar("Result")
_CLONE_NEWNET = 0x40000000


class NetNamespace:
    """A thread that lives in the namespace: sockets and interfaces that it opens belong there, and can be used here."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread

    def run(self, work: Callable[[], Result]) -> Result:
        """Call something in the namespace."""
        return self._thread.submit(work).result()

    def ip(self, arguments: str) -> str:
        """``ip`` of iproute2 in the namespace."""
        command = ["ip", *arguments.split()]
        return self.run(lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@contextmanager
def net_namespace() -> Iterator[NetNamespace]:
    """A new namespace with its loopback up; the test is skipped where that takes a privilege that is not here."""
    if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        pytest.skip("takes root and /dev/net/tun")
    with ThreadPoolExecutor(1) as thread:
        namespace = NetNamespace(thread)
        if namespace.run(lambda: libc.unshare(ctypes.c_int(_CLONE_NEWNET))):
            pytest.skip("this root may not make network namespaces")
        namespace.ip("link set lo up")
        yield namespace
