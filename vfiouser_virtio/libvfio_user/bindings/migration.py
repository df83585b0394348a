"""Migration: vfu_migration_callbacks_t as three Python functions."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from vfiouser_virtio.libvfio_user.bindings.callbacks import Callbacks
from vfiouser_virtio.libvfio_user.bindings.constants import MIGR_CALLBACKS_VERS, MigrState
from vfiouser_virtio.libvfio_user.bindings.types import MIGR_DATA_CB, MIGR_TRANSITION_CB, MigrationCallbacks


@dataclass(frozen=True)
class Migration:
    """Migration callbacks; an OSError out of one of them is the client's error reply.

    ``transition(state)`` goes to that state. ``read_data(count)`` gives at most ``count`` bytes of the device's state,
    none at its end. ``write_data(data)`` takes state that was saved earlier, all of ``data``.
    """

    transition: Callable[[MigrState], None]
    read_data: Callable[[int], bytes]
    write_data: Callable[[bytes], None]


def migration_struct(callbacks: Callbacks, migration: Migration) -> MigrationCallbacks:
    """The C struct. The library copies it, and keeps the pointers in it."""

    def transition(_handle: int, state: int) -> int:
        migration.transition(MigrState(state))
        return 0

    def read_data(_handle: int, buffer: int, count: int) -> int:
        data = migration.read_data(count)
        if len(data) > count:
            raise ValueError(f"read_data gave {len(data):#x} bytes of at most {count:#x}")
        ctypes.memmove(buffer, data, len(data))
        return len(data)

    def write_data(_handle: int, buffer: int, count: int) -> int:
        migration.write_data(ctypes.string_at(buffer, count))
        return count

    return MigrationCallbacks(
        MIGR_CALLBACKS_VERS,
        callbacks.make(MIGR_TRANSITION_CB, "migration transition", transition),
        callbacks.make(MIGR_DATA_CB, "migration read_data", read_data),
        callbacks.make(MIGR_DATA_CB, "migration write_data", write_data),
    )
