"""Function of a `PciDevice`: config space, BARs and interrupts as its class says, and the life of its `run`."""

import json
import logging
import os
from collections.abc import Callable, Generator

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import AuthorError, DeviceError, GuestError
from vfiouser_virtio.memory import UnsealedMemory
from vfiouser_virtio.pci.accesses import STEP, UnmodelledPolicy, drained
from vfiouser_virtio.pci.bar_mapping import BarMapping
from vfiouser_virtio.pci.bar_memory import BarMemory
from vfiouser_virtio.pci.bar_space import BarDeclaration, BarSpace
from vfiouser_virtio.pci.bars import Bar
from vfiouser_virtio.pci.device import PciDevice
from vfiouser_virtio.pci.extended_capabilities import ExtendedCapability
from vfiouser_virtio.pci.identity import Identity
from vfiouser_virtio.pci.mapped_bar import mapped_bar
from vfiouser_virtio.pci.option_rom import MOST_ROM
from vfiouser_virtio.pci.spin import SpinWatch
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import CFG_SPACE_SIZE, TYPE0_HEADER, PciCommand
from vfiouser_virtio.transports.served_function import CONFIG_SIZE, ServedFunction
from vfiouser_virtio.turns import turns
from vfiouser_virtio.vfio_device import Hold
from vfiouser_virtio.virtio.author_line import author_line, definition, log_bug, waiting_at
from vfiouser_virtio.virtio.device_checks import close_device
from vfiouser_virtio.virtio.device_task import DeviceTask

logger = logging.getLogger(__name__)
SPIN = 1000
"""Reads of a register without a change, after which it is named."""
_LOOK_S = 0.4
"""Seconds from one look for spins to the next."""
_COMMAND, _ = offsets(TYPE0_HEADER)["command"]


class PciDeviceFunction(ServedFunction):
    """A `PciDevice` on PCI. Serve it with a protocol engine, and run `serve` beside that.

    ``identity`` and ``unmodelled`` are the class's by default, ``name`` is for log lines. ``spin``: a register that is
    read so often without a change is named in the log; 0: none is. ``burndown`` gets a line of JSON, with its newline,
    whenever `report` is called. Raises AuthorError for a device that cannot be right.
    """

    def __init__(
        self,
        device: PciDevice,
        *,
        identity: Identity | None = None,
        name: str = "",
        unsealed_memory: UnsealedMemory = "auto",
        unmodelled: UnmodelledPolicy | None = None,
        spin: int = SPIN,
        burndown: Callable[[str], None] | None = None,
    ) -> None:
        if not hasattr(device, "bars"):
            kind = type(device)
            raise AuthorError(f"{definition(kind)}: {kind.__name__}.__init__() does not call super().__init__()")
        shown = identity or _identity(device)
        self.name = name or device.name
        declared = type(device).irq
        super().__init__(
            shown,
            DeviceLog(logger, self.name),
            unsealed_memory=unsealed_memory,
            interrupt_pin=declared.pin,
            config_size=CONFIG_SIZE if device.express else CFG_SPACE_SIZE,
            memory=device.dma.memory,
        )
        self.device = device
        device.log.device = device.accesses.log.device = self.name
        if unmodelled is not None:
            device.accesses.policy = unmodelled
        self._spin, self._burndown = spin, burndown
        self._runner: trio.lowlevel.Task | None = None
        self._task = DeviceTask(device, [], self.name, self._run_failed)
        self._mappings: list[BarMapping] = []
        try:
            self._lay_out(device)
        except ValueError as error:
            raise AuthorError(f"{type(device).__name__}: {error}") from error
        device.irq_lines.function = self
        device.on_failure = self._hook_failed
        device.restart = self._restart
        self.on_reset = self._reset
        self.on_bus_master = self._bus_master_changed
        self.on_disconnected = self._client_left
        self.on_quiesce = device.dma.quiesce

    def _lay_out(self, device: PciDevice) -> None:
        declared = type(device).irq
        for index, (bar, space) in device.bars.items():
            self.add_bar(index, self._bar(bar, space))
        if declared.msix_bar is not None:
            self.add_msix(declared.count, bar=declared.msix_bar)
        if declared.msi:
            self.add_msi(1 << (declared.count - 1).bit_length())
        if device.power_management:
            self.add_pm()
        if device.express:
            self.add_pcie()
        for capability in device.capabilities:
            if isinstance(capability, ExtendedCapability):
                self.add_extended_capability(capability)
            else:
                self.add_capability(capability)
        if device.rom is not None:
            self._add_rom(device.rom)

    def _add_rom(self, rom: bytes | os.PathLike[str]) -> None:
        try:
            self.add_rom(rom if isinstance(rom, bytes) else _contents(rom))
        except ValueError as error:
            raise DeviceError(f"{self.name}: {error}") from error

    def _bar(self, bar: BarDeclaration, space: BarSpace) -> Bar:
        mapped = [part for part in space.parts if isinstance(part, BarMemory) and part.mapped]
        if not mapped:
            return Bar(bar.size, space.read, space.write, bar.kind, bar.prefetchable)
        mapping = BarMapping(bar.size, areas=[(part.offset, part.size) for part in mapped])
        self._mappings.append(mapping)
        for part in mapped:
            part.place(mapping)
        return mapped_bar(mapping, read=space.read, write=space.write, kind=bar.kind, prefetchable=bar.prefetchable)

    def _bus_master_changed(self, allowed: bool) -> None:
        self._log.debug("bus master %s", "on" if allowed else "off")
        self.device.dma.bus_master = allowed
        if not self.device.needs_bus_master:
            return
        if allowed:
            self._task.start()
        else:
            self._task.stop()

    def _restart(self) -> None:
        self._task.stop()
        if self.bus_master or not self.device.needs_bus_master:
            self._task.start()

    def _reset(self) -> Hold | None:
        try:
            self.device.power_on()
        except Exception as error:
            log_bug(self._log, "a bug in the device's reset()", error)
        self._restart()
        return self.memory.settle()

    def _client_left(self) -> Hold | None:
        # What the next client maps at the same addresses may be another guest's: nothing is touched before that client
        # turns Bus Master on itself, which each driver does.
        self.config.set_bits(_COMMAND, int(PciCommand.MASTER), False)
        self._command_written()
        try:
            self.device.client_left()
        except Exception as error:
            log_bug(self._log, "a bug in the device's client_left()", error)
        reported, steps = Hold(), self._reporting("client gone")

        def step() -> bool:
            for _ in steps:
                return True
            for log in (self._log, self.device.log, self.device.accesses.log):
                log.forget()
            reported.finish()
            return False

        if not step():
            return None
        self._in_turns(step)
        return reported

    def report(self, why: str) -> None:
        """Say what drivers have touched: a line in the log, and one of JSON for ``burndown``."""
        drained(self._reporting(why))

    def _reporting(self, why: str) -> Generator[None, None, None]:
        """As `report`, in steps: of a device with 65,536 registers it takes 30 ms."""
        accesses = self.device.accesses
        for number, part in enumerate(accesses.parts, 1):
            for name in part.strays():
                text = "a bug in the device: %s has no field %r, to which it has assigned"
                self._log.once(("stray", part.name, name), text, part.name, name, level=logging.ERROR)
            if not number % STEP:
                yield
        if not accesses.count and self._burndown is None:
            return
        unused = yield from accesses.unused_in_steps()
        if accesses.count:
            self._log.info("%s", accesses.summary(unused))
        if self._burndown is not None:
            self._burndown(json.dumps({"device": self.name, "why": why, **accesses.report(unused)}) + "\n")

    async def _watch_spins(self) -> None:
        watch = SpinWatch(self.device.accesses, self._spin)
        while True:
            await trio.sleep(_LOOK_S)
            for _ in watch.steps():
                await turns().wait()
            if (spin := watch.spin) is not None:
                self._log.warning("the driver polls, and nothing changes: %s; %s", spin, self._activity())
            if watch.idle:
                await self._next_read()
                watch.begin()

    async def _next_read(self) -> None:
        """Wait, without a timer, until a driver reads in any BAR: a hundred idle devices wake for nothing."""
        read = trio.Event()
        for space in self.device.accesses.spaces:
            space.tell_next_read(read.set)
        await read.wait()

    def _activity(self) -> str:
        """What has happened last, and what the device is doing, in words."""
        written = [space.last_write for _, space in self.device.bars.values() if space.last_write is not None]
        last = "".join(f"{part.name} was written before; " for part in written)
        if self.device.needs_bus_master and not self.bus_master:
            return f"{last}run() has not begun: the driver has not turned Bus Master on"
        if type(self.device).run is PciDevice.run:
            return f"{last}the device has no run()"
        places = [] if self._runner is None else waiting_at(self._runner)
        return f"{last}the device is at {', '.join(places)}" if places else f"{last}run() has ended"

    def _hook_failed(self, what: str, error: Exception) -> None:
        """An access that the device's own code could not answer; each kind is logged once."""
        where = author_line(error)
        if isinstance(error, GuestError):
            self._log.once(("guest", what), "%s by the driver: %s", what, error)
        elif isinstance(error, AuthorError):
            self._log.once(
                ("author", where), "a bug in the device, in %s: %s: %s", what, where, error, level=logging.ERROR
            )
        else:
            self._log.once(
                ("author", where),
                "a bug in the device, in %s: %s: %s: %s",
                what,
                where,
                type(error).__name__,
                error,
                level=logging.ERROR,
                error=error,
            )

    def _run_failed(self, error: Exception) -> None:
        if isinstance(error, GuestError):
            where = author_line(error)
            at = f" (seen at {where})" if where else ""
            self._log.error("%s%s; the device stands still until it is reset", error, at)
        else:
            log_bug(self._log, "a bug in the device, which stands still until it is reset", error)

    async def _run_device(self) -> None:
        if not self.device.needs_bus_master:
            self._task.start()
        self._runner = trio.lowlevel.current_task()
        async with background() as tasks:
            if self._spin:
                tasks.start_soon(self._watch_spins)
            await self._task.serve()

    def _close(self) -> None:
        super()._close()
        for mapping in self._mappings:
            mapping.close()
        self.report("end")
        close_device(self.device, self.name)


def _identity(device: PciDevice) -> Identity:
    found = getattr(type(device), "identity", None)
    if not isinstance(found, Identity):
        kind = type(device)
        raise AuthorError(
            f"{definition(kind)}: {kind.__name__} has no identity: write identity = Identity(vendor=…, device=…)"
        )
    return found


def _contents(rom: os.PathLike[str]) -> bytes:
    try:
        with open(rom, "rb") as file:
            return file.read(MOST_ROM + 1)  # /dev/zero has no end
    except OSError as error:
        raise DeviceError(f"ROM {os.fspath(rom)}: {error.strerror}") from error
