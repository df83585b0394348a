"""Little vfio-user server with one fault on purpose: python fragile_server.py SOCKET [FAULT]."""

import array
import os
import signal
import socket
import struct
import sys
from typing import NoReturn

HEADER = struct.Struct("<HHIII")
REPLY, NO_REPLY, ERROR = 1, 0x10, 0x20
EINVAL, ENOTSUP = 22, 95
kept: list[int] = []


def die(text: str, number: int) -> NoReturn:
    print(text, file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)
    raise SystemExit(0)


class Client:
    def __init__(self, sock: socket.socket, fault: str) -> None:
        self.sock, self.fault = sock, fault
        self.fds: list[int] = []

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece, ancillary, _, _ = self.sock.recvmsg(count - len(data), 4096)
            for _, _, raw in ancillary:
                self.fds += array.array("i", raw)
            if not piece:
                if data and self.fault == "stuck":
                    signal.pause()
                raise EOFError
            data += piece
        return data

    def serve(self) -> None:
        while True:
            message_id, command, size, flags, _ = HEADER.unpack(self.exactly(16))
            if not 16 <= size <= 1 << 21:
                return
            body = self.exactly(size - 16)
            error, reply = self.answer(command, body)
            for fd in self.fds[1:] if self.fault == "leak" else self.fds:
                os.close(fd)
            kept.extend(self.fds[1:] if self.fault == "leak" else ())
            self.fds.clear()
            if flags & 0xF or (flags & NO_REPLY and self.fault != "posted") or reply is None:
                continue
            message_id ^= self.fault in ("wrong-id", "wrong-command") and command == 7 and error
            command = 42 if self.fault == "wrong-command" and command == 7 and error else command
            flags = REPLY | (ERROR if error else 0)
            reply = b"" if error else reply
            self.sock.sendall(HEADER.pack(message_id, command, 16 + len(reply), flags, error) + reply)

    def answer(self, command: int, body: bytes) -> tuple[int, bytes | None]:
        """Error and reply; no reply at all is None."""
        first = struct.unpack("<4I", body[:16].ljust(16, b"\0"))
        match command:
            case 1:
                return 0, struct.pack("<HH", 0, 0) + b"{}\0"
            case 2:
                size = int.from_bytes(body[24:32], "little")
                if size == 0 and self.fault == "segv":
                    die("", signal.SIGSEGV)
                if size == 0 and self.fault == "assert":
                    die("server: dma.c:12: map: Assertion `size > 0' failed.", signal.SIGABRT)
                if size == 0 and self.fault == "exit":
                    print("size is zero", file=sys.stderr)
                    sys.exit(3)
                return (0, b"") if size and size % 4096 == 0 else (EINVAL, b"")
            case 3:
                return 0, body[:24]
            case 4:
                return 0, struct.pack("<4I", 16, 2, 9, 5)
            case 5:
                size = 0x1000 if first[2] in (0, 7) else 0
                more = bytes(8) if self.fault == "long" and first[0] < 32 else b""
                return (0, struct.pack("<4IQQ", 32, 3, first[2], 0, size, 0) + more) if first[2] < 9 else (EINVAL, b"")
            case 7 if first[2] < 5:
                return 0, struct.pack("<4I", 16, 1, first[2], 1)
            case 7:
                return EINVAL, None if self.fault == "silent" else b""
            case 8:
                if first[1] & 0x3F == 0x24 and int.from_bytes(body[16:20], "little") > 99 and self.fault == "ubsan":
                    print("irq.c:7:9: runtime error: index 100 out of bounds", file=sys.stderr, flush=True)
                return (0, b"") if len(body) >= 20 else (EINVAL, b"")
            case 9 if len(body) == 16 and first[2] in (0, 7) and first[3] <= 4096:
                return 0, body + bytes(first[3])
            case 10 if len(body) >= 16:
                return 0, body[:16]
            case 13:
                return 0, b""
        return (EINVAL if command in (9, 10) else ENOTSUP), b""


def main(path: str, fault: str = "") -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(path)
        listening.listen(8)
        while True:
            sock, _ = listening.accept()
            with sock:
                client = Client(sock, fault)
                try:
                    client.serve()
                except (EOFError, ConnectionError):
                    pass
                for fd in client.fds:
                    os.close(fd)
            if fault == "once":
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
