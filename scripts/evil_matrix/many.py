"""Many cases in one guest: ``python -m evil_matrix.many SUITE SECONDS`` reads cases, a line each, and prints results.

A device is plugged in beside those of the cases before, which the guest has let go of. The guest is given up, and
another one booted, when something is wrong with it, or when it has no port left. A result is a line of JSON, as that of
`evil_matrix.one`; or ``{"error": …}``. With ``"behind"`` come the cases that the guest has had before.
"""

import json
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict

import trio

from evil_matrix.cases import EvilCase, parse_case
from evil_matrix.classify import Outcome
from evil_matrix.exercises import EXERCISES
from evil_matrix.one import EvilDevice, a_guest, plugged, run_in
from evil_matrix.results import CaseResult
from vfiouser_virtio import vm
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.groups import leaves

PORTS = 16
"""Devices that a guest gets."""
_RELEASE_S = 30
# What is plugged in has no driver any more, and gets none: it is reset, and no name of it is left.
_RELEASE = r"""
for device in /sys/bus/pci/devices/0000:*; do
    case ${device##*/} in 0000:00:*) continue ;; esac
    echo none >$device/driver_override
    [ ! -e $device/driver ] || echo ${device##*/} >$device/driver/unbind
done
"""
_SANE = (Outcome.SURVIVES.value, Outcome.ERROR.value, Outcome.WRONG.value)

Plug = Callable[[EvilCase], Awaitable[EvilDevice]]


@asynccontextmanager
async def _devices() -> AsyncIterator[Plug]:
    """What serves the devices of cases until the block ends."""
    over = trio.Event()

    async def keep(case: EvilCase, *, task_status: trio.TaskStatus[EvilDevice]) -> None:
        async with plugged(case) as device:
            task_status.started(device)
            await over.wait()

    async def plug(case: EvilCase) -> EvilDevice:
        device = await nursery.start(keep, case)
        assert isinstance(device, EvilDevice)
        return device

    async with trio.open_nursery() as nursery:
        try:
            yield plug
        finally:
            over.set()


class ManyGuests:
    """Guest for many cases, or several, one after another."""

    def __init__(self, suite: str, seconds: float) -> None:
        self._suite = suite
        self._seconds = seconds
        self._stack = AsyncExitStack()
        self._guest: vm.Guest | None = None
        self._plug: Plug | None = None
        self._neighbour = ""
        self.behind: list[str] = []
        """Cases that the guest has had."""

    async def run(self, case: EvilCase) -> CaseResult:
        """Run a case in the guest that there is, or in another one. Raises VmError, ConfigError, OSError."""
        started = time.monotonic()
        neighbour = EXERCISES[case.device].neighbour
        if neighbour != self._neighbour or len(self.behind) == PORTS:
            await self.close()
        if self._guest is None or self._plug is None:
            # The devices go after the guest: QEMU aborts when it misses one.
            self._plug = await self._stack.enter_async_context(_devices())
            self._guest = await self._stack.enter_async_context(a_guest(self._suite, neighbour, PORTS))
            self._neighbour = neighbour
        guest, device = self._guest, await self._plug(case)
        result = await run_in(guest, f"port{len(self.behind) + 1}", device, self._suite, self._seconds, started)
        self.behind.append(case.id)
        if result.outcome not in _SANE or result.warned or not result.neighbour or not await _released(guest):
            await self.close()
        return result

    async def close(self) -> None:
        """End the guest, then its devices."""
        stack, self._stack, self._guest, self._plug = self._stack, AsyncExitStack(), None, None
        self.behind = []
        await stack.aclose()


async def _released(guest: vm.Guest) -> bool:
    """Have the guest let go of all devices; whether it has, within some time."""
    with suppress(vm.VmError):
        return (await guest.run(_RELEASE, timeout=_RELEASE_S)).status == 0
    return False


async def _serve(suite: str, seconds: float) -> None:
    guests, lines = ManyGuests(suite, seconds), trio.wrap_file(sys.stdin)
    try:
        async for line in lines:
            behind = list(guests.behind)
            try:
                answer = asdict(await guests.run(parse_case(line.strip())))
            except (ConfigError, vm.VmError, OSError) as error:
                await guests.close()
                answer = {"error": str(error)}
            print(json.dumps({**answer, "behind": behind}), flush=True)
    finally:
        await guests.close()


def main(arguments: Sequence[str]) -> int:
    """Until its input ends."""
    suite, seconds = arguments
    # QEMU ends with us, whatever it is doing.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    logging.disable()  # what drivers do wrong here is the devices' fault
    try:
        trio.run(_serve, suite, float(seconds))
    except ExceptionGroup as group:
        print(*leaves(group), sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
