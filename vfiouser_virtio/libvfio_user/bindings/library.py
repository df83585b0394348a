"""Loading libvfio-user: where it is found, and what is checked before anything of it is used."""

import ctypes
import os
import platform
from dataclasses import dataclass

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.libvfio_user.bindings.probe import probe
from vfiouser_virtio.libvfio_user.bindings.prototypes import Functions, bind, missing

ENVIRONMENT = "LIBVFIO_USER"
"""The environment variable that names the library's file."""

SONAMES = ("libvfio-user.so.0", "libvfio-user.so")
"""What the loader is asked for: in LD_LIBRARY_PATH, the system's folders and ld.so.cache."""


@dataclass(frozen=True)
class Library:
    """Loaded library whose ABI is known: its functions, where it came from, what the probe recognised."""

    functions: Functions
    path: str
    version: str


def load(path: str | os.PathLike[str] | None = None) -> Library:
    """Find libvfio-user and check it: ``path``, else the file that LIBVFIO_USER names, else the system's.

    Raises ConfigError, one line that says what is wrong and with which file: there is none, it cannot be loaded, it is
    not libvfio-user, its ABI is not one of those known (see `probe`). A file that was named is never passed over.
    """
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        raise ConfigError(f"libvfio-user's bindings are for 64-bit machines, this is {platform.machine()}")
    named = os.fspath(path) if path is not None else os.environ.get(ENVIRONMENT)
    if named:
        return _checked(_open(named), named)
    for soname in SONAMES:
        try:
            return _checked(ctypes.CDLL(soname, use_errno=True), soname)
        except OSError:
            continue
    raise ConfigError(
        f"libvfio-user is not installed: build it as its documentation says, then name libvfio-user.so "
        f"with --libvfio-user or {ENVIRONMENT}"
    )


def _open(path: str) -> ctypes.CDLL:
    if not os.path.exists(path):
        raise ConfigError(f"libvfio-user: there is no {path}")
    if os.path.isdir(path):
        raise ConfigError(f"libvfio-user: {path} is a folder; name the libvfio-user.so in it")
    try:
        # A name without a slash would be looked up in the system's folders.
        return ctypes.CDLL(os.path.abspath(path), use_errno=True)
    except OSError as error:
        raise ConfigError(f"libvfio-user: {error}") from None


def _checked(library: ctypes.CDLL, path: str) -> Library:
    absent = missing(library)
    if "vfu_create_ctx" in absent:
        raise ConfigError(f"{path} is not libvfio-user: it has no vfu_create_ctx")
    if absent:
        raise ConfigError(f"{path} is a libvfio-user that is not known here: it has no {', '.join(absent)}")
    functions = bind(library)
    try:
        return Library(functions, path, probe(functions))
    except ConfigError as error:
        raise ConfigError(f"{path} is a libvfio-user that is not known here: {error}") from None
