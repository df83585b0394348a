"""Which QEMU is taken, with programs that only pretend to be one."""

from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm import qemu

CLIENT = 'name "vfio-user-pci", bus PCI, desc "VFIO over socket PCI device assignment"'


def pretend(path: Path, version: str, devices: str = CLIENT) -> Path:
    path.write_text(
        f"#!/bin/sh\ncase $1 in\n--version) echo '{version}' ;;\n-device) cat <<'EOF'\n{devices}\nEOF\n;;\nesac\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(qemu.ENVIRONMENT_VARIABLE, raising=False)


def test_new_enough(tmp_path: Path) -> None:
    program = pretend(tmp_path / "qemu", "QEMU emulator version 10.1.0 (v10.1.0)")
    assert qemu.find_qemu(program) == qemu.Qemu((str(program),), (10, 1, 0), {})


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("QEMU emulator version 7.2.0 (Debian 1:7.2+dfsg-7+deb12u18)", "7.2.0"),
        ("QEMU emulator version 10.0.8", "10.0.8"),
        ("QEMU emulator version 9.2.50 (v9.2.0-1-g0)", "9.2.50"),
    ],
)
def test_too_old_says_which_and_what_is_needed(tmp_path: Path, line: str, shown: str) -> None:
    program = pretend(tmp_path / "qemu", line)
    with pytest.raises(ConfigError) as caught:
        qemu.find_qemu(program)
    assert str(caught.value) == f"QEMU {shown} at {program} is too old: vfio-user-pci needs QEMU 10.1 or newer"


def test_environment_variable_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pretend(tmp_path / "qemu", "QEMU emulator version 11.1.3")
    monkeypatch.setenv(qemu.ENVIRONMENT_VARIABLE, str(program))
    assert qemu.find_qemu().version == (11, 1, 3)


def test_built_without_the_client(tmp_path: Path) -> None:
    program = pretend(tmp_path / "qemu", "QEMU emulator version 11.1.3", 'name "virtio-net-pci", bus PCI')
    with pytest.raises(ConfigError, match="built without vfio-user-pci"):
        qemu.find_qemu(program)


def test_program_that_is_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not QEMU"):
        qemu.find_qemu(pretend(tmp_path / "qemu", "GNU bash 5.2"))


def test_no_such_program(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no program"):
        qemu.find_qemu(tmp_path / "missing")


def test_old_one_in_path_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(tmp_path / "qemu-system-x86_64", "QEMU emulator version 7.2.0")
    fetched = qemu.Qemu(("fetched",), (11, 1, 3))
    monkeypatch.setattr(qemu, "fetch_qemu", lambda: fetched)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert qemu.find_qemu() is fetched
    assert "too old" in capsys.readouterr().err


def test_new_one_in_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pretend(tmp_path / "qemu-system-x86_64", "QEMU emulator version 10.2.1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert qemu.find_qemu().argv_prefix == (str(program),)
