"""Service manager notifications (systemd, sd_notify(3)): a server is ready, alive, or about to end."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.vfio_user import ServiceManager


@asynccontextmanager
async def ready_service(manager: ServiceManager) -> AsyncIterator[None]:
    """A service that is ready from here on, and about to end at the end of the block: its ``manager`` is told.

    Where the manager watches it (``WatchdogSec=``, sd_watchdog_enabled(3)), the event loop says in half of that time
    that it is alive, which it cannot while a device does not yield.
    """
    manager.tell("READY=1")
    try:
        async with background() as tasks:
            if seconds := _watched_for():
                tasks.start_soon(_keep_alive, manager, seconds / 2)
            yield
    finally:
        manager.tell("STOPPING=1")


def _watched_for() -> float:
    """Seconds of silence after which the manager takes us for dead; 0 where it does not watch, or another process."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()) or not microseconds.isascii():
        return 0
    return int(microseconds) / 1e6 if microseconds.isdigit() else 0


async def _keep_alive(manager: ServiceManager, seconds: float) -> None:
    while True:
        manager.tell("WATCHDOG=1")
        await trio.sleep(seconds)
