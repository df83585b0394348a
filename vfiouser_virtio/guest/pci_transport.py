"""Virtio over PCI, driver side (virtio 1.4, 4.1): a `Transport` over any `PciPort`.

Registers are found by capabilities, and reached with accesses of their own width; 64-bit ones as two halves (4.1.3.1).

===========  ===================================================  ==========================================
interrupts   used buffers                                         configuration changes
===========  ===================================================  ==========================================
msix         a vector per queue; fewer vectors are shared         a vector of its own if there are two
intx         INTx, then a read of ISR status says what it was     likewise
poll         the used rings are looked at every `POLL_PERIOD`     config_generation and status, less often
===========  ===================================================  ==========================================
"""

import math
from collections.abc import Callable
from typing import Literal

import trio

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.pci import PciFunctionInfo, enumerate_function, set_command, set_msix
from vfiouser_virtio.guest.pci_structures import VirtioLayout, VirtioStructure, locate
from vfiouser_virtio.guest.ports import DmaMemory, Ids, MappingPort, PciPort
from vfiouser_virtio.protocols.pci import PciCommand
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS, NO_VECTOR, Isr

Interrupts = Literal["msix", "intx", "poll"]

POLL_PERIOD = 0.000_5
"""Seconds between two looks at the used rings."""
_POLLS_PER_CONFIG = 20
QUEUE_RESET_TIMEOUT = 5.0
"""Seconds."""

# The driver looks at this many feature bits: four selects of 32 (virtio 1.4 names bits up to 69).
_FEATURE_SELECTS = 4

QueueHandler = Callable[[int], None]
ConfigHandler = Callable[[], None]


class PciTransport:
    """Transport over one virtio function. Made by `open`; `close` switches it off."""

    def __init__(
        self,
        port: PciPort,
        info: PciFunctionInfo,
        layout: VirtioLayout,
        *,
        interrupts: Interrupts,
        nursery: trio.Nursery | None,
        num_queues: int,
    ) -> None:
        self.port = port
        self.info = info
        self.layout = layout
        self.interrupts: Interrupts = interrupts
        self.num_queues = num_queues
        self._nursery = nursery
        self._selected = trio.Lock()  # queue_select and feature selects stay as they are while this is held
        self._features = 0  # as they were accepted
        self._notify_at: dict[int, int] = {}
        self._notify_value: dict[int, int] = {}
        self._handlers: tuple[QueueHandler, ConfigHandler] | None = None
        self._vectors = 0
        self._raised = trio.Event()
        self._scope: trio.CancelScope | None = None

    @classmethod
    async def open(
        cls,
        port: PciPort,
        *,
        interrupts: Interrupts | None = None,
        nursery: trio.Nursery | None = None,
        info: PciFunctionInfo | None = None,
    ) -> "PciTransport":
        """Enumerate the function (unless ``info`` says all about it), find its structures, and let it use memory.

        ``interrupts`` None takes MSI-X, else INTx, else polling; the latter two need a ``nursery``. Raises ConfigError
        for interrupts that cannot be had, DeviceBroken when a structure is missing.
        """
        info = info or await enumerate_function(port)
        layout = locate(info)
        if interrupts is None:
            interrupts = "msix" if info.msix else "intx" if info.interrupt_pin else "poll"
        if interrupts == "msix" and info.msix is None:
            raise ConfigError(f"{port.name}: no MSI-X capability: use INTx or polling")
        if interrupts == "intx" and not info.interrupt_pin:
            raise ConfigError(f"{port.name}: no interrupt pin: use MSI-X or polling")
        if interrupts != "msix" and nursery is None:
            raise ConfigError(f"{port.name}: INTx and polling need a nursery for their task")
        intx = PciCommand.INTX_DISABLE
        await set_command(
            port,
            set=PciCommand.MEMORY | PciCommand.MASTER | (0 if interrupts == "intx" else intx),
            clear=intx if interrupts == "intx" else 0,
        )
        transport = cls(port, info, layout, interrupts=interrupts, nursery=nursery, num_queues=0)
        transport.num_queues = await transport.read_common("num_queues")
        return transport

    async def close(self) -> None:
        """No interrupts any more, and no access to memory."""
        await self.disconnect_interrupts()
        await set_command(self.port, clear=PciCommand.MASTER)

    @property
    def name(self) -> str:
        """That of the port."""
        return self.port.name

    @property
    def ids(self) -> Ids:
        """Numbers of the PCI function."""
        return self.info

    @property
    def memory(self) -> DmaMemory:
        """That of the port."""
        return self.port.memory

    # ---- registers -----------------------------------------------------------------------------------------------

    async def read_common(self, field: str) -> int:
        """A field of struct virtio_pci_common_cfg, for what is selected. Raises KeyError for an unknown one."""
        at, size = self._common(field)
        bar = self.layout.common.bar
        if size < 8:
            return await self.port.bar_read(bar, at, size)
        return await self.port.bar_read(bar, at, 4) | await self.port.bar_read(bar, at + 4, 4) << 32

    async def write_common(self, field: str, value: int) -> None:
        """Write a field of struct virtio_pci_common_cfg."""
        at, size = self._common(field)
        bar = self.layout.common.bar
        if size < 8:
            await self.port.bar_write(bar, at, size, value)
        else:
            await self.port.bar_write(bar, at, 4, value & 0xFFFF_FFFF)
            await self.port.bar_write(bar, at + 4, 4, value >> 32)

    def _common(self, field: str) -> tuple[int, int]:
        at, size = COMMON_CFG_OFFSETS[field]
        structure = self.layout.common
        if at + size > structure.length:
            raise DeviceBroken(f"{self.name}: {structure} is too short for {field}", "CC1")
        return structure.offset + at, size

    async def map_shared_memory(self, region_id: int) -> memoryview:
        region = self.layout.shared_memory.get(region_id)
        if region is None:
            raise LookupError(f"{self.name}: no shared memory region {region_id}")
        if not isinstance(self.port, MappingPort):
            raise ConfigError(f"{self.name}: shared memory cannot be mapped over this port: use carrier socket")
        return await self.port.bar_map(region.bar, region.offset, region.length)

    async def read_isr(self) -> int:
        """ISR status, which reading clears (4.1.4.5)."""
        isr = self.layout.isr
        return await self.port.bar_read(isr.bar, isr.offset, 1)

    # ---- status and features -------------------------------------------------------------------------------------

    async def read_status(self) -> int:
        return await self.read_common("device_status")

    async def write_status(self, value: int) -> None:
        await self.write_common("device_status", value)

    async def read_features(self) -> int:
        features = 0
        async with self._selected:
            for select in range(_FEATURE_SELECTS):
                await self.write_common("device_feature_select", select)
                features |= await self.read_common("device_feature") << 32 * select
        return features

    async def write_features(self, features: int) -> None:
        self._features = features
        async with self._selected:
            for select in range(_FEATURE_SELECTS):
                await self.write_common("driver_feature_select", select)
                await self.write_common("driver_feature", features >> 32 * select & 0xFFFF_FFFF)

    # ---- configuration -------------------------------------------------------------------------------------------

    async def read_config(self, offset: int, size: int) -> bytes:
        device = self._device_config(offset, size)
        data = b""
        for at, width in _accesses(offset, size):
            data += (await self.port.bar_read(device.bar, device.offset + at, width)).to_bytes(width, "little")
        return data

    async def write_config(self, offset: int, data: bytes) -> None:
        device = self._device_config(offset, len(data))
        for at, width in _accesses(offset, len(data)):
            value = int.from_bytes(data[at - offset :][:width], "little")
            await self.port.bar_write(device.bar, device.offset + at, width, value)

    async def read_generation(self) -> int:
        return await self.read_common("config_generation")

    def _device_config(self, offset: int, size: int) -> VirtioStructure:
        device = self.layout.device
        if device is None or offset + size > device.length:
            length = 0 if device is None else device.length
            raise DeviceBroken(
                f"{self.name}: device configuration of {length:#x} bytes ends before {offset + size:#x}", "DC1"
            )
        return device

    # ---- queues --------------------------------------------------------------------------------------------------

    async def queue_max_size(self, index: int) -> int:
        async with self._selected:
            await self.write_common("queue_select", index)
            return await self.read_common("queue_size")

    async def enable_queue(self, index: int, size: int, desc: int, driver: int, device: int) -> None:
        async with self._selected:
            await self.write_common("queue_select", index)
            self._notify_at[index] = self._notify_offset(await self.read_common("queue_notify_off"), index)
            named_by_device = self._features & Feature.NOTIF_CONFIG_DATA.mask
            self._notify_value[index] = await self.read_common("queue_notif_config_data") if named_by_device else index
            if await self.read_common("queue_size") != size:
                await self.write_common("queue_size", size)
            if self._vectors:
                await self._map_vector("queue_msix_vector", self._queue_vector(index))
            await self.write_common("queue_desc", desc)
            await self.write_common("queue_driver", driver)
            await self.write_common("queue_device", device)
            await self.write_common("queue_enable", 1)

    async def reset_queue(self, index: int) -> None:
        deadline = trio.current_time() + QUEUE_RESET_TIMEOUT
        async with self._selected:
            await self.write_common("queue_select", index)
            await self.write_common("queue_reset", 1)
            # 1 while it is under way, and then queue_enable is 0, too (4.1.4.3.1).
            while await self.read_common("queue_reset"):
                if trio.current_time() > deadline:
                    raise DeviceBroken(f"{self.name}: the reset of queue {index} does not end", "CC7")
                await trio.sleep(0.001)
            if await self.read_common("queue_enable"):
                raise DeviceBroken(f"{self.name}: queue {index} is still enabled after its reset", "CC7")

    def notify(self, index: int, next_available: int | None = None) -> None:
        bar, at, value = self.layout.notify.bar, self._notify_at[index], self._notify_value[index]
        if next_available is None:
            self.port.bar_post(bar, at, 2, value)
        else:
            self.port.bar_post(bar, at, 4, value | next_available << 16)  # struct NOTIFICATION_DATA

    def _notify_offset(self, queue_notify_off: int, index: int) -> int:
        notify = self.layout.notify
        at = queue_notify_off * notify.multiplier
        size = 4 if self._features & Feature.NOTIFICATION_DATA.mask else 2
        if at + size > notify.length:
            where = f"queue_notify_off {queue_notify_off:#x} × {notify.multiplier:#x}"
            raise DeviceBroken(f"{self.name}: queue {index} is notified at {where}, beyond {notify}", "NT3")
        return notify.offset + at

    # ---- interrupts ----------------------------------------------------------------------------------------------

    async def connect_interrupts(self, on_queue: QueueHandler, on_config: ConfigHandler) -> None:
        self._handlers = on_queue, on_config
        if self.interrupts == "msix":
            await self._connect_msix(on_queue, on_config)
        else:
            assert self._nursery is not None
            self._scope = trio.CancelScope()
            if self.interrupts == "intx":
                await self.port.connect_intx(self._intx_raised)
                self._nursery.start_soon(self._serve_intx, self._scope)
            else:
                self._nursery.start_soon(self._poll, self._scope)

    async def disconnect_interrupts(self) -> None:
        self._handlers = None
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None
        if self.interrupts == "intx":
            await self.port.connect_intx(None)
        elif self._vectors:
            assert self.info.msix is not None
            self._vectors = 0
            await set_msix(self.port, self.info.msix, enable=False)
            await self.port.connect_msix([])

    async def _connect_msix(self, on_queue: QueueHandler, on_config: ConfigHandler) -> None:
        assert self.info.msix is not None
        # Configuration has vector 0. The queues have the others, several one if need be, or also vector 0 if it is
        # the only one: a notification too many does no harm.
        self._vectors = min(self.info.msix.vectors, self.num_queues + 1)
        queues: list[list[int]] = [[] for _ in range(self._vectors)]
        for index in range(self.num_queues):
            queues[self._queue_vector(index)].append(index)

        def handler(vector: int) -> Callable[[], None]:
            def interrupt() -> None:
                if self._handlers is None:
                    return
                if vector == 0:
                    on_config()
                for index in queues[vector]:
                    on_queue(index)

            return interrupt

        await self.port.connect_msix([handler(vector) for vector in range(self._vectors)])
        await set_msix(self.port, self.info.msix, enable=True)
        await self._map_vector("config_msix_vector", 0)

    def _queue_vector(self, index: int) -> int:
        return 1 + index % (self._vectors - 1) if self._vectors > 1 else 0

    async def _map_vector(self, register: str, vector: int) -> None:
        await self.write_common(register, vector)
        if (mapped := await self.read_common(register)) != vector:
            what = "no vector" if mapped == NO_VECTOR else f"{mapped:#x}"
            raise DeviceBroken(f"{self.name}: {register} {vector:#x} reads back as {what} (4.1.5.1.2.1)", "MX2")

    def _intx_raised(self) -> None:
        self._raised.set()

    async def _serve_intx(self, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                await self._raised.wait()
                self._raised = trio.Event()
                isr = await self.read_isr()
                if self._handlers is None:
                    return
                on_queue, on_config = self._handlers
                if isr & Isr.CONFIG:
                    on_config()
                if isr & Isr.QUEUE:
                    for index in range(self.num_queues):
                        on_queue(index)

    async def _poll(self, scope: trio.CancelScope) -> None:
        with scope:
            seen: tuple[int, int] | None = None
            while self._handlers is not None:
                on_queue, on_config = self._handlers
                now = await self.read_generation(), await self.read_status() & DeviceStatus.NEEDS_RESET
                if seen is not None and now != seen:
                    on_config()
                seen = now
                for _ in range(_POLLS_PER_CONFIG):
                    for index in range(self.num_queues):
                        on_queue(index)
                    await trio.sleep(POLL_PERIOD)


def _accesses(offset: int, size: int) -> list[tuple[int, int]]:
    """(offset, width) of the accesses for a range: of a field's own width, 64-bit as halves (4.1.3.1), else bytes."""
    width = math.gcd(offset, size, 4) if size in (1, 2, 4, 8) else 1
    return [(at, width) for at in range(offset, offset + size, width)]
