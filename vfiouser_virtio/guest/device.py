"""Child device that drivers see (virtio 1.4, 3.1): status, features, configuration, queues; no PCI in sight.

::

    start() ─▶ negotiate(features) ─▶ new_vq(device, "requestq1", callback) ─▶ ready() ─▶ add_buf, kick, …
    reset() ◀── free_vq(vq) ◀── shutdown() ◀──────────────────────────────────────────────┘

A bus calls `VirtioDevice.start` before a driver's probe, and `VirtioDevice.reset` after its remove.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from vfiouser_virtio.guest.config import DriverConfig, TransportConfig
from vfiouser_virtio.guest.errors import DeviceBroken, DeviceGone, FeaturesRefused
from vfiouser_virtio.guest.ports import DmaMemory, Ids, Transport
from vfiouser_virtio.guest.virtqueue import DriverVirtqueue
from vfiouser_virtio.protocols.virtio.device_types import device_type
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature, mask_of

if TYPE_CHECKING:
    from vfiouser_virtio.guest.driver import VirtioDriver

logger = logging.getLogger(__name__)

RING_FEATURES = mask_of(
    (
        Feature.INDIRECT_DESC,
        Feature.EVENT_IDX,
        Feature.VERSION_1,
        # Addresses given to the device are those that DmaMemory says it reaches, whatever lies in between.
        Feature.ACCESS_PLATFORM,
        Feature.RING_PACKED,
        Feature.IN_ORDER,
        Feature.NOTIFICATION_DATA,
        Feature.NOTIF_CONFIG_DATA,
        Feature.RING_RESET,
        Feature.SUSPEND,
    )
)
"""Features that have nothing to do with the device type and that this side can use: accepted wherever offered."""

RESET_TIMEOUT = 5.0
"""Seconds for a reset, in which a device may have to wait for its own disk."""
SUSPEND_TIMEOUT = 5.0
"""Seconds for SUSPEND, in which it ends what it is doing, and for going on."""


class VirtioDevice:
    """Device on a `VirtioBus`, as its driver has it.

    ``feature_mask`` takes away what drivers may accept, to see a device without (VERSION_1 stays).
    """

    def __init__(self, transport: Transport, *, feature_mask: int = -1) -> None:
        self.transport = transport
        self.feature_mask = feature_mask
        self.type = device_type(transport.ids.virtio_id)
        self.config = DriverConfig(TransportConfig(transport, self._wait_running), self.type.config)
        self.offered = 0
        """All feature bits that the device offers; known after `negotiate`."""
        self.features = 0
        """Those that were accepted."""
        self.driver: VirtioDriver | None = None
        self.driver_data: Any = None
        """The driver's own object for this device, set in its probe."""
        self.on_config: Callable[[], None] | None = None
        """Called, synchronously, when the device says that its configuration has changed."""
        self.virtqueues: dict[int, DriverVirtqueue] = {}
        self.broken: DeviceBroken | None = None
        """Why the device cannot be used any more until it is reset."""
        self._suspect = False  # a configuration interrupt has come: it may be NEEDS_RESET
        self._resets = 0
        self._gone = True
        self._interrupts = False
        self._running = trio.Event()
        self._running.set()
        self._parked: set[trio.lowlevel.ParkingLot] = set()

    def __repr__(self) -> str:
        return f"<VirtioDevice {self.name}>"

    @property
    def name(self) -> str:
        """For messages: its type, and where it is."""
        return f"{self.type.name} at {self.transport.name}"

    @property
    def ids(self) -> Ids:
        """The numbers by which drivers are matched."""
        return self.transport.ids

    @property
    def memory(self) -> DmaMemory:
        """Where buffers for this device come from."""
        return self.transport.memory

    # ---- status and features -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Steps 1 to 3 of 3.1.1: reset, ACKNOWLEDGE, DRIVER; interrupts are connected from here on."""
        await self.reset()
        self.broken, self._gone = None, False
        await self.add_status(DeviceStatus.ACKNOWLEDGE)
        await self.add_status(DeviceStatus.DRIVER)
        self._interrupts = True
        await self.transport.connect_interrupts(self._on_queue, self._on_config)

    async def negotiate(self, wanted: int) -> int:
        """Steps 4 to 6: accept what is offered of ``wanted`` (a mask) and of `RING_FEATURES`; returns what that is.

        Raises DeviceBroken (RB1) without VERSION_1, FeaturesRefused when FEATURES_OK does not stay set.
        """
        self.offered = await self.transport.read_features()
        if not self.offered & Feature.VERSION_1.mask:
            raise DeviceBroken(f"{self.name}: VERSION_1 is missing in its features {self.offered:#x}", "RB1")
        accepted = self.offered & (wanted | RING_FEATURES) & (self.feature_mask | Feature.VERSION_1.mask)
        await self.transport.write_features(accepted)
        await self.add_status(DeviceStatus.FEATURES_OK)
        if not await self.transport.read_status() & DeviceStatus.FEATURES_OK:
            raise FeaturesRefused(
                f"{self.name} refuses features {accepted:#x} of {self.offered:#x} that it offers", "FB2"
            )
        self.features = accepted
        return accepted

    def has_feature(self, bit: int) -> bool:
        """Whether a feature, by its number, was negotiated."""
        return bool(self.features >> bit & 1)

    async def queue_sets(self) -> int | None:
        """How many sets of queues there are before the last one, of a type for which that is to be known."""
        sets = self.type.sets
        if sets is None:
            return None
        # Without the features the field is not there, and not to be read (2.5.1).
        there = any(self.features >> bit & 1 for bit in sets.features)
        return sets.number(self.features, await self.config.get_int(sets.field) if there else 0)

    async def ready(self) -> None:
        """Step 8: DRIVER_OK; the device is live, and its queues may be kicked."""
        if not await self.transport.read_status() & DeviceStatus.DRIVER_OK:
            await self.add_status(DeviceStatus.DRIVER_OK)

    async def read_status(self) -> int:
        """``device_status``."""
        return await self.transport.read_status()

    async def add_status(self, bits: int) -> None:
        """Set more bits of ``device_status``: a driver must never clear one but by a reset (2.1.1)."""
        await self.transport.write_status(await self.transport.read_status() | bits)

    async def reset(self) -> None:
        """Back to the beginning. The buffers are the driver's again: `DriverVirtqueue.shutdown` returns their tokens.

        Each wait for the device ends with DeviceGone. Raises DeviceBroken (RS1) when the status does not become 0.
        """
        await self.transport.write_status(0)
        await self._wait_status(lambda status: not status, RESET_TIMEOUT, "a reset", "RS1")
        if self._interrupts:
            self._interrupts = False
            await self.transport.disconnect_interrupts()
        self.features = 0
        self._suspect = False
        self._gone = True
        self._resets += 1
        for vq in self.virtqueues.values():
            vq.live = False
        self._running.set()
        self._wake_all()

    async def _wait_status(self, done: Callable[[int], object], timeout: float, after: str, rule: str) -> None:
        deadline = trio.current_time() + timeout
        pause = 0.0
        while not done(status := await self.transport.read_status()):
            if trio.current_time() > deadline:
                what = f"{self.name}: device_status is still {status:#x}, {timeout} s after {after}"
                raise DeviceBroken(what, rule)
            await trio.sleep(pause)
            pause = min(0.01, pause + 0.0005)

    # ---- suspend -------------------------------------------------------------------------------------------------

    @property
    def suspended(self) -> bool:
        """Whether `suspend` was called, and `resume` not yet."""
        return not self._running.is_set()

    async def suspend(self) -> None:
        """Stop the device where it is (3.4): it ends what it is doing, and begins nothing more until `resume`.

        Drivers may go on: what they add is shown at `resume`, and writes to the configuration wait for it. Raises
        RuntimeError without SUSPEND or for a device that is not running, DeviceBroken (SU3) when it does not stop.
        """
        status = await self.transport.read_status()
        if not self.has_feature(Feature.SUSPEND) or not status & DeviceStatus.DRIVER_OK or self.suspended:
            raise RuntimeError(f"{self.name} cannot be suspended: SUSPEND is not negotiated, or it is not running")
        self._running = trio.Event()
        for vq in self.virtqueues.values():
            vq.stopped = True
        await self.transport.write_status(status | DeviceStatus.SUSPEND)
        await self._wait_suspended(DeviceStatus.SUSPEND, "SUSPEND was set")

    async def resume(self) -> None:
        """Let a suspended device go on. Raises RuntimeError when it is not, DeviceBroken (SU3) when it does not."""
        if not self.suspended:
            raise RuntimeError(f"{self.name} is not suspended")
        await self.transport.write_status(await self.transport.read_status() | DeviceStatus.DRIVER_OK)
        await self._wait_suspended(DeviceStatus.DRIVER_OK, "DRIVER_OK was set to resume it")
        self._running.set()
        for vq in self.virtqueues.values():
            vq.stopped = False
            vq.kick()

    async def _wait_suspended(self, wanted: DeviceStatus, after: str) -> None:
        """Wait until of SUSPEND and DRIVER_OK just this one is set."""
        both, broken = DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK, DeviceStatus.NEEDS_RESET
        await self._wait_status(lambda seen: seen & both == wanted or seen & broken, SUSPEND_TIMEOUT, after, "SU3")
        await self._look()
        if self.broken is not None:
            raise self.broken

    async def _wait_running(self) -> None:
        """A suspended device's configuration is left alone (3.4.1)."""
        resets = self._resets
        await self._running.wait()
        if resets != self._resets:
            raise DeviceGone(f"{self.name} has been reset")

    # ---- waiting -------------------------------------------------------------------------------------------------

    async def wait(self, lot: trio.lowlevel.ParkingLot) -> None:
        """Park until a callback unparks ``lot``, or the device itself changes; the caller looks again at what it wants.

        Raises DeviceBroken when the device has broken a rule or says NEEDS_RESET, DeviceGone when it was reset.
        """
        if self.broken is not None:
            raise self.broken
        if self._gone:
            raise DeviceGone(f"{self.name} has been reset")
        if self._suspect:
            await self._look()
            return
        resets = self._resets
        self._parked.add(lot)
        try:
            await lot.park()
        finally:
            if not lot:
                self._parked.discard(lot)
        if resets != self._resets:
            raise DeviceGone(f"{self.name} has been reset")

    def fail(self, error: DeviceBroken) -> None:
        """The device cannot be used any more: what waits for it learns that."""
        if self.broken is None:
            self.broken = error
            logger.warning("%s", error)
        self._wake_all()

    async def _look(self) -> None:
        self._suspect = False
        try:
            status = await self.transport.read_status()
        except BaseException:
            self._suspect = True
            raise
        if status & DeviceStatus.NEEDS_RESET:
            self.fail(DeviceBroken(f"{self.name} needs a reset (status {status:#x})"))

    def _wake_all(self) -> None:
        parked, self._parked = self._parked, set()
        for lot in parked:
            lot.unpark_all()

    # ---- what the transport says ---------------------------------------------------------------------------------

    def _on_queue(self, index: int) -> None:
        vq = self.virtqueues.get(index)
        if vq is None or not vq.live:
            return
        try:
            vq.interrupt()
        except DeviceBroken as error:
            self.fail(error)

    def _on_config(self) -> None:
        self._suspect = True
        if self.on_config is not None:
            self.on_config()
        self._wake_all()
