"""Context of libvfio-user.h (vfu_ctx_t) as a Python class: a device that one client at a time drives over a socket.

The life of a context::

    with Context(library, "/run/x.sock") as context:
        context.pci_init(PciType.EXPRESS)             # what it is: ids, regions, interrupts, callbacks
        context.setup_region(0, 4096, access, RegionFlag.RW | RegionFlag.MEM)
        context.realize_ctx()
        while not context.attach_ctx(): ...           # wait for get_poll_fd() to become readable
        while True: context.run_ctx()                 # likewise; OSError ENOTCONN: attach again

The library is not thread-safe: call a context from one thread.
"""

import ctypes
import errno
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Self

from vfiouser_virtio.libvfio_user.bindings.constants import CtxFlag, DevIrqType, DevType, LogLevel, ResetType, Trans
from vfiouser_virtio.libvfio_user.bindings.dma import DmaCalls
from vfiouser_virtio.libvfio_user.bindings.handle import HasFunctions
from vfiouser_virtio.libvfio_user.bindings.migration import Migration, migration_struct
from vfiouser_virtio.libvfio_user.bindings.pci import PciCalls
from vfiouser_virtio.libvfio_user.bindings.region import Access, access_callback, areas
from vfiouser_virtio.libvfio_user.bindings.types import IRQ_STATE_CB, LOG_FN, QUIESCE_CB, RESET_CB
from vfiouser_virtio.protocols.pci import CFG_SPACE_SIZE
from vfiouser_virtio.protocols.vfio_user import PciRegion


class Context(DmaCalls, PciCalls):
    """Context (vfu_ctx_t). Every method is the function of that name with ``vfu_`` in front; a failure is an OSError.

    ``socket_path`` is bound and listened on at once: OSError EADDRINUSE if the path exists, even as a stale file, and
    ENAMETOOLONG beyond 107 bytes. ``non_blocking`` makes attach and run return at once when there is nothing to do.
    ``private`` is what `get_private` gives back. `destroy_ctx` (or a with statement) frees everything and unlinks the
    socket; until then callbacks are kept alive.
    """

    def __init__(
        self,
        library: HasFunctions,
        socket_path: str | os.PathLike[str],
        *,
        non_blocking: bool = True,
        private: int | None = None,
    ) -> None:
        path = os.fspath(socket_path)
        super().__init__(library, path)
        flags = CtxFlag.ATTACH_NB if non_blocking else 0
        create = self._functions.vfu_create_ctx
        self._live_handle = create(Trans.SOCK, os.fsencode(path), flags, private, DevType.PCI)
        if self._live_handle is None:
            raise self._error("vfu_create_ctx")
        self._realized = False
        self._config_region = 0

    # --- Life cycle -------------------------------------------------------------------------------------------------

    def realize_ctx(self) -> None:
        """The device is set up: ready to attach (vfu_realize_ctx).

        Without `pci_init` it makes the config space, of the size that `setup_region` gave to it, else of 256 bytes.
        """
        self._checked(self._functions.vfu_realize_ctx(self._handle), "vfu_realize_ctx")
        self._realized = True
        self._config_size = self._config_size or self._config_region or CFG_SPACE_SIZE

    def attach_ctx(self) -> bool:
        """Accept a client and agree on a version with it; False if none is there (vfu_attach_ctx).

        `get_poll_fd` changes with it. It waits for the client's VERSION message, even when non-blocking. Raises
        OSError if the client left or is not understood: the next one may be attached.
        """
        self._outside_callbacks("vfu_attach_ctx")
        if self._functions.vfu_attach_ctx(self._handle) == 0:
            self._callbacks.reraise()
            return True
        if ctypes.get_errno() == errno.EAGAIN:
            return False
        raise self._error("vfu_attach_ctx")

    def get_poll_fd(self) -> int:
        """What becomes readable when there is something to do (vfu_get_poll_fd).

        The library's: another one after each `attach_ctx` and after each ENOTCONN.
        """
        return self._checked(self._functions.vfu_get_poll_fd(self._handle), "vfu_get_poll_fd")

    def run_ctx(self) -> int:
        """Handle what the client has asked for; the number of requests, 0 or 1 when non-blocking (vfu_run_ctx).

        Raises OSError: ENOTCONN, the client is gone (its DMA regions and the reset callback have been through);
        EBUSY, the device is quiescing: nothing else happens before `device_quiesced`.
        """
        if self._callbacks.depth:
            self._outside_callbacks("vfu_run_ctx")
        result = self._functions.vfu_run_ctx(self._handle)
        return result if result >= 0 and not self._callbacks.interrupted else self._checked(result, "vfu_run_ctx")

    def destroy_ctx(self) -> None:
        """Disconnect, unregister all DMA, call the reset callback (LOST_CONN), unlink the socket, free everything.

        Nothing happens when it is destroyed already (vfu_destroy_ctx).
        """
        if self._live_handle is None:
            return
        self._outside_callbacks("vfu_destroy_ctx")
        self._functions.vfu_destroy_ctx(self._live_handle)
        self._live_handle = None
        self._callbacks.release()
        self._callbacks.reraise()

    def get_private(self) -> int | None:
        """The ``private`` of the constructor (vfu_get_private)."""
        return self._functions.vfu_get_private(self._handle)

    # --- Setting the device up --------------------------------------------------------------------------------------

    def setup_log(self, callback: Callable[[int, str], None], level: int = LogLevel.INFO) -> None:
        """Hand messages up to ``level`` (`LogLevel`) to ``callback(level, text)`` (vfu_setup_log)."""

        def log(_handle: int, severity: int, message: bytes | None) -> None:
            # The library reads errno again after some of its messages.
            number = ctypes.get_errno()
            callback(severity, (message or b"").decode("utf-8", "replace").rstrip("\n"))
            ctypes.set_errno(number)

        made = self._callbacks.make(LOG_FN, "log", log, None)
        self._checked(self._functions.vfu_setup_log(self._handle, made, level), "vfu_setup_log")

    def log(self, level: int, text: str) -> None:
        """Write to the context's log (vfu_log)."""
        self._functions.vfu_log(self._handle, level, b"%s", text.encode())

    def setup_region(
        self,
        index: int,
        size: int,
        access: Access | None,
        flags: int,
        mmap_areas: Sequence[tuple[int, int]] = (),
        fd: int = -1,
        offset: int = 0,
    ) -> None:
        """Set up a region, see `Access` for its callback (vfu_setup_region); ``flags`` are `RegionFlag`.

        With ``fd`` the client may map the region from ``offset`` of that file: all of it, or the ``mmap_areas``
        (offset in the region, size). The fd stays the caller's, who keeps it open until `destroy_ctx`. Raises OSError
        EINVAL: a BAR's size that is no power of two, a 64-bit BAR that is odd, config space that is not RW or has less
        than 256 bytes, …
        """
        is_config = index == PciRegion.CONFIG
        if is_config and self._config_size:  # the library would read on, past the end of its space
            reason = f"config space has {self._config_size:#x} bytes, not {size:#x}"
            self._require(size == self._config_size, "vfu_setup_region", reason)
        elif is_config and size:  # it writes its header and capabilities without a look at the size
            reason = f"config space has at least {CFG_SPACE_SIZE:#x} bytes, not {size:#x}"
            self._require(size >= CFG_SPACE_SIZE, "vfu_setup_region", reason)
        made = access_callback(self._callbacks, index, access)
        listed = self._callbacks.keep(areas(mmap_areas)) if mmap_areas else None
        setup = self._functions.vfu_setup_region
        result = setup(self._handle, index, size, made, flags, listed, len(mmap_areas), fd, offset)
        self._checked(result, "vfu_setup_region")
        if is_config:
            self._config_region = size

    def setup_device_nr_irqs(self, irq_type: DevIrqType, count: int) -> None:
        """How many vectors of that type there are, before `realize_ctx` (vfu_setup_device_nr_irqs)."""
        setup = self._functions.vfu_setup_device_nr_irqs
        self._checked(setup(self._handle, irq_type, count), "vfu_setup_device_nr_irqs")

    def setup_irq_state_callback(self, irq_type: DevIrqType, callback: Callable[[int, int, bool], None]) -> None:
        """``callback(start, count, mask)`` when the client masks or unmasks vectors (vfu_setup_irq_state_callback)."""

        def changed(_handle: int, start: int, count: int, mask: bool) -> None:
            callback(start, count, mask)

        made = self._callbacks.make(IRQ_STATE_CB, "irq_state", changed, None)
        setup = self._functions.vfu_setup_irq_state_callback
        self._checked(setup(self._handle, irq_type, made), "vfu_setup_irq_state_callback")

    def setup_device_reset_cb(self, callback: Callable[[ResetType], None]) -> None:
        """``callback(type)`` when the device must be reset (vfu_setup_device_reset_cb). An OSError fails the reset."""

        def reset(_handle: int, kind: int) -> int:
            callback(ResetType(kind))
            return 0

        made = self._callbacks.make(RESET_CB, "reset", reset)
        setup = self._functions.vfu_setup_device_reset_cb
        self._checked(setup(self._handle, made), "vfu_setup_device_reset_cb")

    def setup_device_quiesce_cb(self, callback: Callable[[], bool]) -> None:
        """``callback()`` before DMA regions change, a reset or a migration: is the device quiet (True), or will it be?

        After False `run_ctx` raises EBUSY until `device_quiesced` (vfu_setup_device_quiesce_cb).
        """

        def quiesce(_handle: int) -> int:
            if callback():
                return 0
            self._quiescing = True
            ctypes.set_errno(errno.EBUSY)
            return -1

        made = self._callbacks.make(QUIESCE_CB, "quiesce", quiesce)
        self._functions.vfu_setup_device_quiesce_cb(self._handle, made)

    def setup_device_migration_callbacks(self, callbacks: Migration) -> None:
        """Let the client migrate the device (vfu_setup_device_migration_callbacks)."""
        struct = self._callbacks.keep(migration_struct(self._callbacks, callbacks))
        setup = self._functions.vfu_setup_device_migration_callbacks
        self._checked(setup(self._handle, ctypes.byref(struct)), "vfu_setup_device_migration_callbacks")

    # --- While it runs ----------------------------------------------------------------------------------------------

    def device_quiesced(self, quiesce_errno: int = 0) -> None:
        """The device is quiet now: go on with what waited for it, callbacks and all (vfu_device_quiesced).

        With an errno the request is dropped instead, and as of efd091b the client gets no reply at all: better not.
        Raises OSError, EINVAL when no client waits.
        """
        self._outside_callbacks("vfu_device_quiesced")
        self._quiescing = False
        self._checked(self._functions.vfu_device_quiesced(self._handle, quiesce_errno), "vfu_device_quiesced")

    def irq_trigger(self, vector: int) -> None:
        """Signal an interrupt vector, of whichever type the client has enabled (vfu_irq_trigger).

        Raises OSError: ENOENT, the client has given no eventfd; EINVAL, there is no such vector.
        """
        self._require(self._realized, "vfu_irq_trigger", "not realized")
        if self._functions.vfu_irq_trigger(self._handle, vector) != 0:
            raise self._error("vfu_irq_trigger")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy_ctx()

    def __del__(self) -> None:
        if getattr(self, "_live_handle", None) is not None:
            warnings.warn(f"{self.name}: a libvfio-user context was not destroyed", ResourceWarning, stacklevel=2)

    def _outside_callbacks(self, function: str) -> None:
        """C is in the middle of something when it calls back, and these calls would pull the context from under it."""
        if self._callbacks.depth:
            raise RuntimeError(f"{self.name}: {function} from within a callback of the library")
