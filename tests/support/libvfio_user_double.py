"""A thin stand-in for libvfio-user: its C functions in Python, over real sockets, for tests where the library is not.

`Double().functions` has the functions of `Library.functions`; errno and callbacks work as with the real one. That it
does as the library does is shown by tests/libvfio_user/test_records.py. It leaves out what our engine does not use:
config space and capabilities that the library handles by itself, migration, dirty pages, file I/O regions.
"""

import ctypes
import errno
import os
import select
from collections.abc import Callable
from typing import Any

from support.vfu_double_device import AnsweredError, Device, Region, require
from support.vfu_double_dma import SG, Dma
from support.vfu_double_wire import GoneError, Wire

from vfiouser_virtio.libvfio_user.bindings import MIGR_CALLBACKS_VERS, PROTOTYPES, Functions, ResetType
from vfiouser_virtio.protocols.vfio_user import DMA_ACCESS, Command, MessageFlags


class Double:
    """What `bindings.load` would give."""

    path = "in process"
    version = "a double of libvfio-user"

    def __init__(self) -> None:
        self.functions = Functions()
        self._contexts: dict[int, _Context] = {}
        for name in PROTOTYPES:
            if name not in ("dma_sg_size", "vfu_create_ctx"):
                setattr(self.functions, name, self._function(name))
        self.functions.dma_sg_size = lambda: SG.size
        self.functions.vfu_create_ctx = self._create

    def _create(self, transport: int, path: bytes, flags: int, private: int | None, device: int) -> int | None:
        handle = 0x1000 * (len(self._contexts) + 1)
        try:
            require(flags in (0, 1))
            require(transport == device == 0, errno.ENOTSUP)
            self._contexts[handle] = _Context(handle, os.fsdecode(path), bool(flags), private)
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return None
        return handle

    def _function(self, name: str) -> Callable[..., Any]:
        void = PROTOTYPES[name].restype is None
        method = getattr(_Context, name.removeprefix("vfu_"))

        def call(handle: int, *arguments: Any) -> Any:
            try:
                result = method(self._contexts[handle], *arguments)
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1
            return result if void or result is not None or PROTOTYPES[name].restype is ctypes.c_void_p else 0

        return call


class _Context:
    """A vfu_ctx_t. Methods are named as the functions; None is 0 and an OSError -1."""

    def __init__(self, handle: int, path: str, non_blocking: bool, private: int | None) -> None:
        self.handle, self.non_blocking, self.private = handle, non_blocking, private
        self.wire = Wire(path, non_blocking)
        self.device = Device(handle)
        self.dma: Dma | None = None
        self.realized = False
        self.log_callback: Any = None
        self.log_level = 3
        self.reset_callback: Any = None
        self.quiesce_callback: Any = None
        self.pending: tuple[Any, bytes, list[int]] | str | None = None  # a message, or "reset"

    # --- Setting up -------------------------------------------------------------------------------------------------

    def get_private(self) -> int | None:
        return self.private

    def log(self, level: int, _format: bytes, text: bytes) -> None:
        if self.log_callback and level <= self.log_level:
            self.log_callback(self.handle, level, text)

    def setup_log(self, callback: Any, level: int) -> None:
        require(0 <= level <= 7)
        self.log_callback, self.log_level = callback, level

    def pci_init(self, pci_type: int, header_type: int, _revision: int) -> None:
        self.device.pci_init(pci_type, header_type)

    def pci_set_id(self, *ids: int) -> None:
        for at, number in zip((0, 2, 0x2C, 0x2E), ids, strict=True):
            self.device.config[at : at + 2] = number.to_bytes(2, "little")

    def pci_set_class(self, base: int, sub: int, interface: int) -> None:
        self.device.config[9:12] = bytes((interface, sub, base))

    def pci_get_config_space(self) -> int:
        return ctypes.addressof(self.device.config)

    def pci_add_capability(self, _pos: int, _flags: int, _data: Any) -> None:
        require(False, errno.ENOTSUP)

    def pci_find_capability(self, _extended: bool, _id: int) -> int:
        ctypes.set_errno(errno.ENOENT)
        return 0

    def pci_find_next_capability(self, _extended: bool, _pos: int, _id: int) -> int:
        ctypes.set_errno(errno.ENOENT)
        return 0

    def setup_region(
        self, index: int, size: int, access: Any, flags: int, areas: Any, count: int, fd: int, offset: int
    ) -> None:
        listed = [(areas[at].iov_base or 0, areas[at].iov_len) for at in range(count)]
        self.device.setup_region(index, Region(size, access, flags, listed, fd, offset))

    def create_ioeventfd(
        self, index: int, fd: int, offset: int, size: int, flags: int, datamatch: int, shadow: int, _shadow_at: int
    ) -> None:
        require(shadow == -1 and index < 9 and offset + size <= self.device.regions[index].size)
        self.device.regions[index].ioeventfds.append((offset, size, fd, flags, datamatch))

    def setup_device_nr_irqs(self, kind: int, count: int) -> None:
        require(kind < 5)
        self.device.irqs.counts[kind] = count

    def setup_irq_state_callback(self, kind: int, callback: Any) -> None:
        require(kind < 5)
        self.device.irqs.state_callbacks[kind] = callback

    def setup_device_reset_cb(self, callback: Any) -> None:
        self.reset_callback = callback

    def setup_device_quiesce_cb(self, callback: Any) -> None:
        self.quiesce_callback = callback

    def setup_device_migration_callbacks(self, callbacks: Any) -> None:
        require(ctypes.cast(callbacks, ctypes.POINTER(ctypes.c_int))[0] == MIGR_CALLBACKS_VERS)

    def setup_device_dma(self, max_regions: int, register: Any, unregister: Any) -> None:
        self.dma = Dma(self.handle, max_regions, register, unregister)

    def realize_ctx(self) -> None:
        if not self.realized:
            self.device.realize()
            self.realized = True

    # --- The client -------------------------------------------------------------------------------------------------

    def get_poll_fd(self) -> int:
        return self.wire.fileno()

    def attach_ctx(self) -> None:
        self.wire.attach()

    def run_ctx(self) -> int:
        require(self.realized)
        while True:
            require(self.pending is None, errno.EBUSY)
            require(self.wire.client is not None, errno.ENOTCONN)
            if self.non_blocking and not select.select([self.wire], [], [], 0)[0]:
                return 0
            try:
                handled = self._handle_next()
            except GoneError as gone:
                self._reset()
                raise OSError(errno.ENOTCONN, "gone") from gone
            if self.non_blocking:
                return handled

    def _handle_next(self) -> int:
        header, payload, fds = self.wire.receive()
        try:
            require(bool(payload) or header.command == Command.DEVICE_RESET)
            if self.quiesce_callback and (
                header.command == Command.DEVICE_RESET
                or (header.command in (Command.DMA_MAP, Command.DMA_UNMAP) and self.dma)
            ):
                self._quiesce((header, payload, fds))
        except OSError as error:
            if self.pending is not None:
                raise
            self._reply(header, b"", [], error.errno or 0)
            return 0
        self._handle(header, payload, fds)
        return 1

    def _quiesce(self, waiting: Any) -> None:
        if self.quiesce_callback(self.handle) < 0:
            number = ctypes.get_errno()
            if number == errno.EBUSY:
                self.pending = waiting
            raise OSError(number, "quiesce")

    def device_quiesced(self, number: int) -> None:
        require(self.pending is not None)
        try:
            if number == 0 and isinstance(self.pending, tuple):
                self._handle(*self.pending)
            elif number == 0:
                self._reset_quiesced()
        finally:
            self.pending = None

    def _handle(self, header: Any, payload: bytes, fds: list[int]) -> None:
        number, reply, out = 0, b"", list[int]()
        try:
            reply, out = self._answer(header.command, payload, fds)
        except OSError as error:
            number = error.errno or 0
            reply = error.payload if isinstance(error, AnsweredError) else b""
        for fd in fds:
            os.close(fd)
        self._reply(header, reply, out, number)

    def _answer(self, command: int, payload: bytes, fds: list[int]) -> tuple[bytes, list[int]]:
        device = self.device
        match command:
            case Command.DMA_MAP:
                return (self.dma.map(payload, fds) if self.dma else b""), []
            case Command.DMA_UNMAP:
                return (self.dma.unmap(payload) if self.dma else b""), []
            case Command.DEVICE_GET_INFO:
                return device.info(payload), []
            case Command.DEVICE_GET_REGION_INFO:
                return device.region_info(payload)
            case Command.DEVICE_GET_REGION_IO_FDS:
                return device.io_fds(payload)
            case Command.DEVICE_GET_IRQ_INFO:
                return device.irq_info(payload), []
            case Command.DEVICE_SET_IRQS:
                device.irqs.set(self.handle, payload, fds)
                return b"", []
            case Command.REGION_READ | Command.REGION_WRITE:
                return device.access(payload, command == Command.REGION_WRITE), []
            case Command.DEVICE_RESET:
                if self.reset_callback and self.reset_callback(self.handle, ResetType.DEVICE) < 0:
                    raise OSError(ctypes.get_errno(), "reset")
                return b"", []
        raise OSError(errno.EINVAL, "command")

    # --- Its end ----------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        if self.quiesce_callback and self.pending is None:
            self._quiesce("reset")
        self._reset_quiesced()

    def _reset_quiesced(self) -> None:
        if self.dma:
            self.dma.remove_all()
        if self.reset_callback:
            self.reset_callback(self.handle, ResetType.LOST_CONN)
        self.device.irqs.close_all()
        self.wire.disconnect()

    def destroy_ctx(self) -> None:
        self._reset_quiesced()
        self.wire.close()

    # --- Interrupts and memory --------------------------------------------------------------------------------------

    def irq_trigger(self, vector: int) -> None:
        vectors = self.device.irqs.vectors
        require(vector < len(vectors))
        require(vectors[vector] != -1, errno.ENOENT)
        os.eventfd_write(vectors[vector], 1)

    def addr_to_sgl(self, address: int, length: int, entries: Any, room: int, prot: int) -> int:
        assert self.dma is not None
        return self.dma.sgl(address, length, entries, room, prot)

    def sg_is_mappable(self, entries: Any) -> bool:
        assert self.dma is not None
        return self.dma.entry(entries, 0)[0].vaddr is not None

    def sgl_get(self, entries: Any, iovecs: Any, count: int, _flags: int) -> None:
        assert self.dma is not None
        for index in range(count):
            region, offset, length, _ = self.dma.entry(entries, index)
            require(region.vaddr is not None, errno.EFAULT)
            iovecs[index].iov_base, iovecs[index].iov_len = (region.vaddr or 0) + offset, length

    def sgl_put(self, _entries: Any, _iovecs: Any, _count: int) -> None:
        pass

    def sgl_mark_dirty(self, _entries: Any, _count: int) -> None:
        pass

    def sgl_read(self, entries: Any, count: int, data: Any, flags: int) -> None:
        self._transfer(Command.DMA_READ, entries, count, data, flags)

    def sgl_write(self, entries: Any, count: int, data: Any, flags: int) -> None:
        self._transfer(Command.DMA_WRITE, entries, count, data, flags)

    def _transfer(self, command: Command, entries: Any, count: int, data: Any, flags: int) -> None:
        require(not flags & ~1)
        require(count == 1, errno.ENOTSUP)
        assert self.dma is not None
        region, offset, length, writable = self.dma.entry(entries, 0)
        write = command == Command.DMA_WRITE
        require(not write or writable, errno.EPERM)
        if flags and region.vaddr is not None:
            there = region.vaddr + offset
            ctypes.memmove(there if write else data, data if write else there, length)
            return
        for start in range(0, length, self.wire.max_transfer):
            part = min(length - start, self.wire.max_transfer)
            access = DMA_ACCESS.build({"address": region.address + offset + start, "count": part})
            try:
                reply = self.wire.ask(command, access + (data.raw[start : start + part] if write else b""))
            except GoneError as gone:
                self._reset()
                raise OSError(errno.ENOTCONN, "gone") from gone
            require(reply[: len(access)] == access)
            if not write:
                data[start : start + part] = reply[len(access) :]

    def _reply(self, header: Any, payload: bytes, fds: list[int], number: int) -> None:
        if header.flags & MessageFlags.NO_REPLY:
            return
        try:
            self.wire.send(header, payload, fds, number)
        except (BrokenPipeError, ConnectionResetError):
            self._reset()
