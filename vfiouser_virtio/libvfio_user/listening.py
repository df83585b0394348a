"""Socket of a device that libvfio-user serves: the library binds it itself, by the package's rules for sockets."""

import os
from collections.abc import Collection

from vfiouser_virtio.libvfio_user.bindings import Context, HasFunctions
from vfiouser_virtio.socket_file import SocketFile
from vfiouser_virtio.vfio_user.server.listening import ListenError, PathClaim, claim_path

# Read and write for the owner alone: what bind() leaves of a socket's mode 0777 under this umask.
_OWNER_ONLY = 0o177


class LibraryListener:
    """Socket path that the library listens on after `open`. A context manager that ends both.

    It has what `vfio_user.Listener` has, so that a server's owner need not know which of the two it is.
    """

    connected = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Claim ``path``, and remove a dead server's socket there. Raises ListenError as `vfio_user.listen_path`."""
        self._claim: PathClaim | None = claim_path(path)
        self.name = self._claim.path
        self.path: str | None = os.path.abspath(self.name)
        self.where = self.path
        self._context: Context | None = None

    def allow_only(self, uids: Collection[int], device: str) -> None:  # noqa: ARG002
        """Nothing of the kind: raises ListenError."""
        raise ListenError(f"{device}: no choice of users (--allow-uid) with libvfio-user, which accepts clients itself")

    @property
    def context(self) -> Context:
        """The library's context, which `open` has made."""
        assert self._context is not None, "LibraryListener.open() comes first"
        return self._context

    def open(self, library: HasFunctions) -> None:
        """Have the library listen, for our user alone (mode 0600). Raises ListenError. Once more does nothing."""
        if self._context is not None:
            return
        # The library binds a socket with whatever mode the umask leaves; clients can connect from then on.
        umask = os.umask(_OWNER_ONLY)
        try:
            self._context = Context(library, self.name)
        except OSError as error:
            raise ListenError(f"cannot listen on '{self.name}': {error.strerror}") from None
        finally:
            os.umask(umask)
        os.chmod(self.name, 0o600)  # a umask that takes away from the owner
        if self._claim is not None:
            self._claim.file = SocketFile(self.name)

    def close(self) -> None:
        """Stop listening, drop the client if there is one, and remove the socket."""
        if self._context is not None:
            self._context.destroy_ctx()
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def disown(self) -> None:
        """Leave the claim to the process that we were forked from."""
        if self._claim is not None:
            self._claim.disown()
            self._claim = None

    def stop_listening(self) -> None:
        """Nothing: only the process that serves the device opens the socket."""
        assert self._context is None

    def __enter__(self) -> "LibraryListener":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
