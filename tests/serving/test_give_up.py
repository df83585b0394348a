"""SIGTERM where a request of the host's storage never ends: the process ends all the same."""

import signal
import subprocess
import sys

_PROGRAM = """
import os, signal, trio
from functools import partial
from vfiouser_virtio.serving.signals import run_until_signal

async def work():
    os.kill(os.getpid(), signal.SIGTERM)
    with trio.CancelScope(shield=True):  # as IoUring.serve waits for what the kernel has
        await trio.sleep_forever()

trio.run(partial(run_until_signal, work, [lambda: print("let go", flush=True)], give_up_after=0.2))
"""


def test_a_request_that_never_ends_keeps_nobody_from_ending() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + 15
    assert done.stdout == "let go\n"
    assert "SIGTERM: ended without waiting for a request that the host does not end" in done.stderr
    assert len(done.stderr.splitlines()) == 1


_SLOW = """
import os, signal, trio
from functools import partial
from vfiouser_virtio.serving.signals import run_until_signal

async def work():
    os.kill(os.getpid(), signal.SIGTERM)
    with trio.CancelScope(shield=True):
        for _ in range(40):
            await trio.sleep(0.02)
    print("done", flush=True)

trio.run(partial(run_until_signal, work, [lambda: print("let go", flush=True)], give_up_after=0.1))
"""


def test_what_still_goes_on_is_not_given_up() -> None:
    done = subprocess.run([sys.executable, "-c", _SLOW], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


_VERDICT = """
import trio
from functools import partial
from vfiouser_virtio.cli.exit_status import TimedOutError
from vfiouser_virtio.serving.signals import EndVerdict, run_until_signal

async def work():
    verdict.give(124, TimedOutError("too late"))
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()

verdict = EndVerdict()
trio.run(partial(run_until_signal, work, [lambda: print("let go", flush=True)], give_up_after=0.2, verdict=verdict))
"""


def test_an_end_that_comes_by_itself_is_not_kept_either() -> None:
    done = subprocess.run([sys.executable, "-c", _VERDICT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (124, "let go\n")
    assert done.stderr.splitlines() == [
        "vfiouser-virtio: too late",
        "vfiouser-virtio: ended without waiting for a request that the host does not end",
    ]


_HUNG_NAMES = """
import os, signal, trio, threading
from functools import partial
from vfiouser_virtio.serving.signals import run_until_signal

async def work():
    os.kill(os.getpid(), signal.SIGTERM)
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()

trio.run(partial(run_until_signal, work, [threading.Event().wait], give_up_after=0.2))
"""


def test_a_name_that_cannot_be_removed_keeps_nobody_from_ending() -> None:
    """A socket on the file system that hangs."""
    done = subprocess.run([sys.executable, "-c", _HUNG_NAMES], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + 15


_ANOTHER_THREAD = """
import os, signal, threading
from vfiouser_virtio.serving.signals import signals_blocked

woken, over = threading.Event(), threading.Event()

def unblocked():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    woken.set()
    over.wait()

with signals_blocked():
    threading.Thread(target=unblocked, daemon=True).start()
    woken.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    print("whole", flush=True)
print("not reached", flush=True)
"""


def test_a_signal_waits_for_the_end_of_the_block_whatever_thread_gets_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ANOTHER_THREAD], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "whole\n", "")
