"""Devices made in a thread: what ``__init__`` opens may lie on a file system that hangs."""

import logging
import threading

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.serving.device_setup import DeviceSetup
from vfiouser_virtio.virtio import Device
from vfiouser_virtio.virtio.device_checks import close_device

logger = logging.getLogger(__name__)

# After so many seconds it is said what is being waited for.
_SAY_AFTER_S = 1.0


async def made_in_thread(setup: DeviceSetup) -> Device:
    """`DeviceSetup.make`, in a thread. Cancelled, it closes the device when that has been made after all."""
    made: list[Device] = []
    given_up = False
    lock = threading.Lock()

    def make() -> None:
        device = setup.make()
        with lock:
            if not given_up:
                made.append(device)
                return
        close_device(device, setup.name)

    async def say_what_takes_so_long() -> None:
        await trio.sleep(_SAY_AFTER_S)
        logger.warning("%s: to make it takes long: a file system of the host is slow, or hangs", setup.name)

    async with background() as tasks:
        tasks.start_soon(say_what_takes_so_long)
        try:
            await trio.to_thread.run_sync(make, abandon_on_cancel=True)
        except trio.Cancelled:
            with lock:
                given_up = True
            for device in made:
                close_device(device, setup.name)
            raise
    return made[0]
