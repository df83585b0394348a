"""Linux guest in QEMU: boot it, run commands in it, and see what went wrong when it does not answer."""

import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from typing import Literal

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.vm.accel import choose_accel
from vfiouser_virtio.vm.agent import Agent, AgentClosedError, CommandResult, GuestRebootedError, Output
from vfiouser_virtio.vm.command_line import monitor_arguments, qemu_arguments
from vfiouser_virtio.vm.initramfs import GuestImage
from vfiouser_virtio.vm.kept_output import KeptOutput
from vfiouser_virtio.vm.qemu import Qemu
from vfiouser_virtio.vm.qmp import QmpClient, QmpClosedError

# The first and the last line of Linux's panic().
_PANIC = b"Kernel panic - not syncing"
_PANIC_END = re.compile(rb"---\[ end Kernel panic.*\n")
# How much of the console an error shows.
_LOG_TAIL = 2000
MAX_LOG = 16 << 20
"""Bytes that are kept of the console, the last ones: a guest need not stop."""
# What QEMU may take to end by SIGTERM, in seconds.
KINDNESS_S = 5.0


class VmError(Exception):
    """End of QEMU, panic of the guest's kernel, or a command that failed or timed out. It shows the console."""


class Guest:
    """Running QEMU and the guest in it; made by `boot_guest`."""

    def __init__(
        self, process: subprocess.Popen[bytes], output: KeptOutput, agent: Agent, qmp: QmpClient, serial: socket.socket
    ) -> None:
        self.process = process
        self.agent = agent
        self.qmp = qmp
        self._output = output
        self._serial = trio.SocketStream(trio.socket.from_stdlib_socket(serial))
        self._log = bytearray()
        self._log_grew = trio.Event()

    @property
    def serial_log(self) -> str:
        """What the firmware and the kernel wrote to the first serial port, the last `MAX_LOG` bytes of it."""
        return self._log[-MAX_LOG:].decode(errors="replace")

    @property
    def qemu_stderr(self) -> str:
        """What QEMU itself printed, of much of it the first and the last part."""
        return self._output.text

    async def run(
        self, command: str, *, timeout: float = 60, check: bool = False, output: Output | None = None
    ) -> CommandResult:
        """Run a shell command in the guest. With `check`, a status other than 0 raises VmError.

        With `output`, that gets what the command prints, as it comes: ``await output(1, b"…")``, 2 for standard error.

        Raises VmError when the guest reboots, panics, ends, or does not answer within `timeout` seconds.
        """
        result = None
        with trio.move_on_after(timeout):
            try:
                result = await self.agent.execute(command, output=output)
            except AgentClosedError:
                raise await self.failure(f"no answer to {command!r}") from None
            except GuestRebootedError:
                raise await self.failure(f"the guest rebooted while it ran {command!r}") from None
        if result is None:
            raise await self.failure(f"no answer within {timeout:g} s to {command!r}")
        if check and result.status != 0:
            raise VmError(f"exit status {result.status} of {command!r}:\n{result.output}")
        return result

    async def wait_ready(self, *, timeout: float = 120, new_boot: bool = False) -> None:
        """Wait until commands can be run; with `new_boot`, until the guest has started once more. Raises VmError."""
        with trio.move_on_after(timeout):
            try:
                await self.agent.wait_ready(new_boot=new_boot)
            except AgentClosedError:
                raise await self.failure("the guest did not start") from None
            return
        raise await self.failure(f"the guest did not start within {timeout:g} s")

    async def reboot(self, *, timeout: float = 120) -> None:
        """Type `reboot` in the guest and wait until it is up again. Raises VmError when it does not come back."""
        await self._execute_last("reboot")
        await self.wait_ready(timeout=timeout, new_boot=True)

    async def poweroff(self, *, timeout: float = 60) -> int:
        """Type `poweroff` in the guest and wait for QEMU's end; gives its exit status. Raises VmError when it stays."""
        await self._execute_last("poweroff")
        return await self.wait_exit(timeout=timeout)

    async def wait_exit(self, *, timeout: float = 60) -> int:
        """Wait for QEMU's end; gives its exit status, negative for a signal. Raises VmError after `timeout` seconds."""
        with trio.move_on_after(timeout):
            return await self._wait_process()
        raise await self.failure(f"QEMU did not end within {timeout:g} s")

    async def wait_serial(self, text: str, *, timeout: float = 60) -> None:
        """Wait until `text` is on the first serial port. Raises VmError after `timeout` seconds, or when QEMU ends."""
        with trio.move_on_after(timeout):
            while text.encode() not in self._log:
                if self.process.poll() is not None:
                    break
                await self._log_grew.wait()
            else:
                return
        raise await self.failure(f"{text!r} did not come on the serial port")

    def kill(self) -> None:
        """Kill QEMU as a crash would (SIGKILL)."""
        self.process.kill()

    async def _execute_last(self, command: str) -> None:
        try:
            await self.agent.execute(command, answers=False)
        except AgentClosedError:
            raise await self.failure(f"cannot run {command!r}") from None

    async def failure(self, what: str) -> VmError:
        """An error that says why, as far as can be seen from outside."""
        if _PANIC in self._log:
            what += ": the guest's kernel panicked"
            # What it says about that is still on its way.
            with trio.move_on_after(2):
                while not _PANIC_END.search(self._log):
                    await self._log_grew.wait()
        else:
            # The sockets close some moments before the process is gone.
            with trio.move_on_after(1):
                what += f": QEMU ended with status {await self._wait_process()}"
        # The panic's first line says most, and a long trace comes after it.
        start = max(0, len(self._log) - _LOG_TAIL)
        if (panic := self._log.find(_PANIC)) >= 0:
            start = min(start, panic)
        console = self._log[start:].decode(errors="replace").strip()
        parts = [what, self.qemu_stderr.strip(), f"--- the guest's console:\n{console}" if console else ""]
        return VmError("\n".join(part for part in parts if part))

    async def _wait_process(self) -> int:
        while (status := self.process.poll()) is None:
            try:
                pidfd = os.pidfd_open(self.process.pid)
            except ProcessLookupError:
                continue
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        return status

    async def pump_serial(self) -> None:
        """Keep the console's text until QEMU closes it; a task of `boot_guest`."""
        while received := await self._receive_serial():
            self._log += received
            if len(self._log) > 2 * MAX_LOG:
                del self._log[:-MAX_LOG]
            if _PANIC in self._log[-len(received) - len(_PANIC) :]:
                # It will never answer again: nothing has to wait for a time limit.
                self.agent.shut_down()
            self._log_grew.set()
            self._log_grew = trio.Event()
        self._log_grew.set()

    async def _receive_serial(self) -> bytes:
        try:
            return bytes(await self._serial.receive_some())
        except trio.BrokenResourceError:
            return b""

    async def end(self) -> None:
        """Make QEMU end, kindly first."""
        self.process.terminate()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(KINDNESS_S):
                await self._wait_process()
            self.process.kill()
            await self._wait_process()

    def close(self) -> None:
        """Close the sockets to QEMU, when no task uses them any more."""
        self.agent.close()
        self.qmp.close()
        self._serial.socket.close()


@asynccontextmanager
async def boot_guest(
    qemu: Qemu,
    image: GuestImage | None,
    *,
    devices: Sequence[str | Mapping[str, object]] = (),
    memory: Literal["shared", "private"] = "shared",
    memory_size: str = "512M",
    cpus: int = 1,
    machine: str = "q35",
    append: str = "",
    accel: str = "auto",
    extra_args: Sequence[str] = (),
    shell: bool = False,
    wait_ready: bool = True,
    ready_timeout: float = 120,
) -> AsyncIterator[Guest]:
    """Run a guest for as long as the block runs, and enter the block when its agent answers.

    `devices` are arguments of -device, as QEMU's text or as mappings (given as JSON). `append` is added to the kernel's
    command line; `root=/dev/vda rw` makes a disk the root (see `build_root_tree`). With `image` None QEMU boots by its
    firmware from the devices, and has no agent. `shell` gives the terminal to a shell in the guest. `accel` is auto,
    kvm or tcg. There is no network and no other device than the machine's own.
    Raises ConfigError for a choice that cannot be, VmError when QEMU or the guest does not start.
    """
    chosen = "tcg" if image is None and accel == "auto" else accel
    if image is not None:
        chosen = await trio.to_thread.run_sync(choose_accel, qemu, image, accel)
    arguments = qemu_arguments(
        image,
        devices=devices,
        memory=memory,
        memory_size=memory_size,
        cpus=cpus,
        machine=machine,
        append=append,
        accel=chosen,
        shell=shell,
    )
    with (
        KeptOutput() as output,
        closing(_start(qemu, [*arguments, *extra_args], output, shell=shell)) as guest,
    ):
        async with background() as tasks:
            tasks.start_soon(output.keep_trimmed)
            tasks.start_soon(guest.pump_serial)
            tasks.start_soon(guest.qmp.run)
            try:
                try:
                    await guest.qmp.negotiate()
                except QmpClosedError:
                    raise await guest.failure("QEMU did not start") from None
                if image is not None and wait_ready:
                    await guest.wait_ready(timeout=ready_timeout)
                yield guest
            finally:
                await guest.end()


def _start(qemu: Qemu, arguments: list[str], output: KeptOutput, *, shell: bool) -> Guest:
    """Start QEMU, its monitor and serial ports on socket pairs: they have no path that could be in use or too long."""
    qmp, qemu_qmp = socket.socketpair()
    console, qemu_console = socket.socketpair()
    agent, qemu_agent = socket.socketpair()
    command = qemu.command(arguments)
    command += ["-chardev", f"socket,id=qmp,fd={qemu_qmp.fileno()}", *monitor_arguments(qemu.version, "qmp", "control")]
    if shell:
        # Ctrl-A x ends QEMU, Ctrl-A c shows its monitor.
        command += [
            "-chardev",
            "stdio,id=console,mux=on,signal=off",
            *monitor_arguments(qemu.version, "console", "readline"),
        ]
    else:
        command += ["-chardev", f"socket,id=console,fd={qemu_console.fileno()}"]
    command += ["-serial", "chardev:console"]
    command += ["-chardev", f"socket,id=agent,fd={qemu_agent.fileno()}", "-serial", "chardev:agent"]
    with qemu_qmp, qemu_console, qemu_agent:
        process = subprocess.Popen(
            command,
            env=qemu.environment,
            stdin=None if shell else subprocess.DEVNULL,
            stdout=None if shell else output.fd,
            stderr=output.fd,
            pass_fds=[qemu_qmp.fileno(), qemu_console.fileno(), qemu_agent.fileno()],
        )
    return Guest(process, output, Agent(agent), QmpClient(qmp), console)
