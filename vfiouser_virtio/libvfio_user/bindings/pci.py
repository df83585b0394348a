"""PCI half of libvfio-user.h: identity, config space, capabilities, ioeventfds.

Capabilities are bytes: build them with the schemas of `vfiouser_virtio.protocols.pci` (struct msixcap is `MSIX_CAP`,
pmcap `PM_CAP`, pxcap `EXP_CAP`, msicap `MSI_CAP`, dsncap `DSN_CAP`, vsc `VNDR_CAP_HEADER` and what follows it).
"""

import ctypes
import errno

from vfiouser_virtio.libvfio_user.bindings.constants import PciType
from vfiouser_virtio.libvfio_user.bindings.handle import ContextHandle, HasFunctions
from vfiouser_virtio.protocols import pci

_CAP_SIZE_MAX = 256
_EXT_CAP_SIZE_MAX = 4096


class PciCalls(ContextHandle):
    """Calls of `Context` about PCI."""

    def __init__(self, library: HasFunctions, name: str) -> None:
        super().__init__(library, name)
        self._config_size = 0

    def pci_init(self, pci_type: PciType, hdr_type: int = 0, revision: int = 0) -> None:
        """Make the config space, 256 or 4096 bytes of it (vfu_pci_init). Raises OSError EEXIST the second time.

        The library ignores ``revision``, as of efd091b: write the revision id into the config space instead.
        """
        self._checked(self._functions.vfu_pci_init(self._handle, pci_type, hdr_type, revision), "vfu_pci_init")
        express = pci_type in (PciType.PCI_X_2, PciType.EXPRESS)
        self._config_size = pci.CFG_SPACE_EXP_SIZE if express else pci.CFG_SPACE_SIZE

    def pci_set_id(self, vendor: int, device: int, subsystem_vendor: int, subsystem: int) -> None:
        """Set the four ids of the header (vfu_pci_set_id)."""
        self._require_config("vfu_pci_set_id")
        self._functions.vfu_pci_set_id(self._handle, vendor, device, subsystem_vendor, subsystem)

    def pci_set_class(self, base: int, sub: int, interface: int) -> None:
        """Set the three bytes of the class code (vfu_pci_set_class)."""
        self._require_config("vfu_pci_set_class")
        self._functions.vfu_pci_set_class(self._handle, base, sub, interface)

    def pci_get_config_space(self) -> memoryview:
        """The library's own config space, to read and to write; gone with `destroy_ctx`, and no view may outlive it.

        There is one after `pci_init`, or after `realize_ctx`; before, OSError EINVAL (C answers with a null pointer).
        """
        self._require_config("vfu_pci_get_config_space")
        address = self._functions.vfu_pci_get_config_space(self._handle)
        if address is None:
            raise self._error("vfu_pci_get_config_space")
        return memoryview((ctypes.c_char * self._config_size).from_address(address)).cast("B")

    def pci_add_capability(self, pos: int, flags: int, data: bytes) -> int:
        """Copy a capability to offset ``pos``, or with 0 to where there is room; the offset (vfu_pci_add_capability).

        ``flags`` are `CapFlag`. Raises OSError, ENOTSUP for a capability whose size the library does not know.
        """
        self._require_config("vfu_pci_add_capability")
        # The library takes the size from the capability itself, and reads that far.
        room = ctypes.create_string_buffer(data, max(len(data), _EXT_CAP_SIZE_MAX if flags & 1 else _CAP_SIZE_MAX))
        add = self._functions.vfu_pci_add_capability
        return self._checked(add(self._handle, pos, flags, room), "vfu_pci_add_capability")

    def pci_find_capability(self, cap_id: int, *, extended: bool = False) -> int:
        """The offset of the first capability of that id, 0 when there is none (vfu_pci_find_capability)."""
        self._require_config("vfu_pci_find_capability")
        ctypes.set_errno(0)
        found = self._functions.vfu_pci_find_capability(self._handle, extended, cap_id)
        return self._found(found, "vfu_pci_find_capability")

    def pci_find_next_capability(self, pos: int, cap_id: int, *, extended: bool = False) -> int:
        """The offset of the next one behind the capability at ``pos``, else 0 (vfu_pci_find_next_capability)."""
        self._require_config("vfu_pci_find_next_capability")
        ctypes.set_errno(0)
        found = self._functions.vfu_pci_find_next_capability(self._handle, extended, pos, cap_id)
        return self._found(found, "vfu_pci_find_next_capability")

    def create_ioeventfd(
        self,
        region: int,
        fd: int,
        offset: int,
        size: int,
        flags: int = 0,
        datamatch: int = 0,
        shadow_fd: int = -1,
        shadow_offset: int = 0,
    ) -> None:
        """Offer the client an eventfd for writes of ``size`` bytes at ``offset`` of a region (vfu_create_ioeventfd).

        ``flags`` are KVM's (`protocols.vfio_user.IoEventFdFlags`). The fd stays the caller's, who keeps it open until
        `destroy_ctx`. Raises OSError EINVAL: outside of the region; a shadow fd in a library built without them.
        """
        create = self._functions.vfu_create_ioeventfd
        result = create(self._handle, region, fd, offset, size, flags, datamatch, shadow_fd, shadow_offset)
        self._checked(result, "vfu_create_ioeventfd")

    def _found(self, offset: int, function: str) -> int:
        if offset == 0 and ctypes.get_errno() not in (0, errno.ENOENT):
            raise self._error(function)
        return offset

    def _require_config(self, function: str) -> None:
        self._require(self._config_size > 0, function, "no config space: neither vfu_pci_init nor vfu_realize_ctx")
