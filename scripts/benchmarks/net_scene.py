"""Scene of the benchmark `net`: two Linux guests, the network devices that are compared, and who answers them.

::

    guest 1  ◀── ours, hub ──────────▶  guest 2
             ◀── QEMU's, stream ─────▶
             ◀── ours, tap and passt ─────────▶ the host's end,
             guest 2 ◀── QEMU's tap and passt ▶ in a network namespace of its own

So all that is compared is there at the same time, in the same guests, and idle but for what is measured.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.server import server
from benchmarks.usage import Usage
from vfiouser_virtio import vm
from vfiouser_virtio.serving.qemu_command import qemu_device
from vfiouser_virtio.vm import GuestImage, debian, newc, programs

HUB, STREAM, TAP, QEMU_TAP, PASST, QEMU_PASST = NETWORKS = "hub", "stream", "tap", "qemu-tap", "passt", "qemu-passt"
"""Networks; those without a name of QEMU's are on our devices."""
PORT = 7777
_MEMORY = "256M"
_PROGRAM = "usr/bin/netload"
# What passt gives to a guest is what its namespace has; it answers for the host at the router's address.
_HOST, _ROUTER = "192.0.2.7", "192.0.2.1"


@dataclass(frozen=True, slots=True)
class Way:
    """Way over a network: from this guest to a program that answers at this address."""

    guest: vm.Guest
    address: str


@dataclass(frozen=True, slots=True)
class Scene:
    """Networks that there are, and what our server has used."""

    ways: Mapping[str, Way]
    usage: Usage


def may_reach_host() -> bool:
    """Whether a network namespace with TAP interfaces in it can be made: that takes root, and util-linux."""
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip"))
    return os.geteuid() == 0 and os.path.exists("/dev/net/tun") and tools


@asynccontextmanager
async def scene(program: Path, folder: Path) -> AsyncIterator[Scene]:
    """Start all of it; ``program`` is the load program, which runs everywhere."""
    host = may_reach_host()
    image = _image(program, folder)
    with ExitStack() as stack:
        inside = _namespace(stack) if host else []
        passt = _passt(folder) if host else folder
        devices = [f"net,hub=bench,mac={_mac(HUB, guest)}" for guest in (1, 2)]
        if host:
            devices += [
                f"net,netdev=tap,ifname={TAP},mac={_mac(TAP, 1)}",
                f"net,netdev=user,passt={passt},map-gw=on,mac={_mac(PASST, 1)}",
            ]
        running = stack.enter_context(server(devices, prefix=inside))
        ours = [dict(qemu_device(f"ours{number}", path)) for number, path in enumerate(running.paths)]
        socket = f"addr.type=unix,addr.path={folder / 'stream'}"
        arguments = [
            _built_in(STREAM, 1, f"stream,server=on,{socket}"),
            _built_in(STREAM, 2, f"stream,server=off,reconnect-ms=100,{socket}"),
        ]
        if host:
            arguments[1] += _built_in(
                QEMU_TAP, 2, f"tap,ifname={QEMU_TAP},script=no,downscript=no,vhost=off"
            ) + _built_in(
                QEMU_PASST, 2, f"stream,server=off,addr.type=unix,addr.path={_listening(passt, inside, folder, stack)}"
            )
        found = vm.find_qemu()
        qemu = replace(found, argv_prefix=(*inside, *found.argv_prefix))
        async with (
            vm.boot_guest(
                qemu, image, devices=[ours[0], *ours[2:]], memory_size=_MEMORY, extra_args=arguments[0]
            ) as first,
            vm.boot_guest(qemu, image, devices=[ours[1]], memory_size=_MEMORY, extra_args=arguments[1]) as second,
        ):
            guests = {1: first, 2: second}
            yield Scene(await _set_up(guests, inside, host, program, stack), running.usage)


def _mac(network: str, guest: int) -> str:
    return f"52:54:00:77:{NETWORKS.index(network):02x}:{guest:02x}"


def _built_in(network: str, guest: int, netdev: str) -> list[str]:
    """QEMU's own device on a netdev of QEMU's."""
    device = f"virtio-net-pci,netdev=n{network},mac={_mac(network, guest)}"
    kind, _, options = netdev.partition(",")
    return ["-netdev", f"{kind},id=n{network},{options}", "-device", device]


def _image(program: Path, folder: Path) -> GuestImage:
    image = vm.guest_image()
    target = folder / "initramfs-netload.cpio"
    # The kernel unpacks one archive after the other.
    target.write_bytes(image.initramfs.read_bytes() + newc.pack([newc.file(_PROGRAM, program.read_bytes(), 0o755)]))
    return replace(image, initramfs=target)


def _namespace(stack: ExitStack) -> list[str]:
    """The beginning of a command line that runs a program in a network namespace, which is there as long as needed."""
    holder = stack.enter_context(subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE))
    inside = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
    ours = os.stat("/proc/self/ns/net").st_ino
    while os.stat(f"/proc/{holder.pid}/ns/net").st_ino == ours:
        if holder.poll() is not None:
            raise vm.VmError("unshare --net has failed")
    for command in (
        "link set lo up",
        "tuntap add up0 mode tap",
        f"addr add {_HOST}/24 dev up0",
        "link set up0 up",
        f"route add default via {_ROUTER} dev up0",
    ):
        _ip(inside, command)
    return inside


def _ip(inside: Sequence[str], arguments: str) -> None:
    subprocess.run([*inside, "ip", *arguments.split()], check=True)


def _passt(folder: Path) -> Path:
    """A program that runs passt with the libraries that were fetched with it."""
    argv = programs.argv(debian.fetch("passt", ["passt"], megabytes=3), "passt")
    script = folder / "passt"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(argv)} "$@"\n')
    script.chmod(0o755)
    return script


def _listening(passt: Path, inside: Sequence[str], folder: Path, stack: ExitStack) -> Path:
    """The socket of a passt for QEMU; it is nobody's when it makes that."""
    open_folder = folder / "passt.sockets"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    socket = open_folder / "socket"
    command = [*inside, str(passt), "--foreground", "--quiet", "--one-off", "--socket", str(socket)]
    process = stack.enter_context(subprocess.Popen(command))
    stack.callback(process.terminate)
    while not socket.exists():
        if process.poll() is not None:
            raise vm.VmError(f"passt ended with status {process.returncode}")
        time.sleep(0.01)
    return socket


async def _set_up(
    guests: Mapping[int, vm.Guest], inside: Sequence[str], host: bool, program: Path, stack: ExitStack
) -> dict[str, Way]:
    """Give everything its address, and start what answers."""
    networks = {1: [HUB, STREAM], 2: [HUB, STREAM]}
    if host:
        networks[1] += [TAP, PASST]
        networks[2] += [QEMU_TAP, QEMU_PASST]
        for network in (TAP, QEMU_TAP):
            _ip(inside, f"link set {network} up")
            _ip(inside, f"addr add {_address(network, 9)}/24 dev {network}")
        _answer([*inside, str(program), "serve", str(PORT)], stack)
    for number, guest in guests.items():
        lines = ["name() { grep -l $1 /sys/class/net/*/address | cut -d/ -f5; }"]
        for network in networks[number]:
            address = _HOST if network in (PASST, QEMU_PASST) else _address(network, number)
            lines += [
                f"dev=$(name {_mac(network, number)})",
                f"ip addr add {address}/24 dev $dev",
                "ip link set $dev up",
            ]
        lines.append(f"netload serve {PORT} >/dev/null 2>&1 &")
        await guest.run("\n".join(lines), check=True)
    ways = {HUB: Way(guests[1], _address(HUB, 2)), STREAM: Way(guests[1], _address(STREAM, 2))}
    if host:
        ways |= {
            TAP: Way(guests[1], _address(TAP, 9)),
            QEMU_TAP: Way(guests[2], _address(QEMU_TAP, 9)),
            PASST: Way(guests[1], _ROUTER),
            QEMU_PASST: Way(guests[2], _ROUTER),
        }
    for network, way in ways.items():
        # A link that is not up yet costs a second.
        command = f"for i in $(seq 60); do netload rr {way.address} {PORT} 1 && exit; sleep 1; done; false"
        if (await way.guest.run(command, timeout=120)).status:
            raise vm.VmError(f"nobody answers over the network {network}")
    return ways


def _answer(command: list[str], stack: ExitStack) -> None:
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
    stack.callback(process.terminate)
    assert process.stdout is not None
    process.stdout.readline()


def _address(network: str, end: int) -> str:
    return f"10.77.{NETWORKS.index(network)}.{end}"
