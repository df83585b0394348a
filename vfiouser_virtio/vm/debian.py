"""Debian packages unpacked into the user's cache, without root and with apt's own signature check.

Nothing here names a host. The mirror is taken from the machine's own apt configuration, and our calls of apt work on a
private state (sources, lists, downloads) in the cache folder: the system's own state is only read.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vfiouser_virtio.errors import ConfigError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEFAULT_SUITE = "trixie"

# Raise it when the meaning of a cached folder changes.
_LAYOUT = 1
# The lists of a suite are kept this long: package sets asked for one after the other need one `apt-get update`.
_LISTS_FRESH_S = 3600
# `'URI/dists/SUITE/InRelease' file size`, the lines of `apt-get --print-uris update` that name a mirror and its suite.
_IN_RELEASE = re.compile(r"'([^']+?)/*/dists/([^'/]+)/InRelease'")
# Bytes that are left of a disk that is full: a file that was cut off is removed before we look.
_NEARLY_NOTHING = 4 << 20
# Packages between two signs of life; each is unpacked in a moment.
_TELL_EVERY = 50
TELL_AFTER_S = 5.0
"""Seconds of a download between two signs of life: a quick one needs none."""
# What a Debian mirror's own users call their suite if not by VERSION_CODENAME.
_SUITE_ALIASES = frozenset({"oldstable", "stable", "testing", "unstable", "sid"})


def cache_dir() -> Path:
    """The folder that keeps everything fetched or built: `$XDG_CACHE_HOME/vfiouser-virtio`, `~/.cache/…` without it.

    Raises ConfigError when it cannot be made.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored (XDG base directory specification).
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    folder = base / "vfiouser-virtio"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the cache folder {folder}: {error.strerror}; set XDG_CACHE_HOME") from None
    return folder


def progress(line: str) -> None:
    """Say on stderr what takes time."""
    print(f"vfiouser-virtio: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def cache_lock() -> Iterator[Path]:
    """Hold the lock of the cache folder, and give that folder: two runs at a time fetch one after the other."""
    folder = cache_dir()
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another run that fills {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Give a scratch folder that becomes `target` only when the block ends well; an interrupted run leaves no `target`.

    Call it with the cache lock held. What an earlier run that was killed left behind is removed.
    """
    for leftover in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch(
    name: str,
    packages: Sequence[str],
    *,
    suite: str = DEFAULT_SUITE,
    what: str = "",
    megabytes: int = 0,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """The folder with `packages` and all they depend on, unpacked; fetched at the first call, found at the next.

    `suite` is Debian's name of a release, or of its backports. `what` and `megabytes`, about its download, are said on
    stderr while it is fetched. No package script is ever run; `finish` does to the new folder, once, what one would
    have done.
    Raises ConfigError when there is no apt, no mirror that has the suite, or no such package.
    """
    target = cached_folder(name, packages, suite)
    if target.is_dir():
        return target
    with cache_lock() as folder:
        if target.is_dir():
            return target
        apt = Apt(folder / "apt", suite)
        with _full_disk_said_so(folder):
            apt.update()
        what = what or name
        size = f", about {megabytes} MB" if megabytes else ""
        progress(f"fetching {what}{size}: Debian {suite}, {' '.join(packages)}")
        with (
            complete_folder(target) as scratch,
            tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}.") as debs,
            _full_disk_said_so(folder),
        ):
            apt.download(packages, Path(debs))
            archives = sorted(Path(debs).glob("*.deb"))
            progress(f"unpacking {len(archives)} packages, {sum(a.stat().st_size for a in archives) / 1e6:.0f} MB")
            for number, archive in enumerate(archives, 1):
                if number % _TELL_EVERY == 0:
                    progress(f"unpacking: {number} of {len(archives)}")
                run(["dpkg-deb", "-x", str(archive), str(scratch)], f"unpacking {archive.name}")
            if finish is not None:
                finish(scratch)
        progress(f"{what}: {target}")
    return target


@contextlib.contextmanager
def _full_disk_said_so(folder: Path) -> Iterator[None]:
    """Of a full disk not every program says more than how much it has written."""
    try:
        yield
    except ConfigError as error:
        # apt has removed by now what it had no room for.
        if shutil.disk_usage(folder).free >= _NEARLY_NOTHING and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise ConfigError(f"{error}: the disk of {folder} is full") from None


def cached_folder(name: str, packages: Sequence[str], suite: str) -> Path:
    """Where `fetch` puts such a set: `name` and the suite for people, and a digest that changes with what is asked."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", suite):
        raise ConfigError(f"{suite!r} is not the name of a Debian suite")
    key = hashlib.sha256(json.dumps([_LAYOUT, suite, sorted(packages)]).encode()).hexdigest()[:12]
    return cache_dir() / f"{name}-{suite}-{key}"


def mirror_candidates(print_uris: str, codename: str) -> list[str]:
    """The mirrors that `apt-get --print-uris update` printed for the running release, best first.

    Third parties use Debian's suite names too, so a candidate is only one once its Release file is verified.
    """
    found = _IN_RELEASE.findall(print_uris)
    named = [uri for uri, suite in found if suite == codename]
    aliased = [uri for uri, suite in found if suite in _SUITE_ALIASES]
    return list(dict.fromkeys(named + aliased))


class Apt:
    """Calls of apt on a private state for one release and its backports."""

    def __init__(self, folder: Path, suite: str) -> None:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise ConfigError(
                    f"this system has no {tool}, so nothing can be fetched: install QEMU 10.1 or newer with "
                    "vfio-user-pci in PATH, and give a guest kernel of your own with --kernel FILE"
                )
        if not KEYRING.exists():
            raise ConfigError(f"{KEYRING} is missing, so packages cannot be verified: install debian-archive-keyring")
        release = suite.removesuffix("-backports")
        # The default release always comes with its backports, so that one state serves QEMU and the guest's kernel.
        with_backports = suite != release or release == DEFAULT_SUITE
        self.suite = suite
        self.suites = [release, f"{release}-backports"] if with_backports else [release]
        self.state = folder / "+".join(self.suites)
        self.sources = self.state / "sources.list"
        self.lists = self.state / "lists"

    def update(self) -> None:
        """Make the package lists present and fresh, from the first mirror whose signed Release file has the suites."""
        stamp = self.state / "updated"
        if stamp.exists() and abs(stamp.stat().st_mtime - time.time()) < _LISTS_FRESH_S:
            return
        (self.lists / "partial").mkdir(parents=True, exist_ok=True)
        (self.state / "status").touch()
        complaint = ""
        for mirror in _find_mirrors():
            self.sources.write_text("".join(f"deb [signed-by={KEYRING}] {mirror} {s} main\n" for s in self.suites))
            progress(f"reading the package lists of Debian {self.suite}")
            result = self._apt_get(["update"], self.state / "archives", "reading the package lists")
            if result.returncode == 0:
                stamp.touch()
                return
            complaint = result.stderr
        raise ConfigError(
            f"no mirror in apt's configuration gives a verified Debian {self.suite}"
            f"{_first_error(complaint)}: install QEMU 10.1 or newer in PATH, or try again with a network"
        )

    def download(self, packages: Sequence[str], folder: Path) -> None:
        """Download `packages` and their dependencies, as on a machine that has nothing installed."""
        (folder / "partial").mkdir()
        result = self._apt_get(["-y", "-d", "-t", self.suite, "install", *packages], folder, "downloading")
        if result.returncode != 0:
            raise ConfigError(f"apt cannot fetch {' '.join(packages)} from {self.suite}{_first_error(result.stderr)}")

    def _apt_get(self, arguments: list[str], archives: Path, doing: str) -> subprocess.CompletedProcess[str]:
        """Run apt-get, and say how far it is with what it is ``doing``, now and then."""
        options = {
            "Dir::Etc::sourcelist": self.sources,
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "-",
            "Dir::Etc::preferencesparts": "-",
            "Dir::State::lists": self.lists,
            "Dir::State::status": self.state / "status",
            "Dir::State::extended_states": self.state / "extended_states",
            "Dir::Cache": self.state,
            "Dir::Cache::archives": archives,
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Install-Recommends": "false",
            # A mirror that answers in part is one that failed.
            "APT::Update::Error-Mode": "any",
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Binary::apt-get::APT::Keep-Downloaded-Packages": "true",
        }
        if os.geteuid() == 0:
            # apt's unprivileged user cannot write into root's cache folder.
            options["APT::Sandbox::User"] = "root"
        command = ["apt-get"]
        for key, value in options.items():
            command += ["-o", f"{key}={value}"]
        reader, writer = os.pipe()
        command += ["-o", f"APT::Status-Fd={writer}", "-qq", *arguments]
        with open(reader) as status, tempfile.TemporaryFile("w+") as stderr:
            try:
                process = subprocess.Popen(
                    command,
                    env=os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    pass_fds=[writer],
                )
            finally:
                os.close(writer)
            with process:
                tell_percent(status, doing)
            stderr.seek(0)
            return subprocess.CompletedProcess(command, process.returncode, "", stderr.read())


def tell_percent(status: Iterable[str], doing: str) -> None:
    """Say what apt says of a download on its status descriptor: ``dlstatus:ITEM:PERCENT:DESCRIPTION``."""
    said = time.monotonic()
    for line in status:
        kind, _, rest = line.partition(":")
        percent = rest.partition(":")[2].partition(".")[0]
        if kind == "dlstatus" and percent.isdecimal() and time.monotonic() - said >= TELL_AFTER_S:
            progress(f"{doing}: {percent} %")
            said = time.monotonic()


def _find_mirrors() -> list[str]:
    """The mirrors to try. Raises ConfigError when apt's configuration has none for the running release."""
    printed = run(["apt-get", "--print-uris", "update"], "reading apt's configuration")
    mirrors = mirror_candidates(printed, codename())
    if not mirrors:
        raise ConfigError("apt's configuration names no Debian mirror: install QEMU 10.1 or newer in PATH")
    return mirrors


def codename(os_release: Path = Path("/etc/os-release")) -> str:
    """VERSION_CODENAME of os-release, empty without one."""
    with contextlib.suppress(FileNotFoundError):
        match = re.search(r'^VERSION_CODENAME="?([^"\n]*)', os_release.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return ""


def run(command: list[str], doing: str) -> str:
    """The output of a command. Raises ConfigError that says what `doing` met."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C"})
    if result.returncode != 0:
        raise ConfigError(f"{doing} failed{_first_error(result.stderr)}")
    return result.stdout


def _first_error(stderr: str) -> str:
    """` (…)` with the first line of apt's complaint, or nothing."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")] or lines
    return f" ({errors[0].strip()})" if errors else ""
