"""Process of a device as its keeper sees it: one of perhaps many, one after the other."""

import select
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from vfiouser_virtio.fds import close_all, may_wait
from vfiouser_virtio.serving.child_process import ChildProcess, Line
from vfiouser_virtio.serving.keeper.attendant import ENDING, MOST, PING, PONG, RESUME, RESUMED
from vfiouser_virtio.serving.keeper.errors import RelayError


@dataclass(frozen=True, slots=True)
class Beginning:
    """Start of a process of the device: what it begins with."""

    clients: socket.socket
    """Brings connections: see `attendant.RelayedListener`."""
    pulse: socket.socket
    """See `attendant.attendant`."""
    journal: int
    """A memfd: see `supervision.journal`."""
    notifications: tuple[int, ...]
    """Eventfds of its queues."""
    resuming: bool
    """It goes on where another one has died."""
    given_up: bool
    """It stands in for a device that dies again and again."""


ENDED = "ended"
"""Key of the last message of a process that has come to its end, and so has not died; the value is its exit status."""

# Messages taken at once of a process that may send without end; the rest waits for the next look.
_AT_ONCE = 64
# How often to look, and how long each time, whether a process that was told to end begins to.
_LOOKS_AT_THE_END, _LOOK_MS = 10, 100
_MOST_DIGITS = 20  # of the number of a question

Work = Callable[[Line, Beginning], int]
"""What a process of the device does; returns its exit status."""


class DeviceProcess:
    """Started process that runs ``work``, in which the file descriptors ``not_for_it`` are closed first.

    Raises OSError where the host has no process or no file descriptor for it.
    """

    def __init__(
        self,
        work: Work,
        *,
        journal: int,
        notifications: Iterable[int],
        resuming: bool,
        given_up: bool,
        not_for_it: Iterable[int],
    ) -> None:
        self.ready = False
        """It serves the device."""
        self.resuming = resuming
        """It has not yet gone on where another one has died."""
        self._resume_asked = self._ending = False
        self._asked = self._answered = 0
        self._deaf: set[int] = set()
        with ExitStack() as opened, ExitStack() as theirs:
            self._clients, clients = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            opened.enter_context(self._clients)
            theirs.enter_context(clients)
            self._pulse, pulse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            opened.enter_context(self._pulse)
            theirs.enter_context(pulse)
            self._clients.setblocking(False)  # one that hangs is not to hold us up
            self._pulse.setblocking(False)
            clients.setblocking(False)
            begin = Beginning(clients, pulse, journal, tuple(notifications), resuming, given_up)

            def begin_work(line: Line) -> int:
                _set_signals()
                # A file that may wait would take a thread to be closed, and no sandbox is entered beside one that waits
                # for ever: such files stay open, and end with the process.
                close_all([fd for fd in not_for_it if not may_wait(fd)])
                close_all([self._clients.detach(), self._pulse.detach()])
                return work(line, begin)

            # By SIGKILL: it is not to write to a disk that another one has by then.
            self._child = ChildProcess(begin_work, with_parent=signal.SIGKILL)
            opened.pop_all()

    def waits_for(self) -> list[int]:
        """File descriptors that become readable when there is something to `hear`, or `reap`."""
        return [fd for fd in (*self._child.fds(), self._pulse.fileno()) if fd not in self._deaf]

    # ---- what it says --------------------------------------------------------------------------------------------

    def hear(self) -> list[object]:
        """Its messages on its line: where it is on the host, what the user has done wrong, `ENDED`.

        Raises RelayError for messages without end.
        """
        heard: list[object] = []
        while self._child.fds()[0] not in self._deaf and len(heard) < _AT_ONCE:
            try:
                message = self._child.receive_nowait()
            except BlockingIOError:
                break
            except ConnectionError:
                message = None
            if message is None:
                self._deaf.add(self._child.fds()[0])
                if self._child.flooded:
                    raise RelayError("messages without end")
            else:
                heard.append(message)
        return heard

    def take_answers(self) -> bool:
        """Take what it has answered to `ask`; whether it has also answered that it has resumed the device.

        Raises RelayError for what answers no question.
        """
        resumed = False
        for _ in range(_AT_ONCE):
            if self._pulse.fileno() in self._deaf:
                break
            try:
                message = self._pulse.recv(MOST)
            except BlockingIOError:
                break
            except ConnectionError:
                message = b""
            if not message:
                self._deaf.add(self._pulse.fileno())
            elif message.startswith(PONG):
                number = message[len(PONG) :]
                if not number.isdigit() or len(number) > _MOST_DIGITS or int(number) > self._asked:
                    raise RelayError(f"it answers {message[:40]!r}, which was not asked")
                self._answered = int(number)
            elif message == ENDING:
                self._ending = True
            elif message == RESUMED and self._resume_asked:
                resumed = True
            else:
                raise RelayError(f"it answers {message[:40]!r}, which was not asked")
        return resumed

    def reap(self) -> str | None:
        """How it has died: "was ended by SIGKILL"; None while it lives."""
        death = self._child.reap()
        return None if death is None else death or "ended without a reason"

    # ---- what it is told -----------------------------------------------------------------------------------------

    @property
    def silent(self) -> bool:
        """Whether it has not answered all that it was asked."""
        return self._answered < self._asked

    def has_answered(self, question: int) -> bool:
        """Whether it has lived after this question of `ask`."""
        return self._answered >= question

    def ask(self) -> int:
        """Ask whether it lives; returns the number of the question, even of one for which there was no room.

        That one is the next to be asked, and has no answer until then.
        """
        question = self._asked + 1
        if self._tell(PING + b"%d" % question):
            self._asked = question
        return question

    def resume(self, why_not: str = "") -> None:
        """Let it go on where the last one has died, or say why not. Only once."""
        if not self._resume_asked:
            self._resume_asked = True
            self._tell(RESUME + why_not.encode())

    def take_client(self, connection: socket.socket, credentials: bytes) -> None:
        """Hand over the connection of a client. Raises OSError where there is no room for a file on its way.

        One that has died is heard of. One that has not taken many others, which have left again, gets no more;
        this connection is closed, once the process answers.
        """
        with suppress(ConnectionError, BlockingIOError):
            socket.send_fds(self._clients, [credentials], [connection.fileno()])

    def _tell(self, message: bytes) -> bool:
        """Whether there was room for it; one that has closed its end, or died, has room for ever."""
        try:
            self._pulse.send(message)
        except ConnectionError:
            return True
        except OSError:
            return False
        return True

    def memory(self) -> int:
        """As `ChildProcess.memory`."""
        return self._child.memory()

    def kill(self) -> None:
        """End it at once."""
        self._child.kill()

    def end(self, deadline: float) -> str:
        """Let it end, and wait for that, as `ChildProcess.end`; one that does not yield is killed at once."""
        with self._clients, self._pulse:
            self._child.hang_up()
            if self._begins_to_end():
                return self._child.end(deadline)
            self.kill()
            return self._child.end(deadline) and "did not yield, and was killed"

    def _begins_to_end(self) -> bool:
        """Whether it yields, and so has heard that it is to end. As with `Pulse`, looks are counted."""
        waiting = select.poll()
        for fd in self.waits_for():
            waiting.register(fd, select.POLLIN)
        for _ in range(_LOOKS_AT_THE_END):
            ready = dict(waiting.poll(_LOOK_MS))
            with suppress(RelayError):
                self.hear()
            with suppress(RelayError):
                self.take_answers()
            if self._ending or self._deaf or self._child.fds()[1] in ready:
                return True
        return False

    def close(self) -> None:
        """Forget about one that has ended."""
        self._clients.close()
        self._pulse.close()
        self._child.close()

    def fds(self) -> list[int]:
        """Its own in the keeper, for the next one to close."""
        return [*self._child.fds(), self._clients.fileno(), self._pulse.fileno()]


def _set_signals() -> None:
    """What signals are for a process of the device: the keeper alone ends it in order.

    SIGTERM, which has come to it alone, is a death like any other: to end in order would show the client that it was
    left. Those that a terminal sends have come to the keeper as well.
    """
    signal.set_wakeup_fd(-1)  # the keeper's is about to be closed
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _ignored)  # SIG_IGN would be inherited by programs that it starts
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def _ignored(*_: object) -> None:
    pass
