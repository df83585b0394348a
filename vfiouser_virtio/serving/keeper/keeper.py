"""Keeper process of a device: accepts its clients, relays their messages, and starts its process again.

It has no event loop, no other thread and nothing of the device: so there is little that could make it die, and it may
fork at any time.
"""

import errno
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import ConfigError, PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.serving.child_process import Line
from vfiouser_virtio.serving.keeper.errors import RelayError
from vfiouser_virtio.serving.keeper.process import ENDED, DeviceProcess, Work
from vfiouser_virtio.serving.keeper.relay import Relay
from vfiouser_virtio.serving.keeper.restarts import LONG_LIFE_S, MEMORY_LOOK_S, Pulse, Restarts
from vfiouser_virtio.supervision.journal import make_journal, served
from vfiouser_virtio.vfio_user import Listener

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds from our end to that of the device's process, before it is killed: less than our own parent gives us.
_END_S = 8.0
_CREDENTIALS_SIZE = 12
# Seconds until a process is started again after the host, or our table of files, which a client may fill, had no room.
_NO_ROOM_S = 1.0
_GONE_AGAIN = {errno.EAGAIN, errno.ECONNABORTED, errno.EINTR}


class Keeper:
    """Keeper of the device ``name``, which clients reach at ``listener``; ``work`` is what its processes do.

    ``line`` leads to the parent, which is told where the device is on the host once it is served, or what the user has
    done wrong. With ``once`` there is one client, and then the end. A process that has not answered for ``hang_after``
    seconds is killed; 0: never. So is one that has more than ``max_memory`` bytes of its own; 0: as many as there are.
    """

    def __init__(
        self,
        name: str,
        listener: Listener,
        work: Work,
        line: Line,
        *,
        once: bool,
        hang_after: float,
        max_memory: int = 0,
        notify_by_eventfd: bool = True,
    ) -> None:
        self._name = name
        self._log = DeviceLog(logger, name)
        self._listener = listener
        self._work = work
        self._line = line
        self._once = once or listener.connected
        self._notify_by_eventfd = notify_by_eventfd
        self._poll = select.poll()
        self._watched: dict[int, int] = {}
        self._listening = not listener.connected
        self._relay: Relay | None = None
        self._process: DeviceProcess | None = None
        self._pulse = Pulse(hang_after)
        self._max_memory = max_memory
        self._look_every = self._pulse.look_every or (MEMORY_LOOK_S if max_memory else 0)
        self._restarts = Restarts()
        self._journal = -1
        self._served = 0
        self._started = 0.0
        self._told_parent = self._explained = self._given_up = False
        self._closed: int | None = None
        """The device's process has closed its end, and this question is whether it lives."""
        self._at = 0.0
        """When to start the next process, or to look whether the one that is there answers."""
        self._status: int | None = None
        self._accepts_at = 0.0
        """When clients are accepted again."""
        self._wakeup, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> int:
        """Keep the device until a signal, the end of the parent, or that of the only client; the exit status."""
        with self._signals():
            if self._listener.connected:
                self._take(self._listener.socket.dup())
            try:
                self._start()
                while self._status is None:
                    self._watch()
                    self._look(dict(self._poll.poll(self._timeout())))
                self._end()
            finally:
                if self._process is not None:
                    self._process.kill()
        return self._status

    # ---- waiting -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Tell the poll object what to wait for; only what has changed costs a system call."""
        wanted = {self._wakeup: select.POLLIN, self._line.fileno(): select.POLLIN}
        if self._listening and time.monotonic() >= self._accepts_at:
            wanted[self._listener.socket.fileno()] = select.POLLIN
        if self._process is not None:
            wanted |= dict.fromkeys(self._process.waits_for(), select.POLLIN)
        if (relay := self._relay) is not None:
            writes = select.POLLOUT if relay.client.queued else 0
            wanted[relay.client.socket.fileno()] = writes | (select.POLLIN if relay.takes_more else 0)
            if relay.device is not None and self._closed is None:
                events = (select.POLLOUT if relay.device.queued else 0) | (select.POLLIN if relay.takes_answers else 0)
                if events:  # with none, its end would be reported again and again
                    wanted[relay.device.socket.fileno()] = events
        if wanted != self._watched:
            for fd in self._watched.keys() - wanted.keys():
                self._poll.unregister(fd)
            for fd, events in wanted.items():
                if self._watched.get(fd) != events:
                    self._poll.register(fd, events)
            self._watched = wanted

    def _timeout(self) -> float | None:
        """Milliseconds until there is something to do without anything having happened; None: never."""
        now = time.monotonic()
        times = [self._accepts_at] if self._accepts_at > now else []
        if self._process is None or (self._look_every and self._is_watched(self._process)):
            times.append(self._at)
        return max(0.0, min(times) - now) * 1000 if times else None

    def _look(self, ready: dict[int, int]) -> None:
        if self._wakeup in ready or self._line.fileno() in ready:
            self._status = 0
            return
        # The device's side first: what it has answered before it died is answered.
        relay = self._relay
        if relay is not None and relay.device is not None and relay.device.socket.fileno() in ready:
            self._from_device(relay)
        if relay is not None and relay is self._relay and relay.client.socket.fileno() in ready:
            self._from_client(relay, ready[relay.client.socket.fileno()])
        if relay is not None and relay is self._relay:
            self._check(relay)
        if self._process is not None and any(fd in ready for fd in self._process.waits_for()):
            self._from_process(self._process)
        if self._listening and self._listener.socket.fileno() in ready:
            self._accept()
        if self._status is None and time.monotonic() >= self._at:
            if self._process is None:
                self._start()
            elif self._is_watched(self._process):
                self._ask(self._process)

    def _is_watched(self, process: DeviceProcess) -> bool:
        """Not the first one before it serves: no client waits for that, and the user sees it."""
        return process.ready or self._told_parent

    # ---- the client ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            client, _address = self._listener.socket.accept()
        except OSError as error:
            if error.errno not in _GONE_AGAIN:  # no room in a table of files
                self._accepts_at = time.monotonic() + _NO_ROOM_S
            return
        if not self._listener.admits(client):
            client.close()
            return
        if self._relay is not None and self._relay.client.peer_hung_up():
            self._client_left(self._relay)
        if self._relay is not None:
            pid = int.from_bytes(_credentials(client)[:4], "little")
            self._log.warning("refused another client, pid %d, while one is being served", pid)
            client.close()
            return
        self._take(client)

    def _take(self, client: socket.socket) -> None:
        self._relay = Relay(client, self._log, notify_by_eventfd=self._notify_by_eventfd)
        if self._once and self._listening:
            self._listening = False
            self._watch()  # before its number is another file's
            self._listener.stop_listening()
        if self._process is not None and self._process.ready:
            self._connect(self._relay, self._process)

    def _from_client(self, relay: Relay, events: int) -> None:
        relay.client.flush_nowait()
        try:
            # One that has gone is not waited for until all that it has sent was served: its end is reported till then.
            if (not relay.from_client()) if relay.takes_more else events & (select.POLLHUP | select.POLLERR):
                self._client_left(relay)
        except PeerError as error:
            self._log.warning("%s; connection closed", error)
            self._client_left(relay)

    def _check(self, relay: Relay) -> None:
        """Part with one that waits for a message which cannot come: mostly there was no room for its files."""
        if failure := relay.client_failure:
            self._log.warning("no more can be said to the client (%s); connection closed", failure)
            self._client_left(relay)
        elif relay.device_failure and self._process is not None and self._closed is None:
            self._log.error("no more can be said to its process (%s), and it is killed", relay.device_failure)
            self._closed = -1
            self._process.kill()

    def _client_left(self, relay: Relay) -> None:
        """It is gone, or must go; so is its device's state, but for what the process knows."""
        self._relay = None
        self._watch()
        if relay.close():
            self._log.warning("the client went in the middle of a message")
        self._log.summarize()
        self._log.forget()
        if self._once and (self._process is None or not self._process.ready):
            self._status = 0  # no process is there that could say so
        elif self._given_up and not self._once:
            self._given_up, self._restarts = False, Restarts()  # the next client may have better luck
            if self._process is not None:
                self._process.kill()
        elif self._process is not None and self._process.resuming:
            self._process.resume("its client has left")

    # ---- the device's process ------------------------------------------------------------------------------------

    def _start(self) -> None:
        try:
            self._process = self._started_process()
        except OSError as error:
            if self._told_parent:
                self._log.error("no process for it: %s; tried again in %g s", error.strerror, _NO_ROOM_S)
                self._at = time.monotonic() + _NO_ROOM_S
            else:
                self._line.send(ConfigError(f"{self._name}: no process for it: {error.strerror}"))
                self._status = 1
            return
        self._closed = None
        self._started = time.monotonic()
        self._at = self._started + self._look_every
        self._pulse.look(silent=False)

    def _started_process(self) -> DeviceProcess:
        relay = self._relay
        resuming = relay is not None and relay.begun
        if not resuming:
            old, self._journal = self._journal, -1
            close_all([old] if old >= 0 else [])
            self._journal, self._served = make_journal(), 0
        ours = [self._wakeup, self._woken, self._line.fileno()]
        if self._listening or self._listener.connected:
            ours.append(self._listener.socket.fileno())
        with _blocked():
            return DeviceProcess(
                self._work,
                journal=self._journal,
                notifications=() if relay is None else relay.notifications,
                resuming=resuming,
                given_up=self._given_up,
                not_for_it=ours if relay is None else [*ours, *relay.fds()],
            )

    def _connect(self, relay: Relay, process: DeviceProcess) -> None:
        """Give the client to the device's process."""
        with ExitStack() as opened:
            try:
                ours, theirs = socket.socketpair()
                opened.enter_context(theirs)
                opened.enter_context(ours)
                process.take_client(theirs, _credentials(relay.client.socket))
            except OSError as error:
                self._log.error("no connection to its process: %s; another one is started", error.strerror)
                process.kill()
                return
            theirs.close()
            opened.pop_all()
        relay.attach(ours, self._journal)
        self._closed = None
        self._go_on(relay, process)

    def _from_device(self, relay: Relay) -> None:
        assert relay.device is not None
        assert self._process is not None
        relay.send_requests()
        if not relay.takes_answers:
            return
        try:
            more = relay.from_device()
        except RelayError as error:
            self._distrust(self._process, error)
            return
        if more is False:
            # It has died, or closed the connection because of what the client did: only one that lives answers.
            self._closed = self._process.ask()
        else:
            self._go_on(relay, self._process)

    def _distrust(self, process: DeviceProcess, error: RelayError) -> None:
        """Kill one that is not in its right mind."""
        self._log.error("its process has sent what it cannot mean, and is killed: %s", error)
        self._closed = -1
        process.kill()

    def _go_on(self, relay: Relay, process: DeviceProcess) -> None:
        """Bring the process one step nearer to where the last one was."""
        if not relay.was_told():
            return
        if process.resuming:
            process.resume(self._restarts.why_not_resume)
        else:
            relay.go_on()

    def _from_process(self, process: DeviceProcess) -> None:
        try:
            self._heard(process)
            if process.take_answers():
                process.resuming = False
                if self._relay is not None and self._relay.was_told():
                    self._relay.go_on()
        except RelayError as error:
            self._distrust(process, error)
        if self._closed is not None and self._closed >= 0 and process.has_answered(self._closed):
            self._closed = None
            if self._relay is not None:
                self._client_left(self._relay)
        death = process.reap()
        if death is not None:
            with suppress(RelayError):
                self._heard(process)  # its last word may be that this is no death
            self._died(process, death)

    def _heard(self, process: DeviceProcess) -> None:
        for message in process.hear():
            if isinstance(message, dict):
                if self._may_end():
                    status = message.get(ENDED)
                    self._status = status if isinstance(status, int) and 0 <= status < 256 else 1
            elif not isinstance(message, ConfigError):
                if process.ready:
                    continue
                process.ready = True
                self._at = 0.0
                if not self._told_parent:
                    self._told_parent = True
                    self._line.send(message)
                if self._relay is not None:
                    self._connect(self._relay, process)
            elif self._told_parent:
                self._log.error("cannot be started again: %s", message)
            elif not self._explained:
                self._explained = True
                self._line.send(message)

    def _may_end(self) -> bool:
        """Whether a process may have come to its end: only after the last client, or one whose connection it closed."""
        if not self._once or self._listening:
            return False
        relay = self._relay
        return (
            relay is None or relay.client.peer_hung_up() or (relay.device is not None and relay.device.peer_hung_up())
        )

    def _died(self, process: DeviceProcess, death: str) -> None:
        self._process = None
        self._watch()
        process.close()
        relay = self._relay
        if relay is not None:
            relay.detach()
        if self._status is not None:
            return
        if not self._told_parent or (self._once and not self._listening and relay is None):
            if not self._explained:
                self._log.error("its process %s", death)
            self._status = 1
            return
        total = served(self._journal)
        progress = total != self._served or time.monotonic() - self._started > LONG_LIFE_S
        self._served = total
        delay = self._restarts.died(served=progress)
        if self._restarts.hopeless and not self._given_up:
            self._given_up = True
            self._log.error(
                "its process %s: %s; it is given up, and its driver is told", death, self._restarts.why_not_resume
            )
        else:
            wait = f" in {delay:.1f} s" if delay else ""
            self._log.error("its process %s; another one is started%s", death, wait)
        self._at = time.monotonic() + delay

    def _ask(self, process: DeviceProcess) -> None:
        self._at = time.monotonic() + (self._look_every or 3600)
        if self._max_memory and (memory := process.memory()) > self._max_memory:
            had, limit = memory / 2**20, self._max_memory / 2**20
            self._log.error("its process has %.1f MiB of memory, and is killed: --max-memory is %.1f MiB", had, limit)
            process.kill()
        elif self._pulse.look(silent=process.silent or not process.ready, begins=not process.ready):
            looks = Pulse.LOOKS if process.ready else Pulse.LOOKS_AT_THE_BEGINNING
            what, seconds = "answered" if process.ready else "begun to serve", looks * self._pulse.look_every
            self._log.error("its process hangs: it has not %s for %g s, and is killed", what, seconds)
            self._pulse.look(silent=False)
            process.kill()
        elif process.ready and not process.silent and self._pulse.look_every:
            process.ask()

    # ---- the end -------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and (death := process.end(time.monotonic() + _END_S)):
            self._log.error("its process %s", death)
        if self._relay is not None:
            self._relay.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Block in which a signal wakes the loop up. Those that are blocked before are so again in a forked process."""
        before = {number: signal.signal(number, _noted) for number in _SIGNALS}
        wakeup = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
            for number, handler in before.items():
                signal.signal(number, handler)


def _noted(*_: object) -> None:
    """The wake-up file descriptor has said it already."""


@contextmanager
def _blocked() -> Iterator[None]:
    """Block in which signals wait: what is forked in it begins with them blocked, and does not end in our handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _credentials(client: socket.socket) -> bytes:
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS_SIZE)
