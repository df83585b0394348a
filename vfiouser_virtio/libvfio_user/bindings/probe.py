"""ABI detection of a loaded libvfio-user, by what it does.

The library's soname and version numbers have never changed, its functions have. ctypes would call the wrong one without
a word, so every library is tried out on a throw-away context before it is used. What is told from what:

==========  ==========  ================================================================  =============================
commit      date        change                                                            how it shows
==========  ==========  ================================================================  =============================
f3742ed     2026-03-23  vfu_setup_device_dma(ctx, *max_regions*, register, unregister)    which callback a DMA_MAP calls
8b1396b     2026-04-15  vfu_sgl_read/write(…, *int flags*)                                EINVAL for a flag of 2, else
                                                                                          ENOTSUP for a list of 0
5d64ebf     2026-06-04  VFU_SGL_DIRECT_ACCESS; DMA_MAP flags MMAP and FILE_IO             ENOTSUP, not EINVAL, for it
==========  ==========  ================================================================  =============================

Prototypes here are those since 8b1396b, so anything older is refused, and so is whatever answers otherwise: a register
callback whose vfu_dma_info_t does not say what was mapped, a dma_sg_t of no plausible size. All arguments are such that
each known version survives them. A later change that does none of this goes unseen: docs/libvfio-user.md says up to
which commit the tests have run.
"""

import ctypes
import errno
import json
import os
import socket
import tempfile
from typing import Any

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.libvfio_user.bindings.constants import CtxFlag, DevType, PciType, SglFlag, Trans
from vfiouser_virtio.libvfio_user.bindings.prototypes import Functions
from vfiouser_virtio.libvfio_user.bindings.types import DMA_CB, DmaInfo
from vfiouser_virtio.protocols import vfio_user as wire

_UNKNOWN_FLAG = 2
_ADDRESS, _SIZE = 0x5000_0000, 0x3000
_MARK = b"vfiouser-virtio asks what this is"


def probe(functions: Functions) -> str:
    """What was recognised, in words; ConfigError (without the library's name) for an ABI that is not known.

    It takes about a millisecond, and a socket in a temporary folder.
    """
    size = functions.dma_sg_size()
    # Five members of at most eight bytes at efd091b, and they cannot be less than an address, a length and a region.
    if not 24 <= size <= 256:
        raise ConfigError(f"its dma_sg_size() says {size}, which is no size of a dma_sg_t")
    with tempfile.TemporaryDirectory(prefix="vfiouser-virtio-probe-") as folder:
        directory = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            # However long the folder's own name is, this one fits a sockaddr_un.
            return _probe_at(functions, f"/proc/self/fd/{directory}/s")
        finally:
            os.close(directory)


def _probe_at(functions: Functions, path: str) -> str:
    handle = functions.vfu_create_ctx(Trans.SOCK, os.fsencode(path), CtxFlag.ATTACH_NB, None, DevType.PCI)
    if handle is None:
        raise ConfigError(f"its vfu_create_ctx fails: {os.strerror(ctypes.get_errno())}")
    seen: list[tuple[str, DmaInfo]] = []
    # They live until vfu_destroy_ctx has called one of them a last time.
    callbacks = [_recorder(name, seen) for name in ("second", "third", "fourth")]
    try:
        direct = _sgl_flags(functions, handle)
        _dma_map(functions, handle, path, callbacks)
        _judge(seen)
    finally:
        functions.vfu_destroy_ctx(handle)
    since = "5d64ebf or later" if direct else "8b1396b to 5d64ebf"
    return f"libvfio-user {since} (vfu_sgl_read with flags, vfu_setup_device_dma with max_regions)"


def _sgl_flags(functions: Functions, handle: int) -> bool:
    """Refuse a library without the flags of vfu_sgl_read; whether it has VFU_SGL_DIRECT_ACCESS.

    No entry is looked at: the flags are checked first, and a list of any but one entry is refused next.
    """

    def refusal(flags: int) -> int:
        ctypes.set_errno(0)
        functions.vfu_sgl_read(handle, None, 0, None, flags)
        return ctypes.get_errno()

    unknown, direct = refusal(_UNKNOWN_FLAG), refusal(SglFlag.DIRECT_ACCESS)
    if unknown == errno.ENOTSUP:
        raise ConfigError("it is older than commit 8b1396b of April 2026: its vfu_sgl_read takes no flags")
    if unknown != errno.EINVAL or direct not in (errno.EINVAL, errno.ENOTSUP):
        raise ConfigError(f"its vfu_sgl_read answers as no known version does (errno {unknown} and {direct})")
    return direct == errno.ENOTSUP


def _dma_map(functions: Functions, handle: int, path: str, callbacks: list[Any]) -> None:
    """Set the DMA callbacks up, and be a client for one DMA_MAP."""
    second, third, fourth = callbacks
    # As max_regions the address of a callback is a large number, and before f3742ed it is a callback.
    as_number = ctypes.cast(second, ctypes.c_void_p).value or 0
    functions.vfu_pci_init(handle, PciType.EXPRESS, 0, 0)
    functions.vfu_setup_device_dma(handle, as_number, third, fourth)
    functions.vfu_realize_ctx(handle)
    memory = os.memfd_create("vfiouser-virtio-probe")
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.truncate(memory, _SIZE)
        os.pwrite(memory, _MARK, 0)
        client.connect(path)
        client.sendall(_message(wire.Command.VERSION, _version()))
        if functions.vfu_attach_ctx(handle) != 0:
            raise ConfigError(f"its vfu_attach_ctx fails: {os.strerror(ctypes.get_errno())}")
        access = wire.DmaMapFlags.READ | wire.DmaMapFlags.WRITE
        request = {"argsz": wire.DMA_MAP.sizeof(), "flags": access, "offset": 0, "address": _ADDRESS, "size": _SIZE}
        socket.send_fds(client, [_message(wire.Command.DMA_MAP, wire.DMA_MAP.build(request))], [memory])
        functions.vfu_run_ctx(handle)
    finally:
        client.close()
        os.close(memory)


def _judge(seen: list[tuple[str, DmaInfo]]) -> None:
    if not seen:
        raise ConfigError("its vfu_setup_device_dma sets no callback up as any known version does")
    called, info = seen[0]
    if called == "second":
        raise ConfigError(
            "it is older than commit f3742ed of March 2026: its vfu_setup_device_dma takes no max_regions"
        )
    # Only when all the rest of the struct is as expected is its pointer followed.
    as_known = called == "third" and (info.iova, info.size, info.prot) == (_ADDRESS, _SIZE, 3)
    if not (as_known and info.vaddr and info.page_size >= 4096 and info.mapping and info.mapping[1] >= _SIZE):
        raise ConfigError(f"its DMA register callback says what no known version says: {called}, {info}")
    if ctypes.string_at(info.vaddr, len(_MARK)) != _MARK:
        raise ConfigError("the memory of its DMA register callback is not what was mapped")


def _recorder(name: str, seen: list[tuple[str, DmaInfo]]) -> Any:
    def callback(_handle: int, info: Any) -> None:
        if info:
            seen.append((name, DmaInfo.from_struct(info.contents)))

    return DMA_CB(callback)


def _version() -> bytes:
    capabilities = {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20}
    data = json.dumps({"capabilities": capabilities}).encode() + b"\0"
    return wire.VERSION.build({"major": 0, "minor": 1, "data": data})


def _message(command: wire.Command, payload: bytes) -> bytes:
    size = wire.HEADER.sizeof() + len(payload)
    return wire.HEADER.build({"id": command, "command": command, "size": size, "flags": 0, "error": 0}) + payload
