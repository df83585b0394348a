"""Exercises: what a guest does with a device of each type, and what the host does beside it.

A script ends with status 0 when all was right, with `WRONG` when a result was wrong and nothing had said so, with any
other one when the guest has seen an error; its last line says what.
"""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from vfiouser_virtio.devices.balloon import Balloon
from vfiouser_virtio.devices.input import Input
from vfiouser_virtio.virtio import Device

WRONG = 3
"""Exit status of an exercise: the data were wrong, and no error had been seen."""
DISK_SIZE = 8 << 20
BALLOON_SIZE = 16 << 20
_ECHOED = 64 << 10

_COMMON = f"""
bad() {{ echo "$*"; exit 1; }}
wrong() {{ echo "$*"; exit {WRONG}; }}
# Up to five seconds for what Linux does by itself.
until_is() {{
    for i in $(seq 50); do eval "$1" && return; sleep 0.1; done
    bad "$2"
}}
# The driver leaves the device, and comes back.
again() {{
    device=$(basename $(readlink -f "$1"))
    echo $device >/sys/bus/virtio/drivers/$2/unbind || bad "the driver cannot be unbound"
    echo $device >/sys/bus/virtio/drivers/$2/bind || bad "the driver cannot be bound again"
}}
# Finds what was plugged in, or waits for the kernel, which is at it. All that it does to probe is done then.
echo 1 >/sys/bus/pci/rescan
"""

_BLK = """
modprobe virtio_blk
until_is '[ -b /dev/vda ]' "no disk"
sum=$(sha256sum </dev/vda) || bad "the disk cannot be read"
[ "$sum" = "$(cat /tmp/expected)" ] || wrong "the disk has read as something else"
dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
dd if=/tmp/data of=/dev/vda bs=1M conv=fsync 2>&1 || bad "the disk cannot be written"
again /sys/block/vda/device virtio_blk
until_is '[ -b /dev/vda ]' "no disk after the driver came back"
cat /dev/vda >/tmp/read || bad "the disk cannot be read again"
cmp -s /tmp/data /tmp/read || wrong "the disk has not kept what was written, and flushed"
"""

# Its source is nothing but Z, so that what else comes is seen.
_RNG = """
modprobe virtio_rng
current=/sys/class/misc/hw_random/rng_current
until_is 'grep -q virtio $current' "no random number generator"
read_some() {
    head -c 16k /dev/hwrng >/tmp/random || bad "it cannot be read"
    [ $(stat -c %s /tmp/random) = 16384 ] || bad "too little comes"
    [ $(tr -d Z </tmp/random | wc -c) = 0 ] || wrong "bytes come that are not the device's"
}
read_some
again "$(readlink -f /sys/bus/virtio/drivers/virtio_rng/virtio*)" virtio_rng
until_is 'grep -q virtio $current' "no random number generator after the driver came back"
read_some
"""

# The host sends back what comes.
_CONSOLE = f"""
modprobe virtio_console
find_port() {{
    for port in /sys/class/virtio-ports/*; do
        [ "$(cat $port/name 2>/dev/null)" != echo ] || {{ echo /dev/${{port##*/}}; return 0; }}
    done
    return 1
}}
talk() {{
    until_is 'find_port >/tmp/port && [ -c $(cat /tmp/port) ]' "no port"
    exec 3<>$(cat /tmp/port) || bad "the port cannot be opened"
    head -c {_ECHOED} /dev/urandom >/tmp/sent
    rm -f /tmp/got /tmp/ended
    (cat <&3 >/tmp/got; echo >/tmp/ended) &
    cat /tmp/sent >&3 || bad "the port cannot be written"
    until [ "$(stat -c %s /tmp/got)" -ge {_ECHOED} ]; do
        [ ! -e /tmp/ended ] || bad "the port cannot be read"
        sleep 0.1
    done
    killall cat
    exec 3<&-
    cmp -s /tmp/sent /tmp/got || wrong "something else has come back"
}}
talk
again /sys/bus/virtio/drivers/virtio_console/virtio* virtio_console
talk
"""

_NET = """
modprobe virtio_net
get() {
    until_is '[ -e /sys/class/net/eth0 ]' "no network interface"
    ip link set eth0 up
    udhcpc -i eth0 -q -n -t 5 -T 1 >/dev/null 2>&1 || bad "no address by DHCP"
    ping -c 3 -W 2 -s 1400 10.0.2.2 >/dev/null || bad "ping has no answer"
    rm -f /tmp/file
    timeout 8 tftp -g -r file -l /tmp/file -b 1400 10.0.2.2 2>&1 || bad "a file cannot be fetched"
    [ "$(sha256sum </tmp/file)" = "$(cat /tmp/expected)" ] || wrong "a file has come as something else"
}
get
ethtool -G eth0 rx 128 tx 128 || bad "the rings cannot be resized"
get
ip link set eth0 down
again /sys/class/net/eth0/device virtio_net
get
"""

_BALLOON = f"""
total() {{ awk '/MemTotal/ {{ print $2 }}' /proc/meminfo; }}
before=$(total)
modprobe virtio_balloon
until_is 'cd /sys/bus/virtio/drivers/virtio_balloon/virtio*' "no balloon"
# The host asks for memory, and gives it back when it has that.
until [ $(total) -le $((before - {BALLOON_SIZE >> 10})) ]; do sleep 0.05; done
until [ $(total) -ge $before ]; do sleep 0.05; done
[ $(total) = $before ] || wrong "there is more memory than before"
cd /
again /sys/bus/virtio/drivers/virtio_balloon/virtio* virtio_balloon
"""

# The host presses a key over and over, or a tablet's button: type, code and value of its events are these.
_KEY_A = "0000000000000000,01001e0000000000,01001e0001000000,"
_BUTTON = "0000000000000000,0100100100000000,0100100101000000,"
_INPUT = """
modprobe -a virtio_input evdev
find_keyboard() { grep -l vfiouser /sys/class/input/event*/device/name | cut -d / -f 5; }
listen() {
    until_is '[ -n "$(find_keyboard)" ]' "no keyboard"
    dd if=/dev/input/$(find_keyboard) of=/tmp/heard bs=24 count=80 2>/dev/null || bad "it cannot be read"
    hexdump -v -e '24/1 "%02x" "\\n"' /tmp/heard | cut -c 33-48 | sort -u >/tmp/kinds  # type, code and value
    [ $(stat -c %s /tmp/heard) = 1920 ] || bad "the keyboard has ended"
    grep -qxF "$(tr '\\n' , </tmp/kinds)" /tmp/expected || wrong "other events come: $(tr '\\n' " " </tmp/kinds)"
}
listen
again /sys/bus/virtio/drivers/virtio_input/virtio* virtio_input
listen
"""


@dataclass(frozen=True, slots=True)
class GuestExercise:
    """Exercise of a device type. ``{folder}`` in ``device`` is where `prepare` has put files."""

    device: str
    """Description of the device, without faults."""
    script: str
    neighbour: str = "rng"
    """Another device of the guest, which is honest."""
    check_neighbour: str = "[ $(head -c 512 /dev/hwrng | wc -c) = 512 ]"
    expected: Callable[[Path], str] = lambda _: ""
    """Makes the files of the host, and gives what is in the guest's /tmp/expected."""
    beside: Callable[[Device, Path], Awaitable[None]] | None = None
    """What the host does meanwhile, until it is cancelled."""

    @property
    def whole_script(self) -> str:
        """With what is common to all."""
        return _COMMON + self.script


def _random_file(path: Path, size: int) -> str:
    import hashlib

    data = os.urandom(size)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest() + "  -\n"


def _only_z(folder: Path) -> str:
    (folder / "source").write_bytes(b"Z" * 4096)
    return ""


def _tftp(folder: Path) -> str:
    (folder / "tftp").mkdir()
    return _random_file(folder / "tftp" / "file", 256 << 10)


async def _echo(device: Device, folder: Path) -> None:
    """Send back what comes; the port may be closed, and opened again."""
    del device
    while True:
        try:
            async with await trio.open_unix_socket(str(folder / "echo")) as stream:
                async for data in stream:
                    await stream.send_all(data)
        except (OSError, trio.BrokenResourceError):
            pass
        await trio.sleep(0.1)


async def _ask_for_memory(device: Device, folder: Path) -> None:
    del folder
    assert isinstance(device, Balloon)
    await device.wait_actual(BALLOON_SIZE)
    await trio.sleep(0.5)
    device.set_target(0)


async def _press_a_key(device: Device, folder: Path) -> None:
    del folder
    assert isinstance(device, Input)
    while True:
        await (device.press("a") if device.kind == "keyboard" else device.click("left"))
        await trio.sleep(0.02)


EXERCISES = {
    "blk": GuestExercise(
        "blk,path={folder}/disk", _BLK, expected=lambda folder: _random_file(folder / "disk", DISK_SIZE)
    ),
    "rng": GuestExercise(
        "rng,source={folder}/source",
        _RNG,
        neighbour="blk,size=1M",
        check_neighbour="dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null",
        expected=_only_z,
    ),
    "console": GuestExercise("console,chardev=unix:{folder}/echo,name=echo", _CONSOLE, beside=_echo),
    "net": GuestExercise("net,netdev=boot,tftp={folder}/tftp", _NET, expected=_tftp),
    "balloon": GuestExercise(f"balloon,target={BALLOON_SIZE}", _BALLOON, beside=_ask_for_memory),
    "input": GuestExercise("input", _INPUT, expected=lambda _: f"{_KEY_A}\n{_BUTTON}", beside=_press_a_key),
}  # fmt: skip
"""By device type."""
