"""Specification of a chardev as a user writes it: ``pty``, ``unix:/run/x.sock``, ``file:/tmp/log``, …"""

import difflib
from collections.abc import Callable
from pathlib import Path

from vfiouser_virtio.backends.chardev import Chardev, Null
from vfiouser_virtio.backends.log_file import LIMIT, LogFile
from vfiouser_virtio.backends.pty import Pty
from vfiouser_virtio.backends.stdio import Stdio
from vfiouser_virtio.backends.unix_socket import UnixSocket
from vfiouser_virtio.errors import ConfigError

_ALONE: dict[str, Callable[[], Chardev]] = {"stdio": Stdio, "pty": Pty, "null": Null}
_WITH_PATH: dict[str, Callable[[Path], Chardev]] = {"pty": Pty, "unix": UnixSocket, "file": LogFile}

SPECS = "stdio, pty, pty:LINK, unix:PATH, file:PATH, null"


def open_chardev(spec: str, *, file_limit: int = LIMIT) -> Chardev:
    """The chardev that a spec string asks for.

    Raises ConfigError for a string that is none, DeviceError when the host does not have what it names.
    """
    kind, colon, path = spec.partition(":")
    if not colon and kind in _ALONE:
        return _ALONE[kind]()
    if path and kind == "file":
        return LogFile(Path(path), limit=file_limit)
    if path and kind in _WITH_PATH:
        return _WITH_PATH[kind](Path(path))
    if kind in _WITH_PATH:
        raise ConfigError(f"chardev '{spec}' needs a path: {kind}:/some/path")
    if kind in _ALONE:
        raise ConfigError(f"chardev '{spec}': {kind} takes nothing after it")
    near = difflib.get_close_matches(kind, {*_ALONE, *_WITH_PATH}, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {SPECS}"
    raise ConfigError(f"chardev '{spec}' is not known: {hint}")
