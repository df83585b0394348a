"""``run`` with a device that never yields: a signal ends it, and QEMU and the processes of the devices with it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import fake_qemu
from support.command import COMMAND, PATIENCE, environment
from support.processes import wait_until_gone
from support.stuck import DEVICE


@dataclass
class Run:
    process: subprocess.Popen[str]
    lines: list[str]
    """Of stderr, up to where the device is seen to be stuck."""

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """The exit status after a signal, and what is said until then."""
        self.process.send_signal(number)
        said = self.process.communicate(timeout=PATIENCE)[1]
        return self.process.returncode, said


@contextmanager
def running(folder: Path, how: str, *options: str) -> Iterator[Run]:
    """`run` whose device is stuck, with all that it has started noted; none of it is left in the end."""
    (folder / "mine.py").write_text(DEVICE)
    qemu = folder / "qemu"
    qemu.write_text(f"#!{sys.executable}\n{Path(fake_qemu.__file__).read_text()}")
    qemu.chmod(0o755)
    device = ["--device", f"mine.py:Stuck,id=mine0,socket=s,how={how}", "--device", "rng,socket=r"]
    env = {"VFIOUSER_VIRTIO_QEMU": str(qemu), "FAKE_QEMU_PID": str(folder / "pid"), "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        [*COMMAND, "run", *options, *device, "--", "-kernel", "none"],
        cwd=folder,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        # Nobody waits for lines that never come.
        patience = threading.Timer(PATIENCE, process.kill)
        patience.start()
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "has not yielded" in line:
                    break
            pids = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
            qemu_pid = int((folder / "pid").read_text())
            assert len(pids) == 1 + 2 * ("--processes" in options), lines
            yield Run(process, lines)
            wait_until_gone(*pids, qemu_pid)
        finally:
            patience.cancel()
            process.kill()


@pytest.mark.parametrize(
    ("how", "options", "number", "status", "end"),
    [
        ("loops", (), signal.SIGTERM, 128 + signal.SIGTERM, "interrupted mine0"),
        pytest.param("sleeps", (), signal.SIGINT, 128 + signal.SIGINT, "interrupted mine0", marks=pytest.mark.variant),
        ("catches", (), signal.SIGTERM, 128 + signal.SIGTERM, "ended without mine0"),
        ("loops", ("--processes",), signal.SIGINT, 1, "interrupted mine0"),
    ],
)
def test_a_signal_ends_it_all(
    tmp_path: Path, how: str, options: tuple[str, ...], number: signal.Signals, status: int, end: str
) -> None:
    with running(tmp_path, how, *options) as run:
        assert run.lines[:2] == [
            "vfiouser-virtio: the guest, with mine0 (mine.py:Stuck), rng0 (rng)\n",
            "vfiouser-virtio: to leave: press Ctrl-A x (Ctrl-A c shows QEMU's monitor)\n",
        ]
        ended, said = run.end(number)
        assert ended == status, said
        assert f"{end}, which did not yield at " in said
        assert "Traceback" not in said
    assert {"s", "r"}.isdisjoint(os.listdir(tmp_path))  # their sockets
