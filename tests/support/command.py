"""The command ``vfiouser-virtio`` as a process of its own, as its users have it."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

import vfiouser_virtio

# It does not outlive the test run, even if that is killed.
COMMAND = (sys.executable, str(Path(__file__).with_name("launcher.py")), str(os.getpid()))
# Far more than it ever takes, on a machine that does ten other things.
PATIENCE = 150

_READY = re.compile(rb'^(ready \d+|.*"event": "ready".*)\n', re.MULTILINE)


def environment(**more: str) -> dict[str, str]:
    """The package is found from any folder, even where it is not installed."""
    kept = {key: value for key, value in os.environ.items() if key not in ("LISTEN_FDS", "NOTIFY_SOCKET")}
    return {**kept, "PYTHONPATH": str(Path(vfiouser_virtio.__file__).parents[1]), **more}


def run_command(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


class Process:
    """As trio's, but started by this thread: what ends with its parent ends with the thread that has started it."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self._process = subprocess.Popen(command, **options)
        self.pid = self._process.pid
        self.send_signal, self.terminate, self.kill = (
            self._process.send_signal,
            self._process.terminate,
            self._process.kill,
        )
        self.stdout = None
        if (stdout := self._process.stdout) is not None:
            with stdout:
                self.stdout = trio.lowlevel.FdStream(os.dup(stdout.fileno()))

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    async def wait(self) -> int:
        while (status := self._process.poll()) is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        return status


@dataclass
class ServeProcess:
    process: Process
    lines: list[str]
    """Of stdout, up to the one with ``ready``."""
    log: Path
    """Its stderr."""

    @property
    def sockets(self) -> list[str]:
        return [line.split(" ", 3)[3] for line in self.lines if line.startswith("device ")]

    async def wait(self) -> int:
        """Its exit status."""
        with trio.fail_after(PATIENCE):
            return await self.process.wait()

    async def terminate(self) -> int:
        self.process.terminate()
        return await self.wait()


@asynccontextmanager
async def serve_process(
    *arguments: str,
    folder: Path,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    stderr: int | None = None,
    command: Sequence[str] = COMMAND,
) -> AsyncIterator[ServeProcess]:
    """``serve`` at work in ``folder``, from its ``ready`` line on; killed in the end if nobody has ended it.

    Its ``stderr`` goes to `ServeProcess.log`, or to a file descriptor.
    """
    if "--supervise" in arguments and "--hang-after" not in arguments:
        # A process for which a busy machine has had no time for a while is not to be taken for hung.
        arguments = (*arguments, "--hang-after", str(PATIENCE))
    # Where its sockets are: one that is killed cannot remove them, any other does.
    with tempfile.TemporaryDirectory(prefix="run-") as runtime:
        # Beside the folder, whose content some tests look at.
        log = folder.with_name(f"{folder.name}.log")
        with log.open("wb") as file:
            process = Process(
                [*command, "serve", *arguments],
                cwd=folder,
                env=environment(**{"XDG_RUNTIME_DIR": runtime, **(env or {})}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file if stderr is None else stderr,
                pass_fds=pass_fds,
            )
        assert process.stdout is not None
        async with process.stdout:
            try:
                output = b""
                with trio.fail_after(PATIENCE):
                    while not _READY.search(output):
                        received = await process.stdout.receive_some()
                        assert received, f"it ended: {log.read_text()}"
                        output += received
                yield ServeProcess(process, output.decode().splitlines(), log)
            finally:
                with trio.CancelScope(shield=True):
                    process.terminate()
                    with trio.move_on_after(10):
                        await process.wait()
                    process.kill()
                    await process.wait()
        left = os.listdir(runtime)
        assert left == [] or process.returncode is None or process.returncode < 0, f"it has left {left}"
