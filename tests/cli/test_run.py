"""``run``: QEMU beside the devices, and the guest's answer as ours."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import COMMAND, PATIENCE, environment, run_command

from vfiouser_virtio.vm import debian, guest_image


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "console,chardev=stdio"], "chardev=stdio"),
        (["--device", "console,chardev=pty,chardev=stdio"], "chardev=stdio"),
        (["--device", "rng", "--exec", "true", "--", "-kernel", "x"], "--exec"),
        (["--device", "rng", "--append", "quiet", "--", "-cdrom", "x"], "--append"),
        (["--exec", "true"], "no device"),
        (["--device", "rng", "--timeout", "3"], "--timeout is for --exec"),
        (["--device", "rng", "--guests", "2"], "--guests is for --exec"),
        (["--device", "rng", "--guests", "0", "--exec", "true"], "--guests 0: expected 1 to 32"),
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


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    cache = tmp_path / "vfiouser-virtio"
    cache.mkdir()
    (cache / "lock").mkdir()  # root may write anywhere, but not into a folder
    ended = run_command("run", "--device", "rng", "--exec", "true", XDG_CACHE_HOME=str(tmp_path), PATH="/usr/bin:/bin")
    assert ended.returncode == 5
    assert ended.stderr.count("\n") == 1
    assert "lock" in ended.stderr
    # A shell has its banner before anything is fetched.
    devices = ["--device", "rng", "--device", "blk,size=1M,id=disk"]
    ended = run_command("run", *devices, XDG_CACHE_HOME=str(tmp_path), PATH="/usr/bin:/bin")
    assert ended.returncode == 5
    assert ended.stderr.splitlines()[:2] == [
        "vfiouser-virtio: a shell in a small Linux guest, in some seconds, with rng0 (rng), disk (blk)",
        "vfiouser-virtio: to leave: type `poweroff`, or press Ctrl-A x (Ctrl-A c shows QEMU's monitor)",
    ]
    assert "lock" in ended.stderr.splitlines()[2]


@pytest.mark.parametrize("command", [["list-devices"], ["qemu-args", "--socket", "/tmp/a.sock"]])
def test_stdout_that_takes_nothing(command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [*COMMAND, *command], env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    words = "vfiouser-virtio: cannot write to stdout: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (6, words)


@pytest.mark.parametrize("command", [["list-devices"], ["list-devices", "--json"], ["qemu-args", "--socket", "a"]])
def test_stdout_that_nobody_reads(command: list[str]) -> None:
    """As with ``| head``, which has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody:
        ended = subprocess.run(
            [*COMMAND, *command], env=environment(), stdout=nobody, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (ended.returncode, ended.stderr) == (0, "")


# What apt-get does, as far as `vm.debian` needs it: a mirror, and packages, until the disk is full.
APT_GET = """#!/bin/sh
PATH=/usr/bin:/bin
for word in "$@"; do
    case "$word" in Dir::Cache::archives=*) archives=${word#*=};; Dir::State::lists=*) lists=${word#*=}/lists;; esac
done
case "$*" in
*--print-uris*) echo "'http://deb.example/debian/dists/CODENAME/InRelease' x 0";;
*update*) head -c LISTS /dev/zero >"$lists" 2>/dev/null && exit 0
    rm "$lists"; echo 'E: Failed to fetch: Write error - write (28: No space left on device)' >&2; exit 100;;
*install*) cp PACKAGE "$archives/" || { echo 'E: Write error - write (28: No space left on device)' >&2; exit 100; };;
esac
"""


@pytest.mark.once
@pytest.mark.parametrize(
    ("room", "lists", "words"),
    [
        pytest.param("8m", "9M", "no mirror", id="while-reading-lists", marks=pytest.mark.variant),
        pytest.param("1m", "1", "apt cannot fetch", id="while-downloading", marks=pytest.mark.variant),
        pytest.param("3m", "1", "unpacking", id="while-unpacking"),
        pytest.param("16m", "1", "remove that", id="room-enough"),
    ],
)
def test_a_disk_that_fills_while_fetching(tmp_path: Path, room: str, lists: str, words: str) -> None:
    (tmp_path / "tree/DEBIAN").mkdir(parents=True)
    (tmp_path / "tree/DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    (tmp_path / "tree/much").write_bytes(os.urandom(2 << 20))
    package = tmp_path / "x_1_all.deb"
    subprocess.run(
        ["dpkg-deb", "-b", "--root-owner-group", tmp_path / "tree", package], check=True, capture_output=True
    )
    folder = tmp_path / "bin"
    folder.mkdir()
    apt = (
        APT_GET.replace("CODENAME", debian.codename() or "stable")
        .replace("PACKAGE", str(package))
        .replace("LISTS", lists)
    )
    (folder / "apt-get").write_text(apt)
    (folder / "apt-get").chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir()
    run = ["run", "--device", "rng", "--exec", "true"]
    # A file system of its own, that is gone with the process; without root that takes a user namespace.
    command = (
        'mount -t tmpfs -o "size=$0" tmpfs "$XDG_CACHE_HOME" && "$@"; status=$?; find "$XDG_CACHE_HOME"; exit $status'
    )
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, room, sys.executable, "-m", "vfiouser_virtio", *run],
        env=environment(XDG_CACHE_HOME=str(cache), PATH=f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 5, ended.stderr
    complaint = ended.stderr.splitlines()[-1]
    assert words in complaint
    assert "Traceback" not in ended.stderr
    assert complaint.endswith(f"the disk of {cache}/vfiouser-virtio is full") == (room != "16m")
    # Nothing half is left; what is whole is, though there is no QEMU in this one.
    left = {
        Path(line).relative_to(cache).parts[1]
        for line in ended.stdout.splitlines()
        if line.count("/") > str(cache).count("/") + 1
    }
    assert {name.partition("-")[0] for name in left} == (
        {"lock", "apt", "qemu"} if room == "16m" else {"lock", "apt"}
    ), left


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
def test_several_guests_have_devices_of_their_own_and_end_together() -> None:
    script = 'echo "I am $GUEST of $(hostname)"; printf "no end" >&2; exit $((GUEST + 6))'
    ended = run_command("run", "--guests", "2", "--device", "rng", "--exec", script)
    assert sorted(ended.stdout.splitlines()) == ["guest1: I am 1 of guest1", "guest2: I am 2 of guest2"]
    # On a machine that is busy enough, the watchdog has something to say as well.
    said = [line for line in ended.stderr.splitlines() if "no end" in line]
    assert sorted(said) == ["guest1: no end", "guest2: no end"]
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 7  # of the first that has failed


# The next test, and a session of the README, have output and status, too.
@pytest.mark.variant
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
def test_streams_come_apart_and_at_once() -> None:
    # It ends when what it has printed was seen here, and something of it stays in the background.
    script = "echo out; echo err >&2; sleep 999 & until read -r go </dev/hvc0; do :; done; printf '\\000\\377'; exit 7"
    devices = ["--processes", "--device", "console,chardev=pty"]
    with subprocess.Popen(
        [*COMMAND, "run", *devices, "--exec", script],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        host_side = process.stderr.readline().decode()
        assert process.stdout.readline() == b"out\n"
        assert next(line for line in process.stderr if not line.startswith(b"vfiouser-virtio: ")) == b"err\n"
        with open(host_side.split("pty ")[1].strip(), "wb", buffering=0) as console:
            console.write(b"go\n")
        assert process.stdout.read() == b"\0\xff"
        assert process.stderr.read() == b""
        assert process.wait(60) == 7


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("script", "status"),
    [
        pytest.param("sleep 999", 124, id="hang"),
        pytest.param("poweroff; sleep 999", 5, id="poweroff", marks=pytest.mark.variant),
        pytest.param("echo c >/proc/sysrq-trigger; sleep 999", 5, id="panic"),
    ],
)
def test_what_came_is_kept(script: str, status: int) -> None:
    def run(timeout: int) -> subprocess.CompletedProcess[str]:
        words = f"echo out; echo err >&2; sleep 1; {script}"
        return run_command("run", "--device", "rng", "--timeout", f"{timeout}", "--exec", words)

    ended = run(8 if status == 124 else 200)
    if status == 124 and not (ended.stdout == "out\n" and "err\n" in ended.stderr):
        ended = run(60)  # a busy guest had not come to its first lines in time
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == "out\n"
    assert "err\n" in ended.stderr
    assert ("the guest's kernel panicked" in ended.stderr) == ("sysrq" in script)
    assert "Traceback" not in ended.stderr


@pytest.mark.qemu
def test_nobody_reads() -> None:
    command = [*COMMAND, "run", "--accel", "tcg", "--device", "rng", "--exec", "while :; do echo much; done"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"much\n"
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(120) == 6
        assert errors == "vfiouser-virtio: cannot write to stdout: Broken pipe\n"


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


# A /dev of its own, in which KVM is there, and fails, or is not there at all: whatever this machine has.
DEV = """
mount -t tmpfs tmpfs "$0"
for name in null zero random urandom "$1"; do touch "$0/$name"; done
for name in null zero random urandom; do mount --bind "/dev/$name" "$0/$name"; done
[ -z "$1" ] || mount --bind /dev/null "$0/$1"
mount --rbind "$0" /dev
shift
"$@"
"""


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("kvm", "words"),
    [
        (
            "kvm",
            "a stock kernel does not boot on KVM here (qemu: failed to initialize kvm: No such device); use tcg or",
        ),
        ("", "/dev/kvm is not there or may not be opened by this user"),
    ],
    ids=["it-fails", "it-is-not-there"],
)
def test_kvm_that_cannot_be_had(tmp_path: Path, kvm: str, words: str) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text(
        '#!/bin/sh\ncase "$*" in --version) echo QEMU emulator version 11.0.0;; *help*) echo \'"vfio-user-pci"\';;\n'
        "*) echo 'qemu: failed to initialize kvm: No such device' >&2; exit 1;; esac\n"
    )
    qemu.chmod(0o755)
    # The guest from the cache, and nothing that is known of KVM.
    cache = tmp_path / "vfiouser-virtio"
    cache.mkdir()
    guest_image()
    for each in debian.cache_dir().iterdir():
        if each.is_dir() or each.suffix == ".cpio":
            (cache / each.name).symlink_to(each)
    run = ["run", "--device", "rng", "--accel", "kvm", "--exec", "true"]
    (tmp_path / "dev").mkdir()
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", DEV, str(tmp_path / "dev"), kvm, sys.executable, "-m", "vfiouser_virtio", *run],
        env=environment(XDG_CACHE_HOME=str(tmp_path), VFIOUSER_VIRTIO_QEMU=str(qemu)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 5, ended.stderr
    assert f"--accel kvm: {words}" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
