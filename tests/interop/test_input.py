"""Input devices in a Linux guest: what programs read from /dev/input/eventN, and a light that comes back."""

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from support.vm_devices import Machine, booted

from vfiouser_virtio import vm
from vfiouser_virtio.devices.input import Input
from vfiouser_virtio.devices.input_face import Event, Kind
from vfiouser_virtio.protocols.virtio.input import KEYS, RECORDED_EVENT_CODEC, Abs, Btn, Ev, Led, Rel, Syn

pytestmark = pytest.mark.qemu

_SYN = (Ev.SYN, Syn.REPORT, 0)
# Where the device with this name is: /sys/class/input/event3.
_FIND = """find_input() {
    for each in /sys/class/input/event*; do
        if [ "$(cat $each/device/name)" = "$1" ]; then echo $each; fi
    done
}
"""


async def test_linux_reads_what_is_played(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recording = tmp_path / "recording"
    recording.write_bytes(packed([(Ev.KEY, Btn.LEFT, 1), _SYN, (Ev.REL, Rel.X, 5), _SYN, (Ev.KEY, Btn.LEFT, 0), _SYN]))
    kinds: tuple[Kind, ...] = ("keyboard", "mouse", "tablet", "multitouch")
    inputs: dict[str, Input] = {kind: Input(kind=kind, name=f"our {kind}", serial="42") for kind in kinds}
    # It plays again at each start of the driver: once a program listens, the driver is bound anew.
    inputs["replayed"] = Input(kind="mouse", name="our replayed", replay=recording, replay_delay=5.0)
    async with booted(qemu, guest_image, inputs) as machine:
        with trio.fail_after(300):
            await play(machine, inputs)
        await machine.check_quiet(caplog)


async def play(machine: Machine, inputs: dict[str, Input]) -> None:
    keyboard, mouse, tablet, screen = (inputs[kind] for kind in ("keyboard", "mouse", "tablet", "multitouch"))
    assert await machine.run("cat /sys/class/input/input*/uniq | grep -c 42") == "4"

    await listen(machine, "our keyboard", 12 * 2)
    await keyboard.write("Ls\n")
    await keyboard.press("leftctrl", "c")
    shift, ctrl = KEYS["leftshift"], KEYS["leftctrl"]
    keys = [(shift, 1), (KEYS["l"], 1), (KEYS["l"], 0), (shift, 0), (KEYS["s"], 1), (KEYS["s"], 0)]
    keys += [(KEYS["enter"], 1), (KEYS["enter"], 0), (ctrl, 1), (KEYS["c"], 1), (KEYS["c"], 0), (ctrl, 0)]
    assert await heard(machine) == [each for key in keys for each in ((Ev.KEY, *key), _SYN)]

    await listen(machine, "our mouse", 3 + 4 + 2)
    await mouse.move(7, -3)
    await mouse.click("middle")
    await mouse.scroll(-2)
    assert await heard(machine) == [
        (Ev.REL, Rel.X, 7), (Ev.REL, Rel.Y, -3), _SYN,
        (Ev.KEY, Btn.MIDDLE, 1), _SYN, (Ev.KEY, Btn.MIDDLE, 0), _SYN,
        (Ev.REL, Rel.WHEEL, -2), _SYN,
    ]  # fmt: skip

    await listen(machine, "our tablet", 3)
    await tablet.move_to(1000, 32767)
    assert await heard(machine) == [(Ev.ABS, Abs.X, 1000), (Ev.ABS, Abs.Y, 32767), _SYN]

    # Linux leaves out what says nothing new: slot 0 was the current one.
    await listen(machine, "our multitouch", 7 + 3)
    await screen.touch(0, 100, 200)
    await screen.lift(0)
    assert await heard(machine) == [
        (Ev.ABS, Abs.MT_TRACKING_ID, 1), (Ev.ABS, Abs.MT_POSITION_X, 100), (Ev.ABS, Abs.MT_POSITION_Y, 200),
        (Ev.KEY, Btn.TOUCH, 1), (Ev.ABS, Abs.X, 100), (Ev.ABS, Abs.Y, 200), _SYN,
        (Ev.ABS, Abs.MT_TRACKING_ID, -1), (Ev.KEY, Btn.TOUCH, 0), _SYN,
    ]  # fmt: skip

    # A light: what a program writes to the device comes back to us.
    light = struct.pack("<qqHHi", 0, 0, Ev.LED, Led.CAPSL, 1) + struct.pack("<qqHHi", 0, 0, *_SYN)
    octal = "".join(f"\\{byte:03o}" for byte in light)
    await machine.run(f"{_FIND} printf '{octal}' >/dev/input/$(basename $(find_input 'our keyboard'))")
    await keyboard.wait_led(Led.CAPSL)

    again = """driver=/sys/bus/virtio/drivers/virtio_input
        device=$(basename $(readlink -f $(find_input "our replayed")/device/device))
        echo $device >$driver/unbind; echo $device >$driver/bind"""
    await listen(machine, "our replayed", 6, first=again)
    assert await heard(machine) == [
        (Ev.KEY, Btn.LEFT, 1), _SYN, (Ev.REL, Rel.X, 5), _SYN, (Ev.KEY, Btn.LEFT, 0), _SYN,
    ]  # fmt: skip


def packed(events: Sequence[Event]) -> bytes:
    return b"".join(RECORDED_EVENT_CODEC.pack(1, 0, *event) for event in events)


async def listen(machine: Machine, name: str, count: int, *, first: str = "") -> None:
    """Have a program read so many events of a device, and return when it has the device open."""
    size = RECORDED_EVENT_CODEC.size
    await machine.run(
        f"""{_FIND}{first}
        rm -f /tmp/heard /tmp/open
        exec 3</dev/input/$(basename $(find_input "{name}"))
        dd bs={size} count={count} of=/tmp/heard <&3 2>/dev/null &
        exec 3<&-; until [ -e /tmp/heard ]; do sleep 0.05; done; echo {count * size} >/tmp/size"""
    )


async def heard(machine: Machine) -> list[Event]:
    """The events that it has read, when these are all."""
    waited = await machine.guest.run(
        """for i in $(seq 300); do [ "$(stat -c %s /tmp/heard)" -lt $(cat /tmp/size) ] || break; sleep 0.1; done
        cat /tmp/heard; rm /tmp/heard""",
        timeout=120,
        check=True,
    )
    return [(kind, code, value) for _, _, kind, code, value in RECORDED_EVENT_CODEC.iter_unpack(waited.raw_output)]
