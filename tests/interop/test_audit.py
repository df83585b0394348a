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

kernels = pytest.mark.parametrize(
    "kernel",
    [
        "trixie",
        pytest.param("bookworm", marks=pytest.mark.variant),
        pytest.param("trixie-backports", marks=pytest.mark.variant),
    ],
)


@kernels
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


# Each guest fetches a file from the other: segments that are to be cut, by IPv4, by IPv6, and in a VLAN.
_NETWORK = """
dd if=/dev/urandom of=/tmp/file bs=1M count=1 2>/dev/null
ethtool -L eth0 combined 1 && ethtool -L eth0 combined 2
ethtool -S eth0 >/dev/null
ip link add link eth0 name eth0.7 type vlan id 7 && ip link set eth0.7 up && ip addr add 198.51.100.$GUEST/24 dev eth0.7
ip -6 addr add 2001:db8::$GUEST/64 dev eth0
httpd -p [::]:80 -h /tmp
other=$((3 - GUEST))
for host in guest$other 198.51.100.$other [2001:db8::$other]; do
    for i in $(seq 100); do
        if wget -q -O /tmp/got http://$host/file; then echo got a file; break; fi
        sleep 1
    done
done
ping -c 1 -s 3000 guest$other >/dev/null && echo done
"""


@kernels
def test_two_guests_on_a_network(kernel: str, tmp_path: Path) -> None:
    report = tmp_path / "found.json"
    device = ("--device", "net,hub=lan,queues=2,hash=on")
    command = ("run", f"--audit={report}", "--kernel", kernel, "--cpus", "2", "--guests", "2", *device)
    ended = run_command(*command, "--exec", _NETWORK)
    assert ended.stdout.count("got a file") == 6, ended.stdout + ended.stderr
    assert ended.stdout.count("done") == 2
    assert [device["findings"] for device in json.loads(report.read_text())["devices"]] == [[], []]
    assert ended.returncode == 0, ended.stderr
