"""``qemu-args``: for a shell, for libvirt, for a running QEMU."""

import json
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

from support.command import run_command


def test_for_a_shell(tmp_path: Path) -> None:
    arguments = ["--device", "rng,socket=it's.sock", "--socket", "/b.sock", "--memory-size", "2G"]
    ended = run_command("qemu-args", *arguments, cwd=tmp_path)
    assert ended.returncode == 0
    words = shlex.split(ended.stdout)
    devices = [json.loads(word) for word in words if word.startswith("{")]
    assert [(device["id"], device["socket"]["path"]) for device in devices] == [
        ("rng0", f"{tmp_path}/it's.sock"),
        ("vu0", "/b.sock"),
    ]
    assert "memory-backend-memfd,id=mem,size=2G,share=on" in words
    private = run_command("qemu-args", "--socket", "/b.sock", "--memory", "private")
    assert "memory-backend" not in private.stdout


def test_for_libvirt() -> None:
    ended = run_command("qemu-args", "--socket", "/a&'\".sock", "--libvirt")
    domain = ET.fromstring(ended.stdout)
    values = [
        argument.get("value") or "" for argument in domain.iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")
    ]
    assert values[0] == "-device"
    assert json.loads(values[1])["socket"]["path"] == "/a&'\".sock"


def test_for_a_running_qemu() -> None:
    ended = run_command("qemu-args", "--socket", "/a.sock", "--socket", "/b.sock", "--hotplug")
    commands = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [command["execute"] for command in commands] == ["device_add", "device_add"]
    assert commands[1]["arguments"]["socket"] == {"type": "unix", "path": "/b.sock"}


def test_a_socket_must_be_known() -> None:
    for arguments in ([], ["--device", "rng"]):
        ended = run_command("qemu-args", *arguments)
        assert ended.returncode == 2
        assert ended.stderr.count("\n") == 1
        assert "socket=PATH" in ended.stderr
