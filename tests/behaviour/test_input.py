"""Input devices as their driver has them, over every carrier: their description, events, lights, recordings."""

from pathlib import Path

import pytest
import trio
import trio.testing

from vfiouser_virtio.devices.input import MAX_FRAMES, Input
from vfiouser_virtio.devices.input_face import TABLET_MAX, Kind
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.guest import VirtioDevice, bound
from vfiouser_virtio.guest.drivers.input import InputEvents as Driver
from vfiouser_virtio.protocols.virtio.input import (
    KEYS,
    RECORDED_EVENT_CODEC,
    Abs,
    Btn,
    Ev,
    Led,
    Prop,
    Rel,
    Select,
    Snd,
    Syn,
)
from vfiouser_virtio.transports import Loopback

in_process = pytest.mark.virtio_carriers("loopback")
A, SHIFT = KEYS["a"], KEYS["leftshift"]


@pytest.fixture
def kind() -> Kind:
    return "keyboard"


@pytest.fixture
def virtio_device(kind: Kind) -> Input:
    return Input(kind=kind, name=f"Test {kind}", serial="ä123")


def recording(path: Path, *events: tuple[float, int, int, int]) -> Path:
    """A file of ``struct input_event``: time in seconds, type, code, value."""
    packed = [RECORDED_EVENT_CODEC.pack(int(at), int(at % 1 * 1e6), *event) for at, *event in events]
    path.write_bytes(b"".join(packed))
    return path


async def test_a_keyboard_says_what_it_is(virtio_guest: VirtioDevice) -> None:
    driver: Driver = virtio_guest.driver_data
    found = await driver.describe()
    assert (found.name, found.serial, found.ids) == ("Test keyboard", "ä123", (6, 0x1AF4, 1, 1))
    assert found.codes[Ev.KEY] == set(KEYS.values())
    assert found.codes[Ev.LED] == {0, 1, 2}
    assert set(found.codes) == {Ev.KEY, Ev.LED, Ev.SND, Ev.REP}
    assert not found.properties
    for select, subsel in (
        (Select.UNSET, 0),
        (Select.ID_NAME, 1),
        (Select.ABS_INFO, 0),
        (0x77, 3),
        (Select.EV_BITS, 255),
    ):
        assert await driver.select(select, subsel) == b""
        data = await virtio_guest.config.get("data")
        assert isinstance(data, bytes)
        assert not any(data)


# Over QEMU the same messages come from another client: the keyboard is described there.
@pytest.mark.virtio_carriers("loopback", "socket", "socket-private", "libvfio-user")
@pytest.mark.parametrize("kind", ["multitouch"])
async def test_a_touch_screen_has_axes(virtio_guest: VirtioDevice) -> None:
    found = await virtio_guest.driver_data.describe()
    assert found.properties == {Prop.DIRECT}
    assert found.axes[Abs.MT_SLOT] == (0, 9, 0, 0, 0)
    assert found.axes[Abs.MT_POSITION_X] == found.axes[Abs.Y] == (0, TABLET_MAX, 0, 0, 0)
    assert found.codes[Ev.KEY] == {Btn.TOUCH}


async def test_keys_and_lights(virtio_device: Input, virtio_guest: VirtioDevice) -> None:
    await virtio_device.wait_running()
    driver: Driver = virtio_guest.driver_data
    await virtio_device.press("leftctrl", "c")
    pressed = [await driver.frame() for _ in range(4)]
    assert [event for [event] in pressed] == [(Ev.KEY, 29, 1), (Ev.KEY, 46, 1), (Ev.KEY, 46, 0), (Ev.KEY, 29, 0)]
    await virtio_device.write("A a")
    typed = [(await driver.frame())[0][1:] for _ in range(8)]
    assert typed == [(SHIFT, 1), (A, 1), (A, 0), (SHIFT, 0), (57, 1), (57, 0), (A, 1), (A, 0)]

    told = []
    virtio_device.on_status = lambda *event: told.append(event)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(virtio_device.wait_led, Led.CAPSL)
        await driver.tell(Ev.LED, Led.CAPSL, 1)
    assert virtio_device.leds == {Led.CAPSL}
    await driver.tell(Ev.LED, Led.CAPSL, 0)
    await driver.tell(Ev.SND, Snd.BELL, 1)
    await driver.status.request([b"\0" * 7])  # too short, ignored
    assert virtio_device.leds == frozenset()
    assert told == [(Ev.LED, Led.CAPSL, 1), (Ev.LED, Led.CAPSL, 0), (Ev.SND, Snd.BELL, 1)]


@in_process
@pytest.mark.parametrize("kind", ["mouse"])
async def test_a_mouse(virtio_device: Input, virtio_guest: VirtioDevice) -> None:
    await virtio_device.wait_running()
    driver: Driver = virtio_guest.driver_data
    await virtio_device.move(3, -4)
    await virtio_device.scroll(-1)
    await virtio_device.click("right")
    await virtio_device.move(0, 0)  # nothing
    await virtio_device.click()
    assert [await driver.frame() for _ in range(6)] == [
        [(Ev.REL, Rel.X, 3), (Ev.REL, Rel.Y, -4)],
        [(Ev.REL, Rel.WHEEL, -1)],
        [(Ev.KEY, Btn.RIGHT, 1)],
        [(Ev.KEY, Btn.RIGHT, 0)],
        [(Ev.KEY, Btn.LEFT, 1)],
        [(Ev.KEY, Btn.LEFT, 0)],
    ]
    with pytest.raises(ValueError, match="a mouse has no key or button 'a'"):
        await virtio_device.press("a")


@in_process
@pytest.mark.parametrize("kind", ["tablet"])
async def test_a_tablet(virtio_device: Input, virtio_guest: VirtioDevice) -> None:
    await virtio_device.wait_running()
    await virtio_device.move_to(0, TABLET_MAX)
    assert await virtio_guest.driver_data.frame() == [(Ev.ABS, Abs.X, 0), (Ev.ABS, Abs.Y, TABLET_MAX)]
    with pytest.raises(ValueError, match=r"32768 is not 0 to 32767"):
        await virtio_device.move_to(1, TABLET_MAX + 1)


@in_process
@pytest.mark.parametrize("kind", ["multitouch"])
async def test_two_fingers(virtio_device: Input, virtio_guest: VirtioDevice) -> None:
    await virtio_device.wait_running()
    driver: Driver = virtio_guest.driver_data
    await virtio_device.touch(0, 1, 2)
    await virtio_device.touch(1, 30, 40)
    await virtio_device.touch(0, 5, 6)
    await virtio_device.lift(0)
    await virtio_device.lift(1)
    await virtio_device.lift(1)
    slot, tracking, x, y = Abs.MT_SLOT, Abs.MT_TRACKING_ID, Abs.MT_POSITION_X, Abs.MT_POSITION_Y
    first = [(slot, 0), (tracking, 1), (x, 1), (y, 2), (Btn.TOUCH, 1), (Abs.X, 1), (Abs.Y, 2)]
    assert [[event[1:] for event in await driver.frame()] for _ in range(5)] == [
        first,
        [(slot, 1), (tracking, 2), (x, 30), (y, 40)],
        [(slot, 0), (x, 5), (y, 6), (Abs.X, 5), (Abs.Y, 6)],
        [(slot, 0), (tracking, -1)],
        [(slot, 1), (tracking, -1), (Btn.TOUCH, 0)],
    ]


@in_process
async def test_a_guest_that_takes_nothing_loses_whole_frames(virtio_device: Input, virtio_guest: VirtioDevice) -> None:
    await virtio_device.wait_running()
    driver: Driver = virtio_guest.driver_data
    pair = ((Ev.KEY, A, 1), (Ev.KEY, A, 0))
    sent = 0
    while virtio_device.send_nowait(*pair):
        sent += 1
    assert sent >= MAX_FRAMES
    assert virtio_device.dropped == 2
    async with trio.open_nursery() as nursery:
        nursery.start_soon(virtio_device.send, *pair)  # this one waits
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(sent + 1):
            assert await driver.frame() == [*pair]
    assert virtio_device.dropped == 2
    with pytest.raises(ValueError, match="65 events in one frame"):
        await virtio_device.send(*[(Ev.KEY, A, 1)] * 65)


@in_process
@pytest.mark.parametrize("kind", ["multitouch"])
async def test_without_a_driver_events_are_lost(virtio_device: Input, virtio_guest: VirtioDevice) -> None:
    await virtio_device.wait_running()
    driver: Driver = virtio_guest.driver_data
    with pytest.raises(ValueError, match="is not 0 to 32767"):
        await virtio_device.touch(0, -1, 0)
    await virtio_device.touch(0, 1, 2)
    assert (Ev.ABS, Abs.MT_TRACKING_ID, 1) in await driver.frame()
    await virtio_guest.reset()
    await virtio_device.touch(1, 1, 2)
    await virtio_device.lift(0)  # no finger is on the screen that nobody sees
    assert virtio_device.dropped == 7


async def test_a_recording_is_sent(tmp_path: Path) -> None:
    from vfiouser_virtio.testing.carriers import carry

    file = recording(
        tmp_path / "pad",
        (5.0, Ev.MSC, 4, 0x70004),
        (5.0, Ev.KEY, 0x130, 1),  # BTN_SOUTH, which a keyboard has not
        (5.0, Ev.SYN, Syn.REPORT, 0),
        (5.1, Ev.LED, 1, 1),
        (5.1, Ev.SYN, Syn.REPORT, 0),
        (65.1, Ev.ABS, 2, 77),
        (65.1, Ev.SYN, Syn.REPORT, 0),
    )
    for timing in (True, False):
        device = Input(replay=file, replay_timing=timing)
        async with carry(device) as guest:
            driver: Driver = guest.driver_data
            found = await driver.describe()
            assert 0x130 in found.codes[Ev.KEY]
            assert found.axes[2] == (0, 77, 0, 0, 0)
            assert await driver.frame() == [(Ev.MSC, 4, 0x70004), (Ev.KEY, 0x130, 1)]
            with trio.move_on_after(0.2 if timing else 60) as waited:
                assert await driver.frame() == [(Ev.ABS, 2, 77)]
            assert waited.cancelled_caught is timing


def test_what_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 25)
    wrong = recording(tmp_path / "wrong", (0.0, 0x55, 0, 0))
    for path, message in ((tmp_path / "short", "25 bytes, which is no recording"), (wrong, "event 0 has type 0x55")):
        with pytest.raises(ConfigError, match=message):
            Input(replay=path)
    with pytest.raises(DeviceError, match="No such file"):
        Input(replay=tmp_path / "none")
    with pytest.raises(ConfigError, match="128 bytes"):
        Input(name="x" * 129)


@pytest.mark.parametrize("kind", ["multitouch"])
async def test_another_object_goes_on_where_this_one_was(kind: Kind) -> None:
    first, second = Input(kind=kind), Input(kind=kind)
    async with Loopback(first) as transport, bound(transport) as guest:
        driver: Driver = guest.driver_data
        await first.wait_running()
        await first.touch(0, 1, 2)
        await driver.frame()
        await driver.select(Select.ID_NAME)
        await transport.core.replace(second)
        assert await guest.config.get_int("size") == len("vfiouser-virtio multitouch")
        await second.lift(0)
        assert await driver.frame() == [
            (Ev.ABS, Abs.MT_SLOT, 0),
            (Ev.ABS, Abs.MT_TRACKING_ID, -1),
            (Ev.KEY, Btn.TOUCH, 0),
        ]
        await first.touch(1, 1, 2)  # its time is over
        assert first.dropped == 4
