"""``python -m vfiouser_virtio.testing.soak``: what scripts/soak runs."""

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import trio

from vfiouser_virtio import vm
from vfiouser_virtio.background import background
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.testing.soak.children import Children, children
from vfiouser_virtio.testing.soak.kills import PLANS, KilledDisk
from vfiouser_virtio.testing.soak.linux import LinuxGuests
from vfiouser_virtio.testing.soak.report import SoakReport
from vfiouser_virtio.testing.soak.servers import SERVERS, VisitedServer

PARTS = ("disks", "servers", "linux")
_FLUSHES = 2000
"""Of one disk; then comes the next one, with a file of its own."""
_EPILOG = """\
parts, all at the same time:
  disks    guests that write numbered blocks and flush them; guest, server or both are killed (SIGKILL) at any moment
  servers  devices of all types, honest ones and ones with faults (docs/evil.md), visited by good drivers, by ones that
           leave in the middle of something or of a message, by hostile ones; they must neither end nor grow
  linux    Linux guests in QEMU with disk, console, entropy and network, killed at any moment, at times with the server

examples:
  scripts/soak --minutes 10                      a short one; the report is printed
  nice scripts/soak --hours 8 --report soak.md --json soak.json
  scripts/soak --minutes 5 --only disks --seed 7

exit status: 0 nothing was found; 1 something was, it is in the report; 2 for a mistake of yours; 130 after Ctrl-C or
SIGTERM, with the report so far
"""


def main(arguments: list[str] | None = None) -> int:
    """See ``_EPILOG``."""
    parser = argparse.ArgumentParser(
        "scripts/soak",
        description="Put devices under load, faults and kills for as long as wanted; report what is lost or grows.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hours", type=_positive, default=0.0, help="how long")
    parser.add_argument("--minutes", type=_positive, default=0.0, help="how long, in addition; default 10 in all")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part only (may be repeated)")
    parser.add_argument(
        "--seed", type=int, help="of what happens, as far as it is chance of ours; default: by the clock"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report there as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as JSON")
    options = parser.parse_args(arguments)
    seconds = 3600 * options.hours + 60 * options.minutes or 600
    report = SoakReport(int(time.time()) if options.seed is None else options.seed)
    try:
        for path in filter(None, (options.report, options.json)):
            path.touch()  # rather now than after eight hours
    except OSError as error:
        print(f"scripts/soak: {error}", file=sys.stderr)
        return 2
    parts = options.only or PARTS
    if "linux" in parts and (lacking := _lacking()):
        print(f"scripts/soak: {lacking}", file=sys.stderr)
        return 2
    print(f"seed {report.seed}, {seconds / 60:g} minutes", flush=True)
    started = time.monotonic()
    interrupted = False
    try:
        trio.run(partial(_soak, report, parts, lambda: time.monotonic() > started + seconds))
    except BaseException as error:
        found = [each for each in leaves(error) if not isinstance(each, trio.Cancelled)]
        interrupted = any(isinstance(each, KeyboardInterrupt) for each in found)
        # A mistake of the soak's own, or a full disk: what was found in eight hours is not lost by it.
        failed = [each for each in found if not isinstance(each, KeyboardInterrupt)]
        report.complaints += ["the soak itself: " + "".join(traceback.format_exception(each)) for each in failed]
    report.seconds = time.monotonic() - started
    text = report.as_text()
    print(text)
    if options.report:
        options.report.write_text(text)
    if options.json:
        options.json.write_text(report.as_json())
    return 130 if interrupted else 1 if report.findings else 0


def _lacking() -> str:
    """What there is not of what the Linux guests need; what can be fetched is, before the time begins."""
    try:
        vm.find_qemu()
        vm.guest_image()
    except ConfigError as error:
        return f"{error}; without Linux guests: --only disks --only servers"
    return ""


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < 10_000:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0, and less than 10000")
    return number


async def _soak(report: SoakReport, parts: Sequence[str], is_over: Callable[[], bool]) -> None:
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        async with children() as processes, background() as watching, trio.open_nursery() as nursery:
            await watching.start(_end_by_sigterm)
            if "disks" in parts:
                nursery.start_soon(_disks, report, processes, folder, is_over)
            if "servers" in parts:
                for index, plan in enumerate(SERVERS):
                    place = folder / f"server-{index}"
                    place.mkdir()
                    server = VisitedServer(processes, place, plan, report.seed)
                    report.servers.append(server.result)
                    nursery.start_soon(server.run, is_over)
            if "linux" in parts:
                nursery.start_soon(_linux, report, processes, folder, is_over)


async def _end_by_sigterm(task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as received:
        task_status.started()
        async for _ in received:
            raise KeyboardInterrupt


async def _disks(report: SoakReport, processes: Children, folder: Path, is_over: Callable[[], bool]) -> None:
    turn = 0
    while not (turn and is_over()):
        plan = PLANS[turn % len(PLANS)]
        place = folder / f"disk-{turn}"
        place.mkdir()
        disk = KilledDisk(processes, place, plan, report.seed + turn, flushes=_FLUSHES)
        try:
            await disk.run(is_over=is_over)
        finally:
            report.add_disk(plan.name, disk.result)
        for each in place.iterdir():
            each.unlink()
        turn += 1


async def _linux(report: SoakReport, processes: Children, folder: Path, is_over: Callable[[], bool]) -> None:
    place = folder / "linux"
    place.mkdir()
    guests = LinuxGuests(processes, place, report.seed)
    report.linux = guests.result
    try:
        while not is_over() and not guests.result.complaints:
            await guests.guest()
    finally:
        await guests.close()


if __name__ == "__main__":
    sys.exit(main())
