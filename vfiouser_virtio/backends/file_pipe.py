"""Pipe before a file whose file system may hang: the thread behind it does, and nothing else.

A regular file knows no O_NONBLOCK. What is written waits in the pipe (64 KiB), then holds its writer up; of what is
read, as much is read ahead.
"""

import contextlib
import os
import threading
from collections.abc import Callable

_PIECE = 4096


def writing_pipe(file: int, failed: Callable[[OSError], None]) -> int:
    """A non-blocking descriptor whose bytes go to ``file``, which is closed when they are there.

    ``failed`` is called in the thread, with the error that has ended it.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    threading.Thread(target=_write, args=(reader, file, failed), name="chardev", daemon=True).start()
    return writer


def reading_pipe(file: int, failed: Callable[[OSError], None]) -> int:
    """A non-blocking descriptor that gives what is in ``file``, which is closed in the end; else as `writing_pipe`."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    threading.Thread(target=_read, args=(file, writer, failed), name="chardev", daemon=True).start()
    return reader


def _write(reader: int, file: int, failed: Callable[[OSError], None]) -> None:
    """Until the pipe is closed, and all that was in it is in the file."""
    while data := os.read(reader, _PIECE):
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError as error:
            failed(error)
            break
    os.close(reader)  # what comes now is EPIPE
    with contextlib.suppress(OSError):  # close(2) tells what became of the last bytes: too late
        os.close(file)


def _read(file: int, writer: int, failed: Callable[[OSError], None]) -> None:
    """Until the end of the file, or of the pipe's reader."""
    try:
        while data := os.read(file, _PIECE):
            while data:
                data = data[os.write(writer, data) :]
    except BrokenPipeError:
        pass  # the reader is gone
    except OSError as error:
        failed(error)
    os.close(writer)
    with contextlib.suppress(OSError):
        os.close(file)
