"""Forked child process with a message channel to its parent: its messages, its end, and how it died.

The line is a socket pair. A child's end of file says that it is no more, and ours tells it to end; as the kernel closes
what a dead process had open, neither can be killed in a way that the other does not notice.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import trio

from vfiouser_virtio.device_log import quoted
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.parent_death import end_with_parent
from vfiouser_virtio.serving.terminal import flush, flush_stderr

_MESSAGE_SIZE = 1 << 16
# A child says where its device is and what was done wrong, once or twice in its life: one that was taken over must not
# keep its parent reading for ever.
MOST_MESSAGES = 64
# Of an error, and of its notes; one takes up to 6 bytes.
_MOST_CHARACTERS = 5000
# Lines of /proc/PID/status (proc(5)).
_OWN_MEMORY = re.compile(rb"^(?:RssAnon|VmSwap):\s*(\d+) kB$", re.MULTILINE)
# What a process may take, in seconds, from its last word to its end, and from SIGKILL to its end.
_LAST_S = 2.0


class Line:
    """Message channel of a child process to its parent."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        """Becomes readable when the parent wants us to end, or has ended itself."""
        return self._socket.fileno()

    def hang_up(self) -> None:
        """We end now, even if the kernel does not let us; from any thread."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def send(self, message: object) -> None:
        """Tell the parent, if there still is one: what JSON knows, or a ConfigError or DeviceError, with its notes."""
        with contextlib.suppress(ConnectionError):
            self._socket.send(_encoded(message))

    async def wait_end(self) -> None:
        """Returns when the parent wants us to end, or has ended itself."""
        await trio.lowlevel.wait_readable(self._socket)


class ChildProcess:
    """Process that runs ``work`` and ends with the status that it returns; nothing else of the parent runs there.

    To be made where there is neither another thread nor an event loop, for fork() copies only the calling thread.
    It gets ``with_parent`` when the parent has died. SIGTERM, as `tell_to_end` sends it, lets it end in good order.
    Raises OSError where the host has no process or no file descriptor for it.
    """

    def __init__(self, work: Callable[[Line], int], *, with_parent: signal.Signals = signal.SIGTERM) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.setblocking(False)
        self.flooded = False
        """It has sent more than `MOST_MESSAGES`, and the rest is not read."""
        self._received = 0
        self._ended = self._has_explained = False
        with theirs:
            flush()  # else the child would print it once more
            parent = os.getpid()
            try:
                self._pid = os.fork()
            except OSError:
                self._line.close()
                raise
            if self._pid == 0:
                # Our end of file says so too, but not to a device that does not yield.
                end_with_parent(parent, with_parent)
                self._line.close()
                _run(work, theirs)
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except OSError:
            self._line.close()
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            raise

    def close(self) -> None:
        """Forget about it: also in another child, which has inherited it."""
        self._line.close()
        os.close(self._pidfd)

    def fds(self) -> tuple[int, int]:
        """Those that become readable when there is a message, and when it has ended; both stay its own."""
        return self._line.fileno(), self._pidfd

    async def receive(self) -> object:
        """The child's next message; None when it has ended, or has sent too many (`flooded`)."""
        while True:
            await trio.lowlevel.checkpoint()  # one that sends without an end does not keep others from their turns
            try:
                return self.receive_nowait()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._line)

    def receive_nowait(self) -> object:
        """As `receive`; raises BlockingIOError when there is none."""
        if self._received >= MOST_MESSAGES:
            self.flooded |= bool(self._line.recv(1, socket.MSG_PEEK))
            self._line.shutdown(socket.SHUT_RD)
            return None
        data = self._line.recv(_MESSAGE_SIZE)
        self._received += 1
        message = _decoded(data) if data else None
        self._has_explained |= isinstance(message, Exception)
        return message

    async def wait_end(self) -> str:
        """How it died, once `receive` has given None: "was ended by SIGKILL"; empty where it ended well."""
        while (death := self.reap()) is None:
            await trio.lowlevel.wait_readable(self._pidfd)
        return death

    def reap(self) -> str | None:
        """As `wait_end`; None where it has not ended."""
        found, status = os.waitpid(self._pid, os.WNOHANG)
        if not found:
            return None
        self._ended = True
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"was ended by {names.get(-code, f'signal {-code}')}"
        return f"ended with status {code}" if code else ""

    def memory(self) -> int:
        """Bytes of memory that are its own, neither of files nor shared, as a guest's RAM is; 0 where it has ended."""
        try:
            status = Path(f"/proc/{self._pid}/status").read_bytes()  # its name is what it likes, in any bytes
        except OSError:
            return 0
        return sum(int(kilobytes) << 10 for kilobytes in _OWN_MEMORY.findall(status))

    def kill(self) -> None:
        """By SIGKILL, if it has not ended; `reap` says when it has."""
        if not self._ended:
            os.kill(self._pid, signal.SIGKILL)

    def tell_to_end(self) -> None:
        """By SIGTERM, which reaches a device that does not yield, and by our end of file, which is only for `Line`."""
        if not self._ended:
            os.kill(self._pid, signal.SIGTERM)
        self.hang_up()

    def hang_up(self) -> None:
        """Let it end, by our end of file alone."""
        self._line.shutdown(socket.SHUT_WR)

    def end(self, deadline: float) -> str:
        """Wait until it has ended; what is left of it at the ``deadline`` of ``time.monotonic`` is killed.

        Gives how it died, as `wait_end` does: empty where it has ended well, or had sent an exception that says why. A
        process that waits in the kernel for a request to a hung disk may not end even so: that is said, too.
        """
        death: str | None = "" if self._ended else None
        killed = False
        waiting = select.poll()
        for fd in (self._line.fileno(), self._pidfd):
            waiting.register(fd, select.POLLIN)
        while death is None:
            ready = dict(waiting.poll(max(0, deadline - time.monotonic()) * 1000))
            death = self.reap()
            if death is None and self._line.fileno() in ready:
                self._received += 1
                if not self._line.recv(_MESSAGE_SIZE) or self._received > MOST_MESSAGES:
                    waiting.unregister(self._line)  # it has nothing more to do but to end
                    deadline = min(deadline, time.monotonic() + _LAST_S)
            elif death is None and not ready and killed:
                death = f"cannot be ended: the kernel waits for a request that the host does not end (pid {self._pid})"
            elif death is None and not ready:
                os.kill(self._pid, signal.SIGKILL)
                killed = True
                deadline = time.monotonic() + _LAST_S
        self.close()
        return "" if self._has_explained else death


def _encoded(message: object) -> bytes:
    if isinstance(message, ConfigError):
        kind = "device" if isinstance(message, DeviceError) else "config"
        notes = "\n".join(getattr(message, "__notes__", ()))[-_MOST_CHARACTERS:]
        message = {"error": kind, "text": str(message)[:_MOST_CHARACTERS], "notes": notes}
    return json.dumps(message).encode()


def _decoded(data: bytes) -> object:
    """JSON, since who has taken over a child must not get at the parent by what it says (as with pickle)."""
    try:
        message = json.loads(data)
        if not isinstance(message, dict) or "error" not in message:
            return message
        kind = DeviceError if message["error"] == "device" else ConfigError
        error = kind(str(message["text"]))
        error.add_note(str(message["notes"]))
        return error
    except (ValueError, KeyError, RecursionError):
        return ConfigError(f"its process sends what is no message: {quoted(data[:100])}")


def _run(work: Callable[[Line], int], line: socket.socket) -> None:
    """Never returns: what the parent would do next, and at its exit, is not for a child."""
    status = 1
    try:
        status = work(Line(line))
    except BaseException:
        traceback.print_exc()
    try:
        flush()
        flush_stderr()
    finally:
        os._exit(status)
