"""The choice of the accelerator, with a probe that only pretends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm import GuestImage, Kernel, Qemu, accel, guest_image

QEMU = Qemu(("qemu",), (11, 1, 3))
IMAGE = GuestImage(Kernel("6.12", Path("vmlinux"), None), Path("initramfs"))


@pytest.fixture
def probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the probe will find, one after another; /dev/kvm is there."""
    results: list[bool] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr(accel, "fails_on_kvm", lambda qemu, image: "" if results.pop(0) else "KVM: Bad address")
    return results


def test_named_one_is_taken_without_a_probe(probes: list[bool]) -> None:
    assert accel.choose_accel(QEMU, IMAGE, "tcg") == "tcg"


def test_kvm_that_does_not_work_is_said_so(probes: list[bool]) -> None:
    probes += [False, True]
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ConfigError, match=r"--accel kvm: .* does not boot on KVM here \(KVM: Bad address\)"):
            accel.choose_accel(QEMU, IMAGE, "kvm")
    assert accel.choose_accel(Qemu(("qemu",), (12, 0, 0)), IMAGE, "kvm") == "kvm"


def test_a_qemu_that_fails_on_kvm_is_quoted(tmp_path: Path) -> None:
    fake = tmp_path / "qemu"
    fake.write_text("#!/bin/sh\necho 'qemu: failed to initialize kvm: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    image = GuestImage(Kernel("6.12", Path("vmlinux"), None), Path("initramfs"))
    assert accel.fails_on_kvm(Qemu((str(fake),), (11, 1, 3)), image) == (
        "qemu: failed to initialize kvm: Permission denied"
    )


def test_other_word_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--accel hvf: expected auto, kvm or tcg"):
        accel.choose_accel(QEMU, IMAGE, "hvf")


def test_machine_without_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert accel.choose_accel(QEMU, IMAGE) == "tcg"
    with pytest.raises(ConfigError, match="/dev/kvm is not there"):
        accel.choose_accel(QEMU, IMAGE, "kvm")


def test_probe_runs_once_for_each_qemu(probes: list[bool]) -> None:
    probes += [False, True]
    newer = Qemu(("qemu",), (12, 0, 0))
    assert [accel.choose_accel(q, IMAGE) for q in (QEMU, newer, QEMU, newer)] == ["tcg", "kvm", "tcg", "kvm"]
    assert probes == []


def test_damaged_cache_is_no_cache(probes: list[bool], tmp_path: Path) -> None:
    cache = tmp_path / "vfiouser-virtio/kvm-probe.json"
    cache.parent.mkdir()
    cache.write_text('{"works": 3')
    probes += [True]
    assert accel.choose_accel(QEMU, IMAGE) == "kvm"


@pytest.mark.qemu
def test_setting_up_tries_it_so_that_nothing_later_says_so() -> None:
    ended = subprocess.run([sys.executable, "-m", "vfiouser_virtio.vm"], capture_output=True, text=True, check=True)
    assert [line.split(": ")[0] for line in ended.stdout.splitlines()][1:] == [
        f"kernel {guest_image().kernel.version}",
        "initramfs",
        "accelerator",
    ]
    again = subprocess.run([sys.executable, "-m", "vfiouser_virtio.vm"], capture_output=True, text=True, check=True)
    assert (again.stdout, again.stderr) == (ended.stdout, "")
