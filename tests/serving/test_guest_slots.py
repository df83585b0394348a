"""The options addr and bus: places on the guest's bus, and functions of one slot."""

import json
import logging
import shlex
from pathlib import Path

import pytest
from support.command import run_command

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.serving.guest_slots import GuestSlot, guest_slot, with_functions


@pytest.mark.parametrize(
    ("addr", "slot", "function", "shown"),
    [("5", 5, 0, "05.0"), ("1f.7", 31, 7, "1f.7"), ("0x0A.1", 10, 1, "0a.1"), ("0", 0, 0, "00.0")],
)
def test_places_as_qemu_writes_them(addr: str, slot: int, function: int, shown: str) -> None:
    assert guest_slot(addr, "rp1") == (place := GuestSlot("rp1", slot, function))
    assert place.addr == shown


@pytest.mark.parametrize("addr", ["", "20", "5.8", "5.", ".1", "5.1.2", "x", "-1", "0000:00:05.0"])
def test_what_is_no_place(addr: str) -> None:
    with pytest.raises(ConfigError, match=r"expected SLOT or SLOT\.FUNCTION"):
        guest_slot(addr, None)


def test_function_0_of_several_is_marked() -> None:
    places = [("a", GuestSlot(None, 5, 1)), ("b", GuestSlot(None, 5)), ("c", GuestSlot("rp1", 5)), ("d", GuestSlot())]
    assert [place.multifunction for place in with_functions(places)] == [False, True, False, False]
    places = [("a", GuestSlot("pcie.0", 5)), ("b", GuestSlot(None, 5, 1))]
    assert [place.multifunction for place in with_functions(places)] == [True, False], "one bus, said and not said"


def test_two_devices_cannot_be_in_one_place(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"b and a have the same addr=05\.1"):
        with_functions([("a", GuestSlot(None, 5, 1)), ("b", GuestSlot(None, 5, 1))])
    with pytest.raises(ConfigError, match=r"b and a have the same addr=05\.0"):
        with_functions([("a", GuestSlot("pcie.0", 5)), ("b", GuestSlot(None, 5))])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(with_functions([("a", GuestSlot(None, 5, 1))])) == 1
    assert "no device here has addr=5.0" in caplog.text


def test_qemu_args_have_them(tmp_path: Path) -> None:
    devices = ["rng,socket=a.sock,addr=6.0", "rng,socket=b.sock,addr=6.1", "rng,socket=c.sock,bus=rp1"]
    arguments = [word for device in devices for word in ("--device", device)]
    ended = run_command("qemu-args", *arguments, cwd=tmp_path)
    found = [json.loads(word) for word in shlex.split(ended.stdout) if word.startswith("{")]
    assert [(each.get("addr"), each.get("bus"), each.get("multifunction")) for each in found] == [
        ("06.0", None, True),
        ("06.1", None, None),
        (None, "rp1", None),
    ]
    ended = run_command("qemu-args", "--hotplug", *arguments, cwd=tmp_path)
    ids = [json.loads(line)["arguments"]["id"] for line in ended.stdout.splitlines()]
    assert ids == ["rng1", "rng2", "rng0"], "function 0 is last"
    wrong = run_command("qemu-args", "--device", "rng,socket=a.sock,addr=99", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "rng0: addr=99: expected SLOT" in wrong.stderr
