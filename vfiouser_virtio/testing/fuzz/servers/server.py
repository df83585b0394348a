"""Server under test: behind a socket only, or started by us, so that its end and its last words are known."""

import os
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.parent_death import ending_with_us
from vfiouser_virtio.testing.fuzz.servers.output import ServerOutput, last_line

START_TIMEOUT = 60.0
"""Seconds until a server that was started must listen: sanitizers make it slow."""
_LAST_WORDS = 5.0  # seconds for the output of a server that has ended
_FIRST_WAIT, _LONGEST_WAIT = 0.0005, 0.02  # between looks, in seconds
_CREDENTIALS = struct.Struct("=iii")  # struct ucred: pid, uid, gid (unix(7))


class ServerGoneError(ConfigError):
    """Absence of a server where there was to be one: no listener, or its command has ended."""


@dataclass(frozen=True, slots=True)
class Ending:
    """End of a server's process."""

    status: int
    """Exit status; minus the number of a signal."""
    output: str
    """Its newest output."""

    def __str__(self) -> str:
        if self.status >= 0:
            return f"ended with status {self.status}"
        try:
            return f"died of {signal.Signals(-self.status).name}"
        except ValueError:
            return f"died of signal {-self.status}"


class FuzzedServer:
    """Server on ``path``; ``command``, if given, starts it, and again whenever it has ended."""

    def __init__(self, path: Path, command: Sequence[str] | None = None) -> None:
        self.path = path
        self.command = command
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._output: ServerOutput | None = None
        self._ending: Ending | None = None

    @staticmethod
    def command_of(text: str, path: Path) -> list[str]:
        """The words of a command line, ``{socket}`` in them replaced. Raises ConfigError."""
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"--restart {text}: {error}") from None
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"--restart {text}: there is no program {words[0] if words else ''!r}")
        return [word.replace("{socket}", str(path)) for word in words]

    # ---- its process ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, unless it runs, or is not ours to start. Raises ConfigError."""
        if self.command is None or (self._process is not None and self.ended() is None):
            return
        self.stop()
        self._remove_stale()
        output = ServerOutput()
        # What is quicker than a Python that becomes the server; both end it with us.
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else None
        words = [*guard, *self.command] if guard else ending_with_us(self.command)
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output.write_fd,
                stderr=output.write_fd,
                start_new_session=True,
            )
        finally:
            output.start()
        self._output = output
        self.starts += 1

    def _remove_stale(self) -> None:
        """What the last one has left of its socket. Raises ConfigError where another server listens there."""
        try:
            if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
                raise ConfigError(f"{self.path}: is there, and no socket")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            try:
                sock.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)
                return
            except OSError:
                pass
        raise ConfigError(f"{self.path}: a server listens there already; --restart starts one of its own")

    def ended(self) -> Ending | None:
        """How it has ended since the last `start`, if it has, and is ours."""
        if self._ending is None and self._process is not None and (status := self._process.poll()) is not None:
            assert self._output is not None
            self._kill()  # what it has started: its output ends then
            self._ending = Ending(status, self._output.all_of_it(_LAST_WORDS))
        return self._ending

    async def wait_ended(self, seconds: float) -> Ending | None:
        """The same; it is given so many seconds to end."""
        pause = _FIRST_WAIT
        with trio.move_on_after(seconds):
            while (ending := self.ended()) is None:
                await trio.sleep(pause)
                pause = min(2 * pause, _LONGEST_WAIT)
            return ending
        return None

    def stop(self) -> None:
        """Kill it and what it has started, if it is ours."""
        self._kill()
        self._process = self._ending = None

    def _kill(self) -> None:
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def complaint(self) -> str:
        """What its sanitizer has said since the last look."""
        return "" if self._output is None else self._output.complaint()

    # ---- its socket ----------------------------------------------------------------------------------------------

    async def connect(self, seconds: float) -> socket.socket:
        """A connection. Raises ServerGoneError if there is no listener, or none comes in this time."""
        pause = _FIRST_WAIT
        reason = ""
        with trio.move_on_after(seconds):
            while True:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.setblocking(False)
                try:
                    sock.connect(str(self.path))
                except OSError as error:
                    sock.close()
                    reason = error.strerror or str(error)
                    # A full backlog (EAGAIN) is emptied, a socket that is not there yet may come of what we started.
                    if not isinstance(error, BlockingIOError) and self.command is None:
                        raise ServerGoneError(f"{self.path}: {reason}") from None
                else:
                    return sock
                if (ending := self.ended()) is not None:
                    said = last_line(ending.output)
                    raise ServerGoneError(f"the server {ending} before it listened{said and f': {said}'}")
                await trio.sleep(pause)
                pause = min(2 * pause, _LONGEST_WAIT)
        raise ServerGoneError(f"{self.path}: no connection within {seconds:g} s: {reason}")


def peer_pid(sock: socket.socket) -> int:
    """The process that listens at the other end (unix(7), SO_PEERCRED); 0 where that is not told."""
    pid: int = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    return pid


def open_fds(pid: int) -> int | None:
    """How many file descriptors a process has; None where that is not ours to know."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
