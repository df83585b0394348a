"""What a program says that a back end has started."""

import logging
import os

import pytest

from vfiouser_virtio.backends.child_log import ChildLog
from vfiouser_virtio.device_log import DeviceLog


def test_the_last_words_of_a_program_without_end_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipe may be a child's of its own, which goes on with what it says."""
    endless = os.open("/dev/zero", os.O_RDONLY | os.O_NONBLOCK), os.open(os.devnull, os.O_WRONLY)
    monkeypatch.setattr(os, "pipe2", lambda _flags: endless)
    said = ChildLog("passt", DeviceLog(logging.getLogger(__name__), "net0"))
    try:
        assert 0 < said.last_words().count("\\x00") <= 500
    finally:
        said.close()


def test_the_last_words_are_those_at_the_end_of_a_full_pipe() -> None:
    said = ChildLog("passt", DeviceLog(logging.getLogger(__name__), "net0"))
    try:
        assert said.last_words() == "it has not said why"
        assert os.write(said.child_fd, b"a line\n" * 9000 + b"the end\n") > 60000
        assert said.last_words().endswith("a line; the end")
    finally:
        said.close()
