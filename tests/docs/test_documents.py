"""README.md and docs/*.md say what is true: their files are written, their commands run, their links resolved.

Conventions for fenced blocks:

- A second word after the language is a file name (```` ```python ramdisk.py ````): the block is that file. A command
  finds every file shown above it; a later block of the same name takes the place of an earlier one.
- ``python`` without a file name is a fragment: it only has to compile (``await`` may stand alone). ``json`` and
  ``toml`` have to parse.
- ``console`` is a session: ``$`` and a command, which goes on in the next line after a backslash or within quotes, then
  what it prints, stdout and stderr together, from the first line to the last. ``…`` stands for any text within a line;
  alone on a line, for any number of lines. Lines of our log count only where a session shows some, and then at any
  time of day.
- ``serve``, and what ``python3`` runs, go on until the end of their session. ``qemu-system-x86_64`` is the one that
  `vfiouser_virtio.vm` finds. Of ``scripts/…`` it is only checked that they exist; ``pip`` and ``git`` are not run.
- ``sh``, and blocks without a language, are not run.
- Sessions of docs/libvfio-user.md are run where the library is found.

Each session is a test with a folder of its own; the ``truncate`` commands of the sessions above it are run first.
"""

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.command import environment
from support.libvfio_user_found import find

pytestmark = pytest.mark.once

TOP = Path(__file__).parents[2]
DOCUMENTS = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
PATIENCE = 120

_FENCE = re.compile(r"^```(\w*)[ ]?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} [A-Z]+ ")
# The log and what a guest prints, which comes in pieces, are two streams: a line of one can fall into one of the other.
_LOG_WITHIN = re.compile(r"^(.+?)(\d\d:\d\d:\d\d\.\d{3} [A-Z]+ .*\n)", re.MULTILINE)
# Once per kernel and modules, by who comes first on a machine.
_SET_UP = re.compile(r"^vfiouser-virtio: building the guest's initramfs .*\n", re.MULTILINE)
_LOG_TIME = re.compile(r"^\d\d:\d\d:\d\d\.\d{3} ", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FILE = re.compile(r"`((?:tests|scripts|docs|examples|vfiouser_virtio|protocols)/[\w/.@-]*)")
_SERVES = re.compile(r"(vfiouser-virtio serve|python3) [^;|&]*")
_BOOTS = re.compile(r"\bvfiouser-virtio run\b|\bqemu-system-x86_64\b|--virtio-carrier=(all|qtest)\b|\btest_linux\.py")


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    language: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


@dataclass(frozen=True)
class Step:
    """A command of a session and what it is to print."""

    command: str
    output: str

    def with_sockets_in(self, folder: Path) -> "Step":
        """The same with sockets of its own: those of the document may be in use on this machine."""
        return Step(*(re.sub(r"/tmp/(?=\w+\.sock\b)", f"{folder}/", text) for text in (self.command, self.output)))


def blocks(document: Path) -> list[Block]:
    text = document.read_text()
    return [
        Block(document, text.count("\n", 0, match.start()) + 1, match[1], match[2], match[3])
        for match in _FENCE.finditer(text)
    ]


def steps(session: Block) -> Iterator[Step]:
    for part in re.split(r"^\$ ", session.text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        end = next(end for end in range(1, len(lines) + 1) if is_whole("".join(lines[:end])))
        yield Step("".join(lines[:end]).rstrip("\n"), "".join(lines[end:]))


def is_whole(command: str) -> bool:
    """Whether a shell would not wait for more of it."""
    try:
        return not command.endswith("\\\n") and bool(shlex.split(command))
    except ValueError:  # no closing quotation
        return False


def sessions() -> list[object]:
    return [
        pytest.param(block, id=str(block), marks=_marks(block))
        for document in DOCUMENTS
        for block in blocks(document)
        if block.language == "console"
    ]


def _marks(session: Block) -> list[pytest.MarkDecorator]:
    if not _BOOTS.search(session.text):
        return []
    return [pytest.mark.qemu] if session.document.name == "README.md" else [pytest.mark.qemu, pytest.mark.variant]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which the commands of the documents are those of this checkout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    own = environment()["PATH"]
    for name, words in {
        "vfiouser-virtio": "-m vfiouser_virtio",
        "qemu-system-x86_64": "-m vfiouser_virtio.vm qemu",
        "pytest": "-m pytest",
        "python": "",
        "python3": "",
    }.items():
        script = folder / name
        # Not for what these run in turn, as `run` looks for a QEMU on PATH, but for this one: a server that is fuzzed.
        inner = f"{folder / 'inner'}:{own}"
        script.write_text(f'#!/bin/sh\nPATH={shlex.quote(inner)}\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        script.chmod(0o755)
    (folder / "inner").mkdir()
    (folder / "inner" / "vfiouser-virtio").symlink_to(folder / "vfiouser-virtio")
    return f"{folder}:{own}"


@pytest.mark.parametrize("session", sessions())
def test_session(session: Block, path: str, tmp_path: Path) -> None:
    library, reason = find()
    with_library = session.document.name == "libvfio-user.md"
    if with_library and library is None:
        pytest.skip(reason)
    folder = tmp_path / "work"
    folder.mkdir()
    processes = []
    prepare(session, folder)
    try:
        for step in steps(session):
            step = step.with_sockets_in(folder)
            program = shlex.split(step.command)[0]
            if program.startswith("scripts/"):
                assert (TOP / program).exists(), step.command
            elif program not in ("pip", "git"):
                process = start(step.command, folder, path, with_library)
                processes.append(process)
                if _SERVES.fullmatch(step.command):
                    printed = read_until(folder, step.output, process)
                else:
                    process.wait(PATIENCE)
                    printed = output(folder)
                check(session, step, printed)
    finally:
        for process in processes:
            if process.poll() is None:  # a server, or what has taken too long: its shell, too
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(PATIENCE)


def prepare(session: Block, folder: Path) -> None:
    """What is above a session: its document's files, and the files that other sessions have made."""
    for block in blocks(session.document):
        if block.line >= session.line:
            break
        if block.name:
            (folder / block.name).write_text(block.text)
        for step in steps(block) if block.language == "console" else ():
            if step.command.startswith("truncate "):
                subprocess.run(shlex.split(step.command), cwd=folder, check=True)


def start(command: str, folder: Path, path: str, with_library: bool) -> subprocess.Popen[bytes]:
    # Elsewhere nobody has one: it would only change how many tests "all carriers" makes.
    library = {} if with_library else {"LIBVFIO_USER": "/nonexistent"}
    # `exec`, so that a signal reaches the command itself.
    words = f"exec {command}" if _SERVES.fullmatch(command) else command
    number = len(list(folder.parent.glob("output*")))
    with (folder.parent / f"output{number}").open("wb") as out:
        return subprocess.Popen(
            ["sh", "-c", words],
            cwd=folder,
            env=environment(PATH=path, COLUMNS="120", PYTHONDONTWRITEBYTECODE="1", **library),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def output(folder: Path) -> str:
    newest = max(folder.parent.glob("output*"), key=lambda file: int(file.name.removeprefix("output")))
    return newest.read_text(errors="replace")


def read_until(folder: Path, expected: str, process: subprocess.Popen[bytes]) -> str:
    """What a server prints: until it has printed what is expected, or for too long, or until it has ended."""
    deadline = time.monotonic() + PATIENCE
    while True:
        printed = output(folder)
        if matches(expected, printed) or process.poll() is not None or time.monotonic() > deadline:
            return printed
        time.sleep(0.05)


def check(session: Block, step: Step, printed: str) -> None:
    assert matches(step.output, printed), (
        f"{session}: $ {step.command}\n--- shown:\n{step.output}\n--- printed:\n{printed}"
    )


def matches(expected: str, printed: str) -> bool:
    if not _SET_UP.search(expected):
        printed = _SET_UP.sub("", printed)
    printed = _LOG_WITHIN.sub(r"\2\1", printed)
    if not any(map(_LOG_LINE.match, expected.splitlines())):
        printed = "".join(line for line in printed.splitlines(keepends=True) if not _LOG_LINE.match(line))
    pattern = ""
    for line in _LOG_TIME.sub("… ", expected).rstrip().splitlines():
        within = ".*?".join(map(re.escape, line.rstrip().split("…")))
        pattern += r"(?:.*\n)*?" if line.strip() == "…" else rf"{within}[ \t\r]*\n"
    return re.fullmatch(pattern, printed.rstrip() + "\n" if printed.strip() else "") is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_blocks_are_well_formed(document: Path) -> None:
    text = document.read_text()
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks(document))
    for block in blocks(document):
        match block.language:
            case "python":
                compile(block.text, str(block), "exec", flags=ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            case "json":
                json.loads(block.text)
            case "toml":
                tomllib.loads(block.text)
            case "console":
                assert block.text.startswith("$ "), block


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links(document: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", document.read_text())):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        found = (document.parent / target).resolve() if target else document
        assert found.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in anchors(found), f"{document.name}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_files_that_are_named(document: Path) -> None:
    """Such as tests that show what a document says; ``T`` stands for a type of device."""
    for name in _FILE.findall(_FENCE.sub("", document.read_text())):
        assert (TOP / name).exists() or Path(name).stem in ("T", "test_T"), f"{document.name}: {name}"


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\n", "a\nb\n", False),
        ("a\n…\n", "a\nb\nc\n", True),
        ("…\nc\n", "a\nb\nc\n", True),
        ("…\nb\n", "a\nb\nc\n", False),
        ("one … two\n", "one and a half two\n", True),
        ("one … two\n", "one\ntwo\n", False),
        ("", "", True),
        ("", "a\n", False),
        ("", "12:00:00.000 INFO blk0: connected\n", True),
        ("0xc\n0xd\n", "0xc\n012:00:00.000 INFO blk0: connected\nxd\n", True),
        ("0xd\n", "012:00:00.000 INFO blk0: connected\nxc\n", False),
        ("12:00:00.000 ERROR …\n0xd\n", "0x23:59:59.999 ERROR blk0: bad\nd\n", True),
        ("12:00:00.000 ERROR …\n", "23:59:59.999 ERROR blk0: bad\n", True),
        ("12:00:00.000 ERROR …\n", "23:59:59.999 INFO blk0: good\n", False),
    ],
)
def test_matches(expected: str, printed: str, same: bool) -> None:
    assert matches(expected, printed) is same
