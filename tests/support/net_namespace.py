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
# linux/capability.h: the version of two times 32 bits, and of each effective, permitted, inheritable.
_CAPABILITY_VERSION_3, _CAP_NET_ADMIN = 0x20080522, 12


class NetNamespace:
    """A thread that lives in the namespace: sockets and interfaces that it opens belong there, and can be used here."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread

    def run(self, work: Callable[[], Result]) -> Result:
        """Call something in the namespace."""
        return self._thread.submit(work).result()

    def without_privilege(self, work: Callable[[], Result]) -> Result:
        """Call something in the namespace, by a thread that is without CAP_NET_ADMIN for as long."""
        header, masks = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()

        def without() -> Result:
            assert libc.capget(header, masks) == 0
            masks[0] &= ~(1 << _CAP_NET_ADMIN)
            assert libc.capset(header, masks) == 0
            try:
                return work()
            finally:
                masks[0] |= 1 << _CAP_NET_ADMIN
                assert libc.capset(header, masks) == 0

        return self.run(without)

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
