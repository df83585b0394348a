"""Prototypes of every function of libvfio-user.h: once for ctypes (`PROTOTYPES`), once for types (`Functions`)."""

import ctypes
from collections.abc import Callable
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_int,
    c_size_t,
    c_ssize_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, NamedTuple

from vfiouser_virtio.libvfio_user.bindings.types import (
    DMA_CB,
    IRQ_STATE_CB,
    LOG_FN,
    QUIESCE_CB,
    REGION_ACCESS_CB,
    RESET_CB,
    Handle,
    Iovec,
    MigrationCallbacks,
)


class Prototype(NamedTuple):
    """Types of the result and the parameters of a C function."""

    restype: Any
    argtypes: tuple[Any, ...]


_iov = POINTER(Iovec)
_sgl = c_void_p  # dma_sg_t *

PROTOTYPES: dict[str, Prototype] = {
    "dma_sg_size": Prototype(c_size_t, ()),
    "vfu_create_ctx": Prototype(Handle, (c_int, c_char_p, c_int, c_void_p, c_int)),
    "vfu_realize_ctx": Prototype(c_int, (Handle,)),
    "vfu_attach_ctx": Prototype(c_int, (Handle,)),
    "vfu_get_poll_fd": Prototype(c_int, (Handle,)),
    "vfu_run_ctx": Prototype(c_int, (Handle,)),
    "vfu_destroy_ctx": Prototype(None, (Handle,)),
    "vfu_get_private": Prototype(c_void_p, (Handle,)),
    "vfu_log": Prototype(None, (Handle, c_int, c_char_p)),  # and the arguments of the format
    "vfu_setup_log": Prototype(c_int, (Handle, LOG_FN, c_int)),
    "vfu_setup_region": Prototype(
        c_int, (Handle, c_int, c_size_t, REGION_ACCESS_CB, c_int, _iov, c_uint32, c_int, c_uint64)
    ),
    "vfu_setup_device_quiesce_cb": Prototype(None, (Handle, QUIESCE_CB)),
    "vfu_device_quiesced": Prototype(c_int, (Handle, c_int)),
    "vfu_setup_device_reset_cb": Prototype(c_int, (Handle, RESET_CB)),
    "vfu_setup_device_dma": Prototype(c_int, (Handle, c_size_t, DMA_CB, DMA_CB)),
    "vfu_setup_device_nr_irqs": Prototype(c_int, (Handle, c_int, c_uint32)),
    "vfu_setup_irq_state_callback": Prototype(c_int, (Handle, c_int, IRQ_STATE_CB)),
    "vfu_setup_device_migration_callbacks": Prototype(c_int, (Handle, POINTER(MigrationCallbacks))),
    "vfu_irq_trigger": Prototype(c_int, (Handle, c_uint32)),
    "vfu_addr_to_sgl": Prototype(c_int, (Handle, c_void_p, c_size_t, _sgl, c_size_t, c_int)),
    "vfu_sgl_get": Prototype(c_int, (Handle, _sgl, _iov, c_size_t, c_int)),
    "vfu_sgl_mark_dirty": Prototype(None, (Handle, _sgl, c_size_t)),
    "vfu_sgl_put": Prototype(None, (Handle, _sgl, _iov, c_size_t)),
    "vfu_sgl_read": Prototype(c_int, (Handle, _sgl, c_size_t, c_void_p, c_int)),
    "vfu_sgl_write": Prototype(c_int, (Handle, _sgl, c_size_t, c_void_p, c_int)),
    "vfu_sg_is_mappable": Prototype(c_bool, (Handle, _sgl)),
    "vfu_pci_init": Prototype(c_int, (Handle, c_int, c_int, c_int)),
    "vfu_pci_set_id": Prototype(None, (Handle, c_uint16, c_uint16, c_uint16, c_uint16)),
    "vfu_pci_set_class": Prototype(None, (Handle, c_uint8, c_uint8, c_uint8)),
    "vfu_pci_get_config_space": Prototype(c_void_p, (Handle,)),
    "vfu_pci_add_capability": Prototype(c_ssize_t, (Handle, c_size_t, c_int, c_void_p)),
    "vfu_pci_find_capability": Prototype(c_size_t, (Handle, c_bool, c_int)),
    "vfu_pci_find_next_capability": Prototype(c_size_t, (Handle, c_bool, c_size_t, c_int)),
    "vfu_create_ioeventfd": Prototype(
        c_int, (Handle, c_uint32, c_int, c_size_t, c_uint32, c_uint32, c_uint64, c_int, c_size_t)
    ),
}


class Functions:
    """Functions of the library, called as in C; a null pointer is None. `bind` fills it from a loaded library."""

    dma_sg_size: Callable[[], int]
    vfu_create_ctx: Callable[[int, bytes, int, int | None, int], int | None]
    vfu_realize_ctx: Callable[[int], int]
    vfu_attach_ctx: Callable[[int], int]
    vfu_get_poll_fd: Callable[[int], int]
    vfu_run_ctx: Callable[[int], int]
    vfu_destroy_ctx: Callable[[int], None]
    vfu_get_private: Callable[[int], int | None]
    vfu_log: Callable[[int, int, bytes, bytes], None]
    vfu_setup_log: Callable[[int, Any, int], int]
    vfu_setup_region: Callable[[int, int, int, Any, int, Any, int, int, int], int]
    vfu_setup_device_quiesce_cb: Callable[[int, Any], None]
    vfu_device_quiesced: Callable[[int, int], int]
    vfu_setup_device_reset_cb: Callable[[int, Any], int]
    vfu_setup_device_dma: Callable[[int, int, Any, Any], int]
    vfu_setup_device_nr_irqs: Callable[[int, int, int], int]
    vfu_setup_irq_state_callback: Callable[[int, int, Any], int]
    vfu_setup_device_migration_callbacks: Callable[[int, Any], int]
    vfu_irq_trigger: Callable[[int, int], int]
    vfu_addr_to_sgl: Callable[[int, int, int, Any, int, int], int]
    vfu_sgl_get: Callable[[int, Any, Any, int, int], int]
    vfu_sgl_mark_dirty: Callable[[int, Any, int], None]
    vfu_sgl_put: Callable[[int, Any, Any, int], None]
    vfu_sgl_read: Callable[[int, Any, int, Any, int], int]
    vfu_sgl_write: Callable[[int, Any, int, Any, int], int]
    vfu_sg_is_mappable: Callable[[int, Any], bool]
    vfu_pci_init: Callable[[int, int, int, int], int]
    vfu_pci_set_id: Callable[[int, int, int, int, int], None]
    vfu_pci_set_class: Callable[[int, int, int, int], None]
    vfu_pci_get_config_space: Callable[[int], int | None]
    vfu_pci_add_capability: Callable[[int, int, int, Any], int]
    vfu_pci_find_capability: Callable[[int, bool, int], int]
    vfu_pci_find_next_capability: Callable[[int, bool, int, int], int]
    vfu_create_ioeventfd: Callable[[int, int, int, int, int, int, int, int, int], int]


def missing(library: ctypes.CDLL) -> list[str]:
    """The names of `PROTOTYPES` that ``library`` does not export."""
    return [name for name in PROTOTYPES if not hasattr(library, name)]


def bind(library: ctypes.CDLL) -> Functions:
    """Declare every prototype on ``library``, which has them all, and hand out the typed functions."""
    functions = Functions()
    for name, prototype in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype = prototype.restype
        function.argtypes = prototype.argtypes
        setattr(functions, name, function)
    return functions
