"""Whether the real libvfio-user is on this machine: LIBVFIO_USER names it, or the loader finds it."""

from functools import cache

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.libvfio_user.bindings import Library, load


@cache
def find() -> tuple[Library | None, str]:
    """The library, and a line that says which it is, or why its tests are left out."""
    try:
        library = load()
    except ConfigError as error:
        return None, f"tests that need libvfio-user are left out: {error}"
    return library, f"{library.path}: {library.version}"
