"""Linux under the audit: no rule is found broken but the one that its balloon driver does break."""

import json
from pathlib import Path

import pytest
from support.command import run_command

pytestmark = pytest.mark.qemu

_DEVICES = (
    "blk,size=16M,num-queues=2",
    "net,queues=2,mtu=1500",
    "rng",
    "console,chardev=null",
    "balloon",
    "input,kind=keyboard",
)
_SCRIPT = """
dd if=/dev/zero of=/dev/vda bs=64k count=20 conv=fsync && dd if=/dev/vda of=/dev/null bs=4k count=50 &&
head -c 100 /dev/hwrng > /dev/null && ip link set eth0 up && ip addr add 192.168.77.1/24 dev eth0
ping -c 1 -W 1 192.168.77.9
echo done
"""
_KNOWN = {("balloon0", "init/notify-early")}
"""It kicks statsq in its probe, before DRIVER_OK."""


@pytest.mark.parametrize(
    "kernel",
    [
        "trixie",
        pytest.param("bookworm", marks=pytest.mark.variant),
        pytest.param("trixie-backports", marks=pytest.mark.variant),
    ],
)
def test_linux(kernel: str, tmp_path: Path) -> None:
    devices = [word for device in _DEVICES for word in ("--device", device)]
    report = tmp_path / "found.json"
    ended = run_command("run", f"--audit={report}", "--kernel", kernel, "--cpus", "2", *devices, "--exec", _SCRIPT)
    assert ended.returncode == 8, ended.stderr
    assert ended.stdout.endswith("done\n")
    # SeaBIOS, which looks for a disk to boot from, comes first: run 1 of blk0's drivers.
    found = {
        (device["device"], finding["rule"]): finding
        for device in json.loads(report.read_text())["devices"]
        for finding in device["findings"]
        if device["device"] != "blk0" or max(finding["runs"]) > 1
    }
    assert set(found) == _KNOWN, found
