"""Addresses of sockets as users of QEMU write them: ``addr.type=unix,addr.path=/run/x.sock``."""

import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vfiouser_virtio.connecting import SocketName, StreamAddress
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.socket_file import MAX_PATH, SocketFile, bind_path

AddressType = Literal["unix", "inet", "fd"]
MAX_FD = 0x7FFF_FFFF
"""The largest number that the kernel looks at: an int of C."""


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """Address of a socket of one kind, named as SocketAddress of QEMU's QAPI. Raises ConfigError for half of one.

    ``option`` is what its options begin with, such as ``addr``.
    """

    option: str
    type: AddressType
    path: Path | None = None
    host: str | None = None
    port: int | None = None
    fd: int | None = None

    def __post_init__(self) -> None:
        for kind, names in (("unix", ("path",)), ("inet", ("host", "port")), ("fd", ("fd",))):
            for name in names:
                there = getattr(self, name) is not None
                spelled = f"{self.option}.{'str' if name == 'fd' else name}"
                if there and kind != self.type:
                    raise ConfigError(f"{spelled} goes with {self.option}.type={kind}")
                if not there and kind == self.type:
                    raise ConfigError(f"{self.option}.type={kind} needs {spelled}=…")
        if self.path is not None and len(os.fsencode(self.path)) > MAX_PATH:
            raise ConfigError(f"{self.option}.path={self.path}: longer than {MAX_PATH} bytes")
        if self.port is not None and not 0 <= self.port <= 0xFFFF:
            raise ConfigError(f"{self.option}.port={self.port}: not 0 to 65535")
        if self.fd is not None and not 0 <= self.fd <= MAX_FD:
            raise ConfigError(f"{self.option}.str={self.fd}: not the number of a file descriptor")

    def __str__(self) -> str:
        match self.type:
            case "unix":
                return f"unix:{self.path}"
            case "inet":
                return f"{self.host}:{self.port}"
            case "fd":
                return f"fd {self.fd}"

    def resolve(self, kind: socket.SocketKind, family: int = socket.AF_UNSPEC) -> StreamAddress:
        """The family and what bind(2) and connect(2) take. Asks the resolver.

        Raises DeviceError for hosts that are not known, or not in this ``family``.
        """
        if self.type == "unix":
            return socket.AF_UNIX, os.fspath(self.path or "")
        try:
            found = socket.getaddrinfo(self.host, self.port, family, kind, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise DeviceError(f"{self.option}: {self}: {error.strerror}") from None
        except UnicodeError:  # of IDNA: a part of the name is empty, or has more than 63 bytes
            raise DeviceError(f"{self.option}: {self}: not a host's name") from None
        return found[0][0], found[0][4]

    def bind(self, sock: socket.socket, where: SocketName) -> SocketFile | None:
        """Bind a socket to it, which is ``where`` (see `resolve`). Raises OSError.

        Returns the file, to be removed in the end, if it has a path: a dead program's socket is replaced.
        """
        if self.path is not None:
            return bind_path(sock, self.path)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        return None

    def given(self, kind: socket.SocketKind) -> socket.socket:
        """The socket that ``fd`` is, as our own copy.

        Raises DeviceError where it is none, of another kind, or connected to nothing.
        """
        assert self.fd is not None
        try:
            if not stat.S_ISSOCK(os.fstat(self.fd).st_mode):
                raise DeviceError(f"{self.option}: fd {self.fd} is no socket")
            given = socket.socket(fileno=os.dup(self.fd))
        except OSError as error:
            raise DeviceError(f"{self.option}: fd {self.fd}: {error.strerror}") from None
        if given.type != kind:
            given.close()
            raise DeviceError(f"{self.option}: fd {self.fd} is no socket of type {kind.name}")
        try:
            given.getpeername()
        except OSError as error:
            given.close()
            raise DeviceError(
                f"{self.option}: fd {self.fd}: {error.strerror}: a socket that is given is connected before"
            ) from None
        return given
