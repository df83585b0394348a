"""Child processes that start in milliseconds: forked from a process that has imported everything, and killed at will.

::

    this process ──stdin, stdout: a line of JSON each──▶ nursery ──fork──▶ child: calls a function, and ends

Each child has its output in a file. All of them end with the nursery, and the nursery ends with us.
"""

import faulthandler
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.parent_death import end_with_parent
from vfiouser_virtio.serving.terminal import flush_stderr

# What a child would import; names only, as the command line is above this package.
_IMPORTED = ("vfiouser_virtio.cli.serve", "vfiouser_virtio.devices.blk", "vfiouser_virtio.testing.soak.writer")


@dataclass(eq=False)
class Child:
    """Process that runs, or has ended."""

    pid: int
    log: Path
    """What it prints, to either stream."""
    status: int | None = None
    """Exit status when it has ended; negative for a signal."""
    ended: trio.Event = field(default_factory=trio.Event)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing where it has ended: its number may be another process's."""
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def tell_where(self) -> None:
        """Have it and its children write where they are to the log: of what hangs."""
        for pid in [self.pid, *children_of(self.pid)] if self.status is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        await trio.sleep(1)

    async def wait(self) -> int:
        """The exit status."""
        await self.ended.wait()
        assert self.status is not None
        return self.status

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.send(signal.SIGKILL)
        await self.ended.wait()

    async def kill_children(self) -> None:
        """SIGKILL to those of its children, and theirs, that have none themselves; returns when they are gone."""
        fds: list[int] = []
        for pid in children_of(self.pid) if self.status is None else []:
            with suppress(ProcessLookupError):
                if not children_of(pid):
                    fds.append(os.pidfd_open(pid))
                    os.kill(pid, signal.SIGKILL)
        for fd in fds:
            try:
                await trio.lowlevel.wait_readable(fd)
            finally:
                os.close(fd)

    async def kill_family(self) -> None:
        """SIGKILL to its children, then to it: none of them ends in good order. Returns when all are gone."""
        fds: list[int] = []
        if self.status is None:
            for pid in children_of(self.pid):
                with suppress(ProcessLookupError):
                    fds.append(os.pidfd_open(pid))
                    os.kill(pid, signal.SIGKILL)
        await self.kill()
        for fd in fds:
            try:
                await trio.lowlevel.wait_readable(fd)
            finally:
                os.close(fd)


def children_of(pid: int) -> list[int]:
    """The processes that a process has forked, and their own."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *children_of(child)]
    return found


class Children:
    """All that were started. Made by `children`."""

    def __init__(self, nursery: "subprocess.Popen[bytes]") -> None:
        self._nursery = nursery
        self._children: dict[int, Child] = {}
        self._started: list[tuple[trio.Event, list[Child]]] = []
        self._logs: list[Path] = []
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        self._answers = trio.lowlevel.FdStream(os.dup(nursery.stdout.fileno()))

    async def start(self, function: str, *arguments: Any, log: Path) -> Child:
        """Call ``module:function`` in a new process; its int is the exit status. The arguments pass through JSON."""
        event, child = trio.Event(), list[Child]()
        self._started.append((event, child))
        self._logs.append(log)
        line = json.dumps({"call": function, "arguments": arguments, "log": str(log)})
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(line.encode() + b"\n")  # far less than a pipe holds
        self._nursery.stdin.flush()
        await event.wait()
        return child[0]

    async def run(self) -> None:
        """Take in what the nursery says; a task of `children`."""
        buffer = b""
        try:
            async with self._answers:
                while received := await self._answers.receive_some():
                    *lines, buffer = (buffer + received).split(b"\n")
                    for line in lines:
                        self._heard(json.loads(line))
            raise RuntimeError("the process from which the others are forked has ended")
        finally:
            # They end with it, and nothing tells: who waits for one that it has killed would wait for ever.
            for child in self._children.values():
                child.status = -signal.SIGKILL
                child.ended.set()

    def _heard(self, said: dict[str, int]) -> None:
        if "started" in said:
            event, box = self._started.pop(0)
            child = self._children[said["started"]] = Child(said["started"], self._logs.pop(0))
            box.append(child)
            event.set()
        else:
            child = self._children.pop(said["ended"])
            child.status = os.waitstatus_to_exitcode(said["status"])
            child.ended.set()

    async def end(self) -> None:
        """Kill whatever runs."""
        with trio.CancelScope(shield=True):
            self._nursery.kill()
            while self._nursery.poll() is None:  # noqa: ASYNC110 - it has been killed
                await trio.sleep(0.001)


@asynccontextmanager
async def children() -> AsyncIterator[Children]:
    """Processes, until the end of the block: then they are killed."""
    package = str(Path(__file__).parents[3])
    with subprocess.Popen(  # noqa: ASYNC220 - not in a thread, with which it would end
        [sys.executable, "-m", __name__, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": package},
    ) as process:
        made = Children(process)
        try:
            async with background() as tasks:
                tasks.start_soon(made.run)
                yield made
        finally:
            await made.end()


# ---- in the nursery ------------------------------------------------------------------------------------------------


def _main() -> None:
    end_with_parent(int(sys.argv[1]))
    for name in _IMPORTED:
        importlib.import_module(name)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started us
    signal.set_wakeup_fd(writer)
    buffer = b""
    while True:
        readable, _, _ = select.select([0, reader], [], [])
        if reader in readable:
            os.read(reader, 4096)
        if 0 in readable:
            received = os.read(0, 65536)
            if not received:
                return
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                _say(started=_fork(json.loads(line)))
        _reap()


def _say(**what: int) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _reap() -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            _say(ended=pid, status=status)


def _fork(wanted: dict[str, Any]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 70  # EX_SOFTWARE, where not even the call began
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        end_with_parent(parent)
        os.setsid()
        _redirect(wanted["log"])
        faulthandler.register(signal.SIGUSR1)  # `Child.tell_where`
        status = _call(wanted["call"], wanted["arguments"])
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            flush_stderr()
        os._exit(status)


def _redirect(log: str) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    os.closerange(3, 64)


def _call(name: str, arguments: Sequence[Any]) -> int:
    module, _, function = name.partition(":")
    try:
        return int(getattr(importlib.import_module(module), function)(*arguments) or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70


if __name__ == "__main__":
    _main()
