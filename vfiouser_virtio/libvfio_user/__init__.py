"""The C library libvfio-user through ctypes: its API (`bindings`), and the engine that puts it behind the seam.

::

    library = load()
    with LibraryListener("/run/x/blk0.sock") as listener:
        listener.open(library)
        await LibvfioUserServer(vfio_device).serve(listener)
"""

from vfiouser_virtio.libvfio_user.bindings import ENVIRONMENT, Library, load
from vfiouser_virtio.libvfio_user.listening import LibraryListener
from vfiouser_virtio.libvfio_user.server import LibvfioUserServer

__all__ = ["ENVIRONMENT", "Library", "LibraryListener", "LibvfioUserServer", "load"]
