"""``run``: devices, QEMU beside them, and in it the small guest of `vfiouser_virtio.vm` or the user's."""

import argparse
import math
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING

from vfiouser_virtio.cli.arguments import (
    SubParsers,
    add_command,
    add_device_arguments,
    add_serving_arguments,
    audit_of,
    server_of,
)
from vfiouser_virtio.cli.exit_status import OutputError, RunError, TimedOutError, status_of
from vfiouser_virtio.cli.several_guests import MAX_GUESTS, NETWORK, GuestPlace, Output, Rendezvous, one_error
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.device_specs import DeviceSpec, all_specs
from vfiouser_virtio.serving.qemu_command import QemuDevice
from vfiouser_virtio.serving.terminal import note

if TYPE_CHECKING:
    from vfiouser_virtio.cli.audit_report import AuditReport
    from vfiouser_virtio.serving.serve import Serving
    from vfiouser_virtio.serving.signals import EndVerdict
    from vfiouser_virtio.vm import GuestImage, Qemu

# QEMU's options that say what to boot: with one of them after --, the guest is the user's own.
_BOOT_OPTIONS = {
    *("kernel", "initrd", "drive", "blockdev", "cdrom", "hda", "hdb", "hdc", "hdd", "fda", "fdb"),
    *("bios", "pflash", "boot", "sd", "mtdblock", "loadvm", "incoming"),
}

_EXAMPLES = """\
  vfiouser-virtio run --device blk,path=disk.img --device rng       # a shell in the guest; `poweroff` ends it
  vfiouser-virtio run --device blk,size=64M --exec 'mkfs.ext2 /dev/vda && mount /dev/vda /mnt && df /mnt'
  vfiouser-virtio run --device rng --timeout 60 --exec 'head -c 1M /dev/hwrng' >random 2>errors
  vfiouser-virtio run --guests 2 --device net,hub=lan --exec 'test $GUEST = 2 || ping -c 3 guest2'
  vfiouser-virtio run --ids 2007 --device rng --exec 'lspci -nn; head -c 8 /dev/hwrng | hexdump -C'
  vfiouser-virtio run --audit --device blk,size=64M --exec 'dd if=/dev/vda of=/dev/null'   # what its driver does wrong
  vfiouser-virtio run --memory private --device blk,size=64M --exec 'dd if=/dev/vda of=/dev/null bs=64k count=16'
  vfiouser-virtio run --device blk,path=disk.img --memory-size 2G -- -cdrom debian.iso    # a guest of your own
  vfiouser-virtio run --device blk,path=disk.img -- -boot c                              # boot from our disk

QEMU 10.1 or newer is taken from PATH, or from $VFIOUSER_VIRTIO_QEMU, or fetched once into ~/.cache, as is the guest.
With --exec, the exit status is that of the command in the guest; a signal N that ends us makes it 128 + N.
"""


def add_parser(commands: SubParsers) -> None:
    """The parser of this sub-command."""
    parser = add_command(
        commands,
        "run",
        summary="serve devices and run QEMU with them",
        description="Serve devices, run QEMU with them, and end with it. Without a guest of your own after --,\n"
        "a small Linux boots: with a shell on this terminal, or for one command.",
        usage="--device DEVICE[,KEY=VALUE,…] … [options] [-- QEMU options]",
        examples=_EXAMPLES,
    )
    add_device_arguments(parser)
    parser.add_argument(
        "--exec",
        metavar="CMD",
        dest="script",
        help="run this shell command in the guest, and end; what it prints comes at once, on stdout and stderr",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="with --exec: end with status 124 if the command takes longer than this, from its start in the guest on "
        "(default: never); what it has printed until then is kept",
    )
    parser.add_argument(
        "--memory",
        choices=("shared", "private"),
        default="shared",
        help="of the guest: mapped by us (default), or reached through messages only",
    )
    parser.add_argument("--memory-size", default="512M", metavar="SIZE", help="of the guest (default: 512M)")
    parser.add_argument(
        "--guests",
        type=int,
        default=1,
        metavar="N",
        help="with --exec: so many guests, each with all these devices of its own and $GUEST, from 1; with a network "
        f"they are guest1, guest2, … at {NETWORK.format(1)}, …; the command runs in all of them at the same time "
        "(default: 1)",
    )
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="of the guest (default: 1)")
    parser.add_argument(
        "--kernel", metavar="SUITE|FILE", help="of the guest: a Debian suite, or an image (default: trixie)"
    )
    parser.add_argument(
        "--modules",
        default="",
        metavar="NAME[,NAME…]",
        help="kernel modules that the guest loads when it boots, beside the drivers of virtio; with "
        "--kernel trixie:amd64 there are all of Debian's",
    )
    parser.add_argument("--append", default="", metavar="ARGS", help="added to the kernel's command line")
    parser.add_argument(
        "--accel",
        choices=("auto", "kvm", "tcg"),
        default="auto",
        help="auto (default) is KVM where a quick trial shows that it works, else TCG, and TCG for a guest of your own",
    )
    add_serving_arguments(parser, log_level="warning")
    parser.set_defaults(execute=execute, qemu_options=[])


def execute(arguments: argparse.Namespace) -> int:
    """Run the guest; the status of ``--exec``'s command, else 0."""
    specs = all_specs(arguments.config, arguments.device)
    own_guest = _has_own_guest(arguments.qemu_options)
    if own_guest:
        for option, value in (
            ("--exec", arguments.script),
            ("--kernel", arguments.kernel),
            ("--modules", arguments.modules or None),
        ):
            if value is not None:
                raise ConfigError(f"{option} is for the guest that comes with us, not for the one after --")
        if arguments.append:
            raise ConfigError("--append is for the guest that comes with us; give your own -append after --")

    if arguments.memory == "private" and arguments.engine == "libvfio-user":
        raise ConfigError("--memory private: libvfio-user reaches only memory that is shared; use --engine vfio-user")

    if not 1 <= arguments.guests <= MAX_GUESTS:
        raise ConfigError(f"--guests {arguments.guests}: expected 1 to {MAX_GUESTS}")
    if arguments.guests > 1 and arguments.script is None:
        raise ConfigError("--guests is for --exec: they cannot all have this terminal")
    if arguments.script is None:
        _check_terminal(specs)
        if arguments.timeout is not None:
            raise ConfigError("--timeout is for --exec")

    with audit_of(arguments) as audit:
        status = _run_all(specs, arguments, audit, own_guest=own_guest)
    return status if audit is None else audit.status(status)


def _run_all(
    specs: Sequence[DeviceSpec], arguments: argparse.Namespace, audit: "AuditReport | None", *, own_guest: bool
) -> int:
    import trio

    from vfiouser_virtio.serving.signals import GIVE_UP_S, EndVerdict, run_until_signal
    from vfiouser_virtio.vm.guest import KINDNESS_S

    abandoned: list[Callable[[], None]] = []
    verdict = EndVerdict()
    with server_of(arguments, abandoned, audit=audit)(*specs * arguments.guests) as made:
        work = partial(_run, arguments, made, verdict, own_guest=own_guest)
        give_up_after = KINDNESS_S + GIVE_UP_S
        outcome = trio.run(partial(run_until_signal, work, abandoned, give_up_after=give_up_after, verdict=verdict))
    return 128 + outcome if isinstance(outcome, signal.Signals) else outcome


async def _run(
    arguments: argparse.Namespace,
    serving: "AbstractAsyncContextManager[Serving]",
    verdict: "EndVerdict",
    *,
    own_guest: bool,
) -> int:
    """Serve, run the guest, and give the verdict when it has ended: a disk that hangs must not hold up our end."""
    from vfiouser_virtio.vm import VmError

    async with serving as served:
        for endpoint in served.endpoints:
            if endpoint.host_side:
                note(f"{endpoint.name} on the host: {endpoint.host_side}")
        # Only now: a missing disk file is told before any download.
        try:
            if arguments.script is None:
                _say_how_to_leave(served, own_guest=own_guest)
            status = await _run_guests(arguments, served.qemu_devices, own_guest=own_guest)
        except (VmError, ConfigError) as error:
            mistake = error if isinstance(error, (OutputError, TimedOutError)) else RunError(str(error))
            verdict.give(status_of(mistake), mistake)
            raise mistake from error
        verdict.give(status)
        return status


async def _run_guests(arguments: argparse.Namespace, devices: Sequence[QemuDevice], *, own_guest: bool) -> int:
    """All guests, which have the devices in equal parts; the first status that is not 0, if there is one."""
    import trio

    from vfiouser_virtio.vm import find_qemu, guest_image

    image = None
    try:
        qemu = await trio.to_thread.run_sync(find_qemu, abandon_on_cancel=True)
        if not own_guest:
            wanted = [name.strip() for name in arguments.modules.split(",") if name.strip()]
            build = partial(guest_image, arguments.kernel, more_modules=wanted)
            image = await trio.to_thread.run_sync(build, abandon_on_cancel=True)
    except OSError as error:  # of the cache, mostly: full, or not ours to write
        raise RunError(f"cannot set up QEMU and its guest: {error}") from error
    count = arguments.guests
    if count == 1:
        return await _run_guest(arguments, qemu, image, devices)
    statuses = [0] * count
    booted, ended = Rendezvous(count), Rendezvous(count)
    each = len(devices) // count

    async def run_one(index: int) -> None:
        prefix = f"guest{index + 1}: "
        statuses[index] = await _run_guest(
            arguments, qemu, image, devices[index * each :][:each], GuestPlace(index + 1, prefix, booted, ended)
        )

    async with one_error(), trio.open_nursery() as nursery:
        for index in range(count):
            nursery.start_soon(run_one, index)
    return next((status for status in statuses if status), 0)


async def _run_guest(
    arguments: argparse.Namespace,
    qemu: "Qemu",
    image: "GuestImage | None",
    devices: Sequence[QemuDevice],
    place: "GuestPlace | None" = None,
) -> int:
    """One guest; with ``place`` it waits for the others before its command, and again before its end."""
    import trio

    from vfiouser_virtio.vm import boot_guest

    interactive = arguments.script is None
    number = f" vm.guest={place.number}" if place else ""
    async with boot_guest(
        qemu,
        image,
        devices=devices,
        memory=arguments.memory,
        memory_size=arguments.memory_size,
        cpus=arguments.cpus,
        append=arguments.append + number,
        accel=arguments.accel,
        extra_args=arguments.qemu_options,
        shell=interactive,
        wait_ready=not interactive,
    ) as guest:
        if interactive:
            if await guest.wait_exit(timeout=math.inf) != 0:
                raise await guest.failure("the guest did not end well")
            return 0
        script, output = arguments.script, Output(place.prefix if place else "")
        if place is not None:
            await place.booted.meet()
            script = f"export GUEST={place.number}\n{script}"
        with trio.move_on_after(math.inf if arguments.timeout is None else arguments.timeout):
            status = (await guest.run(script, timeout=math.inf, output=output.take)).status
            await output.end()
            if place is not None:
                await place.ended.meet()
            return status
        raise TimedOutError(f"--timeout: {arguments.script!r} had not ended after {arguments.timeout:g} s")


def _say_how_to_leave(served: "Serving", *, own_guest: bool) -> None:
    """The banner of the shell, before QEMU has the terminal."""
    devices = ", ".join(f"{endpoint.name} ({endpoint.driver})" for endpoint in served.endpoints)
    what = "the guest" if own_guest else "a shell in a small Linux guest, in some seconds"
    note(f"{what}, with {devices}")
    note(f"to leave: {'' if own_guest else 'type `poweroff`, or '}press Ctrl-A x (Ctrl-A c shows QEMU's monitor)")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number of seconds above 0 is expected")
    return seconds


def _check_terminal(specs: Sequence[DeviceSpec]) -> None:
    """Two cannot have the terminal. Raises ConfigError."""
    for spec in specs:
        chardev = spec.options.get("chardev")
        if "stdio" in (chardev if isinstance(chardev, list) else [chardev]):
            raise ConfigError(
                f"{spec.driver}: chardev=stdio, but this terminal is the guest's serial console; use pty, or --exec"
            )


def _has_own_guest(options: list[str]) -> bool:
    return any(option.startswith("-") and option.lstrip("-") in _BOOT_OPTIONS for option in options)
