"""Shared memory regions of a device (virtio 1.4, 2.10): memory of the device that its driver maps."""

from vfiouser_virtio.errors import AuthorError

PAGE = 4096
"""Bytes of which a region's size is a multiple: drivers map whole pages."""
_LARGEST = 1 << 40


class SharedRegion:
    """Region number ``id`` (``shmid``) of ``size`` bytes, made by `Device.add_shared_memory`."""

    def __init__(self, region_id: int, size: int) -> None:
        if not 0 <= region_id <= 0xFF:
            raise AuthorError(f"add_shared_memory({region_id}, …): expected an id from 0 to 255")
        if not 0 < size <= _LARGEST or size % PAGE:
            raise AuthorError(f"add_shared_memory({region_id}, {size:#x}): expected a multiple of {PAGE:#x} bytes")
        self.id, self.size = region_id, size
        self._view: memoryview | None = None

    @property
    def view(self) -> memoryview:
        """The memory, writable, zeros at first; the driver reads and writes it at any moment, without a word.

        Copy what is to be checked. It is there once the device is on a transport, `Device.__init__` is too early:
        AuthorError.
        """
        if self._view is None:
            raise AuthorError(f"shared memory region {self.id} has no memory before its device is on a transport")
        return self._view

    def place(self, view: memoryview) -> None:
        """For the transport: where it lies."""
        assert len(view) == self.size
        self._view = view
