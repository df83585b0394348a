"""Connections that another process makes for one in a sandbox."""

import errno
import os
import socket

import pytest

from vfiouser_virtio.connecting import connect_by, connect_stream, end_connectors


def test_a_connection_for_which_there_is_no_number() -> None:
    """The kernel leaves it out where the process has as many files as it may."""
    address = socket.AF_UNIX, "/not/there"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connect_by(address, os.getpid(), ours)
    try:
        with theirs:
            theirs.send(b"\0")
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as caught:
                connect_stream(address)
            assert caught.value.errno == errno.EMFILE
    finally:
        end_connectors()
