"""``run``: QEMU beside the devices, and the guest's answer as ours."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.command import COMMAND, environment, run_command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "console,chardev=stdio"], "chardev=stdio"),
        (["--device", "console,chardev=pty,chardev=stdio"], "chardev=stdio"),
        (["--device", "rng", "--exec", "true", "--", "-kernel", "x"], "--exec"),
        (["--device", "rng", "--append", "quiet", "--", "-cdrom", "x"], "--append"),
        (["--exec", "true"], "no device"),
    ],
)
def test_usage(arguments: list[str], words: str) -> None:
    ended = run_command("run", *arguments)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert words in ended.stderr


def test_a_device_is_made_before_anything_is_fetched(tmp_path: Path) -> None:
    ended = run_command(
        "run", "--device", "blk,path=none", "--exec", "true", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path)
    )
    assert ended.returncode == 4
    assert list(tmp_path.iterdir()) == []


def test_a_qemu_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "qemu"
    old.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.1 (Debian 1:7.2)'\n")
    old.chmod(0o755)
    ended = run_command("run", "--device", "rng", "--exec", "true", VFIOUSER_VIRTIO_QEMU=str(old))
    assert ended.returncode == 5
    assert ended.stderr.count("\n") == 1
    assert "7.2.1" in ended.stderr
    assert "10.1" in ended.stderr


@pytest.mark.qemu
@pytest.mark.parametrize("how", [(), ("--processes",)], ids=["one-process", "processes"])
def test_exec_gives_output_and_status(how: tuple[str, ...]) -> None:
    command = "lspci -n | grep -c 5000:; cat /sys/bus/virtio/devices/*/vendor; head -c 4 /dev/hwrng | wc -c; exit 7"
    ended = run_command("run", *how, "--ids", "2007", "--device", "rng", "--device", "console", "--exec", command)
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout.split() == ["2", "0x5000", "0x5000", "4"]
    assert "console0 on the host: pty /dev/pts/" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.qemu
def test_qemu_that_fails_is_said_so() -> None:
    ended = run_command("run", "--device", "rng", "--exec", "true", "--", "-nosuchoption")
    assert ended.returncode == 5
    assert "nosuchoption" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.qemu
def test_a_signal_ends_qemu_too(tmp_path: Path) -> None:
    command = [
        *COMMAND,
        "run",
        "--device",
        f"rng,socket={tmp_path}/a.sock",
        "--exec",
        "echo started >/dev/ttyS0; sleep 99",
    ]
    with subprocess.Popen(
        [*command, "--", "-pidfile", f"{tmp_path}/pid"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (tmp_path / "pid").exists():
            assert process.poll() is None, process.communicate()
        qemu = int((tmp_path / "pid").read_text() or "0")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert not os.path.exists(f"/proc/{qemu}") or not qemu
        assert not (tmp_path / "a.sock").exists()
