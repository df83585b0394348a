"""What can be said of fetching without a network: the mirror, the cache folder, and the error lines."""

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm import debian

PRINTED = """\
'http://deb.example/debian/dists/bookworm/InRelease' deb.example_debian_dists_bookworm_InRelease 0
'http://deb.example/debian/dists/bookworm-updates/InRelease' deb.example_debian_dists_bookworm-updates_InRelease 0
'http://deb.example/debian-security/dists/bookworm-security/InRelease' x 0
'https://third.example/linux/dists/bookworm/InRelease' x 0
'https://other.example/apt/dists/stable/InRelease' x 0
'https://node.example/node_20.x/dists/nodistro/InRelease' x 0
'http://deb.example/debian//dists/bookworm/InRelease' x 0
'http://deb.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' x 0
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/vfiouser-virtio"


@pytest.fixture
def fake_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH is one empty folder, for programs of the test's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_mirrors_of_the_running_release_come_first_each_once() -> None:
    assert debian.mirror_candidates(PRINTED, "bookworm") == [
        "http://deb.example/debian",
        "https://third.example/linux",
        "https://other.example/apt",
    ]


def test_no_mirror_in_other_output() -> None:
    assert debian.mirror_candidates("E: nothing\n'http://x.example/y' z 0\n", "bookworm") == []


@pytest.mark.parametrize("missing", ["apt-get", "dpkg-deb"])
def test_system_without_apt_gets_one_line_that_says_what_to_do(cache: Path, fake_path: Path, missing: str) -> None:
    for tool in {"apt-get", "dpkg-deb"} - {missing}:
        script(fake_path / tool, "exit 0")
    with pytest.raises(ConfigError) as caught:
        debian.fetch("qemu", ["qemu-system-x86"])
    assert f"no {missing}" in str(caught.value)
    assert "QEMU 10.1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mirror_that_does_not_answer_is_one_line_and_leaves_no_folder(
    cache: Path, fake_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    monkeypatch.setattr(debian, "KEYRING", keyring)
    printing = f"cat <<'EOF'\n'http://deb.example/debian/dists/{debian.codename() or 'stable'}/InRelease' x 0\nEOF"
    script(
        fake_path / "apt-get",
        f'PATH=/usr/bin:/bin\ncase "$*" in\n*print-uris*)\n{printing}\nexit 0;;\nesac\n'
        "echo 'W: noise' >&2\necho 'E: Failed to fetch, no route' >&2\nexit 100",
    )
    script(fake_path / "dpkg-deb", "exit 0")
    with pytest.raises(ConfigError, match=r"E: Failed to fetch, no route") as caught:
        debian.fetch("qemu", ["qemu-system-x86"])
    assert "\n" not in str(caught.value)
    assert [path.name for path in cache.iterdir() if path.name.startswith("qemu")] == []


def test_a_download_shows_how_far_it_is_but_not_more_often_than_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    status = [f"dlstatus:{item}:{item / 2}:Retrieving file {item} of 200\n" for item in range(201)]
    debian.tell_percent(["pmstatus:x:1.5:Installing\n", "garbage\n", "dlstatus:1\n", *status], "downloading")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "vfiouser-virtio: downloading: 2 %"
    assert 20 < len(said) <= 200 / 5
    debian.tell_percent(["dlstatus:1:50.0:Retrieving\n"], "downloading")  # over in a moment
    assert capsys.readouterr().err == ""


def test_what_apt_says_of_its_progress_is_heard(
    fake_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    monkeypatch.setattr(debian, "KEYRING", keyring)
    monkeypatch.setattr(debian, "TELL_AFTER_S", 0)
    script(fake_path / "dpkg-deb", "exit 0")
    script(
        fake_path / "apt-get",
        'for word in "$@"; do case "$word" in APT::Status-Fd=*) fd=${word#*=};; esac; done\n'
        'echo "dlstatus:1:41.7:Retrieving file 1 of 3" >/proc/self/fd/$fd\necho "E: in the end" >&2\nexit 100',
    )
    (tmp_path / "debs").mkdir()
    with pytest.raises(ConfigError, match="E: in the end"):
        debian.Apt(tmp_path / "apt", "sid").download(["x"], tmp_path / "debs")
    assert capsys.readouterr().err == "vfiouser-virtio: downloading: 41 %\n"


def test_second_call_runs_no_program(cache: Path, fake_path: Path) -> None:
    with pytest.raises(ConfigError, match="no apt-get"):
        debian.fetch("tools", ["b", "a"], suite="sid")
    # The name of the folder does not depend on the order, and does on what is asked.
    names = {debian.cached_folder("tools", packages, "sid").name for packages in (["a", "b"], ["b", "a"], ["a"])}
    assert len(names) == 2
    target = debian.cached_folder("tools", ["a", "b"], "sid")
    target.mkdir()
    assert debian.fetch("tools", ["b", "a"], suite="sid") == target


def test_suite_that_is_no_name_is_refused(cache: Path) -> None:
    with pytest.raises(ConfigError, match="not the name of a Debian suite"):
        debian.fetch("x", ["y"], suite="trixie main\ndeb http://elsewhere x")


def test_interrupted_run_leaves_nothing_and_the_next_removes_what_a_kill_left(tmp_path: Path) -> None:
    target = tmp_path / "qemu"

    def interrupted() -> None:
        with debian.complete_folder(target) as scratch:
            (scratch / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    killed = tmp_path / ".qemu.killed"
    killed.mkdir()
    with debian.complete_folder(target) as scratch:
        (scratch / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["qemu"]
    assert (target / "whole").exists()
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_two_runs_at_once_go_one_after_the_other(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entered = threading.Event()

    def second() -> None:
        with debian.cache_lock():
            entered.set()

    with debian.cache_lock():
        thread = threading.Thread(target=second)
        thread.start()
        # Long enough for it to have gone in if the lock did not hold.
        time.sleep(0.3)
        assert not entered.is_set()
    thread.join(30)
    assert entered.is_set()
    assert "waiting for another run" in capsys.readouterr().err


def test_cache_folder_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot make the cache folder"):
        debian.cache_dir()


def test_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert debian.cache_dir() == tmp_path / ".cache/vfiouser-virtio"
    assert os.listdir(tmp_path) == [".cache"]
