"""One case in one guest: ``python -m evil_matrix.one SUITE SECONDS CASE`` prints its result as JSON.

The device is plugged in when the guest is up: so its kernel is there to be asked, whatever the device does to it, and
no firmware has touched the device before.
"""

import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from evil_matrix.cases import EvilCase, parse_case
from evil_matrix.classify import NO_ANSWER, CaseVerdict, Outcome, Seen, classify
from evil_matrix.exercises import EXERCISES, GuestExercise
from evil_matrix.results import CaseResult
from vfiouser_virtio import Device, serve, vm
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults.pci import FaultyPci
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.vm.qmp import QmpClosedError, QmpError

if TYPE_CHECKING:
    from vfiouser_virtio.serving.device_kinds import AnyFunction

# A device that hangs a CPU leaves the other one to tell of it. What takes long on a busy host is no stall of Linux's.
_CPUS = 2
_APPEND = "rcupdate.rcu_cpu_stall_suppress=1 nosoftlockup"
_PORT = "pcie-root-port,id=port{0},chassis={0},slot={0}"
# The guest may be busy with what the device does to it.
_ANSWER_S = 60

# The name and the stack of each task that waits in the kernel: of the exercise, or uninterruptibly; what the CPUs do.
_WHERE = r"""
for kind in exercise others; do
    for task in /proc/[0-9]*; do
        read -r _ _ state _ <$task/stat && name=$(cat $task/comm) || continue
        case $kind:$state:$(tr '\0' ' ' <$task/environ) in
            *:R:*) ;; # what it does is seen of its CPU
            exercise:*EXERCISE=1*) echo "== $name"; cat $task/stack ;;
            others:*EXERCISE=1*) ;;
            others:D:*) echo "== $name"; cat $task/stack ;;
        esac
    done
done 2>/dev/null
dmesg -cr >/tmp/kernel
echo l >/proc/sysrq-trigger
sleep 1
dmesg | awk '/NMI backtrace for cpu/ && !/skipped|idling/ { print "== a CPU" } /RIP: 0010:| [a-z_0-9.]+\+0x/'
"""


@asynccontextmanager
async def a_guest(suite: str, neighbour: str, ports: int = 1) -> AsyncIterator[vm.Guest]:
    """A guest with that kernel, its honest device, and so many ports to plug others in: ``port1`` is the first.

    Raises VmError where the honest device does not work.
    """
    more = [word for number in range(1, ports + 1) for word in ("-device", _PORT.format(number))]
    async with (
        serve(neighbour) as served,
        vm.boot_guest(
            vm.find_qemu(),
            vm.guest_image(suite),
            devices=served.qemu_devices,
            cpus=_CPUS,
            append=_APPEND,
            extra_args=more,
        ) as guest,
    ):
        yield guest


async def run_case(case: EvilCase, suite: str, seconds: float) -> CaseResult:
    """Run a case in a guest with that kernel; ``seconds`` is what its exercise may take."""
    started = time.monotonic()
    exercise = EXERCISES[case.device]
    # The device goes after the guest: a QEMU whose server has gone is no use.
    async with plugged(case) as device, a_guest(suite, exercise.neighbour) as guest:
        return await run_in(guest, "port1", device, suite, seconds, started)


@dataclass(frozen=True, slots=True)
class EvilDevice:
    """Device of a case, which is served."""

    case: EvilCase
    qemu_device: Mapping[str, object]
    function: "AnyFunction"
    expected: str
    """What is in the guest's /tmp/expected."""
    folder: Path


@asynccontextmanager
async def plugged(case: EvilCase) -> AsyncIterator[EvilDevice]:
    """The device of a case, served and ready to be plugged in."""
    exercise = EXERCISES[case.device]
    with tempfile.TemporaryDirectory(prefix="evil-") as folder:
        expected = exercise.expected(Path(folder))
        words = [exercise.device.format(folder=folder), *case.options.split()]
        words += [f"fault={fault}" for fault in case.faults] + ["fault-seed=1"] * bool(case.faults)
        async with serve(",".join(words)) as served:
            yield EvilDevice(case, served.qemu_devices[0], served.functions[0], expected, Path(folder))


async def run_in(
    guest: vm.Guest, port: str, device: EvilDevice, suite: str, seconds: float, started: float
) -> CaseResult:
    """Run a case in a guest that is there; its device stays plugged in."""
    verdict, neighbour = await _exercise(guest, port, device, seconds)
    function = device.function
    happened = function.faults.log.faults if isinstance(function, FaultyPci) else 0
    version = vm.guest_image(suite).kernel.version
    taken = round(time.monotonic() - started, 1)
    return CaseResult(
        device.case.id, suite, version, verdict.outcome.value, verdict.warned, neighbour, happened, verdict.said, taken
    )


async def _exercise(guest: vm.Guest, port: str, device: EvilDevice, seconds: float) -> tuple[CaseVerdict, bool]:
    """Plug the device in, have the guest exercise it, and see what has come of both devices."""
    exercise = EXERCISES[device.case.device]
    if not await _neighbour_works(guest, exercise):
        raise vm.VmError(f"the guest's other device, {exercise.neighbour}, does not work without any fault")
    await guest.run("rm -rf /tmp/*; dmesg -c >/dev/null", check=True)
    await guest.run(_file("expected", device.expected) + _file("exercise", exercise.whole_script), check=True)
    try:
        with trio.move_on_after(_ANSWER_S) as scope:
            await guest.qmp.execute("device_add", **{**device.qemu_device, "bus": port, "id": f"in-{port}"})
        if scope.cancelled_caught:
            return CaseVerdict(Outcome.REFUSED, False, (f"QEMU itself hangs in device_add, for {_ANSWER_S} s",)), False
    except QmpError as error:
        return CaseVerdict(Outcome.REFUSED, False, (str(error),)), await _neighbour_works(guest, exercise)
    except QmpClosedError as error:
        return CaseVerdict(Outcome.REFUSED, False, (f"QEMU ends: {error}", *_tail(guest.qemu_stderr))), False
    async with trio.open_nursery() as nursery:
        if exercise.beside is not None:
            lying = device.function.device
            assert isinstance(lying, Device)
            nursery.start_soon(exercise.beside, lying, device.folder)
        seen = await _watch(guest, seconds)
        nursery.cancel_scope.cancel()
    return classify(seen), await _neighbour_works(guest, exercise)


async def _watch(guest: vm.Guest, seconds: float) -> Seen:
    """Run the exercise for as long as it may take by the guest's clock; a guest that does not answer has hung."""
    script = f"""
EXERCISE=1 setsid sh -c 'sh /tmp/exercise >/tmp/output 2>&1; echo $? >/tmp/.status; mv /tmp/.status /tmp/status' &
now() {{ cut -d. -f1 /proc/uptime; }}
end=$(($(now) + {seconds:.0f}))
until [ -e /tmp/status ] || [ $(now) -ge $end ]; do sleep 0.1; done
cat /tmp/status 2>/dev/null || echo none
"""
    try:
        said = (await guest.run(script, timeout=seconds + _ANSWER_S)).output.split()
        status = int(said[-1]) if said and said[-1].isdigit() else None  # "none"; or out of memory, even for this
        output = (await guest.run("cat /tmp/output", timeout=_ANSWER_S)).output
        stuck = (await guest.run(_WHERE, timeout=_ANSWER_S)).output if status is None else ""
        kernel = (await guest.run("cat /tmp/kernel 2>/dev/null || dmesg -r", timeout=_ANSWER_S)).output
    except vm.VmError:
        # It has said its last words to the console.
        return Seen(None, kernel=guest.serial_log, stuck=f"== {NO_ANSWER}\n")
    return Seen(status, output, kernel, stuck)


async def _neighbour_works(guest: vm.Guest, exercise: GuestExercise) -> bool:
    """Whether the guest's other device answers within some seconds."""
    script = f"""
rm -f /tmp/neighbour
({exercise.check_neighbour} && echo >/tmp/neighbour) >/dev/null 2>&1 &
for i in $(seq 50); do [ -e /tmp/neighbour ] && exit 0; sleep 0.1; done
exit 1
"""
    with suppress(vm.VmError):
        return (await guest.run(script, timeout=_ANSWER_S)).status == 0
    return False


def _file(name: str, content: str) -> str:
    return f"cat >/tmp/{name} <<'END OF FILE'\n{content.rstrip()}\nEND OF FILE\n"


def _tail(text: str) -> list[str]:
    return text.strip().splitlines()[-1:]


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 where the case could not be run at all."""
    suite, seconds, name = arguments
    # QEMU ends with us, whatever it is doing.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    logging.disable()  # what drivers do wrong here is the devices' fault
    case = parse_case(name)
    try:
        result = trio.run(run_case, case, suite, float(seconds))
    except ExceptionGroup as group:
        print(*leaves(group), sep="\n", file=sys.stderr)
        return 1
    except (ConfigError, vm.VmError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
