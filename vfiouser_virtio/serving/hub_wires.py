"""Hubs whose devices are in processes of their own: the hub is in the parent, a wire leads from it to each device."""

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from vfiouser_virtio.backends.net.drops import DropReport
from vfiouser_virtio.backends.net.hub import HubNetdev, join
from vfiouser_virtio.backends.net.netdevs import NETDEVS
from vfiouser_virtio.backends.net.wire import WireNetdev
from vfiouser_virtio.device_log import DeviceLog, being_made
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.serving.device_setup import DeviceSetup
from vfiouser_virtio.virtio.author_line import log_bug
from vfiouser_virtio.virtio.options import Making

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubWire:
    """Wire between a device and the port of a hub that its options name."""

    device: int
    """Index among the devices."""
    name: str
    """Of the device."""
    port: HubNetdev
    ours: socket.socket
    theirs: socket.socket

    async def run(self) -> None:
        """Carry frames until the device's end is closed. A bug ends this wire only: the parent has those of others."""
        with being_made(self.name):
            wire = WireNetdev(self.ours, self.port.describe(), keep=True)
        to_hub, to_device = self.port.counters, wire.counters  # the device's process has its own, and tells them
        log = DeviceLog(logger, self.name)
        report = DropReport(
            log,
            self.port.describe,
            to_guest=(to_hub.rx_drops, to_device.tx_drops),
            from_guest=(to_hub.tx_drops, to_device.rx_drops),
        )
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(report.run)
                nursery.start_soon(join, self.port, wire)
                while wire.link:
                    await wire.wait_link()
                nursery.cancel_scope.cancel()
        except* Exception as errors:
            for error in leaves(errors):
                log_bug(log, f"a bug in its wire to {self.port.describe()}, which is cut", error)
        finally:
            report.end()
            wire.close()


def hub_wires(setups: Sequence[DeviceSetup]) -> list[HubWire]:
    """One for each netdev that is a hub's port, which is made over its wire from now on. To be called before fork."""
    wires: list[HubWire] = []
    for index, setup in enumerate(setups):
        for making in setup.arguments.values():
            if isinstance(making, Making) and making.constructor is NETDEVS["hub"]:
                ours, theirs = WireNetdev.pair()
                with being_made(setup.name):  # its log lines have the device's id
                    port = HubNetdev(hub=making.arguments["hub"], isolated=making.arguments.get("isolated", False))
                making.arguments["wire"] = theirs
                wires.append(HubWire(index, setup.name, port, ours, theirs))
    return wires


def keep_only(wires: Sequence[HubWire], device: int | None) -> None:
    """Close the ends that are for other processes: ``device`` is the device of this one, None for the parent."""
    for wire in wires:
        if wire.device != device:
            wire.theirs.close()
        if device is not None:
            wire.ours.close()


def close_wires(wires: Sequence[HubWire]) -> None:
    """Close all ends that are still open."""
    for wire in wires:
        wire.ours.close()
        wire.theirs.close()
