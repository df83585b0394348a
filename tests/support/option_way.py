"""Program: runs a command, and prints the files of the package to which it gives a word, up to the device's making.

A process of its own, since a command leaves its log, its stderr and more behind. Only arguments of functions count,
where the word is in a text, in what holds texts, or in what describes a device: not in all that a program was told.
"""

import inspect
import os
import sys
from pathlib import Path
from types import FrameType

import vfiouser_virtio
from vfiouser_virtio import cli
from vfiouser_virtio.serving.device_setup import DeviceSetup, made_in_thread

PACKAGE = f"{Path(vfiouser_virtio.__file__).parent}{os.sep}"


def has(value: object, word: str) -> bool:
    if isinstance(value, str):
        return word in value
    if isinstance(value, dict):
        return any(has(each, word) for each in value.values())
    if isinstance(value, list | tuple):
        return any(has(each, word) for each in value)
    return False


def main(word: str, argv: list[str]) -> int:
    files: dict[str, None] = {}

    def called(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            count = code.co_argcount + code.co_kwonlyargcount
            count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
            if any(has(frame.f_locals.get(name), word) for name in code.co_varnames[:count]):
                files[code.co_filename.removeprefix(PACKAGE)] = None
            if code in (made_in_thread.__code__, DeviceSetup.make.__code__):
                sys.settrace(None)

    sys.settrace(called)
    status = cli.main(argv)
    sys.settrace(None)
    print(*files, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
