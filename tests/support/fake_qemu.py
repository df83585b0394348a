"""A program that `run` takes for QEMU: it resets the first device, then does nothing until it is ended.

Its process id is the content of ``$FAKE_QEMU_PID``.
"""

import json
import os
import re
import socket
import struct
import sys
from pathlib import Path

VERSION, DEVICE_RESET = 1, 13  # vfio-user commands


def reset(path: str) -> socket.socket:
    """Ask for a reset of the device; its answer does not matter."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    for number, (command, payload) in enumerate([(VERSION, struct.pack("<HH", 0, 1) + b"{}\0"), (DEVICE_RESET, b"")]):
        connection.sendall(struct.pack("<HHIII", number, command, 16 + len(payload), 0, 0) + payload)
    return connection


def main(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        print("QEMU emulator version 10.1.0")
    elif arguments == ["-device", "help"]:
        print('name "vfio-user-pci"')
    else:
        Path(os.environ["FAKE_QEMU_PID"]).write_text(str(os.getpid()))
        qmp = next(match[1] for each in arguments if (match := re.fullmatch(r"socket,id=qmp,fd=(\d+)", each)))
        devices = [json.loads(each) for each in arguments if each.startswith('{"driver":')]
        with socket.socket(fileno=int(qmp)) as monitor, reset(devices[0]["socket"]["path"]):
            monitor.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
            for line in monitor.makefile():
                monitor.sendall(json.dumps({"return": {}, "id": json.loads(line).get("id")}).encode() + b"\r\n")


if __name__ == "__main__":
    main(sys.argv[1:])
