"""Writes down what is called on libvfio-user's C API, what it calls back, and what the client says meanwhile.

A record is a list of what can be compared between runs and between implementations: pointers, descriptors and paths are
only told from null. Messages of the library's log are not part of it.
"""

import ctypes
import json
from collections.abc import Callable
from typing import Any

from support.vfu_peer import Message

from vfiouser_virtio.libvfio_user.bindings import PROTOTYPES, DmaInfoStruct, Functions, Iovec
from vfiouser_virtio.libvfio_user.bindings.types import (
    DMA_CB,
    IRQ_STATE_CB,
    LOG_FN,
    QUIESCE_CB,
    REGION_ACCESS_CB,
    RESET_CB,
)
from vfiouser_virtio.protocols.vfio_user import VERSION, Command

# A callback's type says what it is for, but DMA's two have one type: by their place in the call.
CALLBACKS = {
    REGION_ACCESS_CB: "access",
    RESET_CB: "reset",
    QUIESCE_CB: "quiesce",
    IRQ_STATE_CB: "irq_state",
    LOG_FN: "log",
}
DMA_CALLBACKS = {2: "dma_register", 3: "dma_unregister"}

DESCRIPTORS = {("vfu_setup_region", 7), ("vfu_create_ioeventfd", 2)}
ADDRESSES = {("vfu_addr_to_sgl", 1)}
"""Numbers although the type says pointer."""

OUTPUTS = {"vfu_sgl_read": 3, "vfu_sgl_write": 3}
"""Buffers whose content counts."""


class RecordedFunctions(Functions):
    """``functions``, with everything that passes through written to ``events``."""

    def __init__(self, functions: Functions) -> None:
        self.events: list[dict[str, Any]] = []
        self._kept: list[Any] = []
        for name in PROTOTYPES:
            setattr(self, name, self._recorded(name, getattr(functions, name)))

    def client(self, direction: str, message: Message) -> None:
        """For `Peer`."""
        event: dict[str, Any] = {"client": direction, "command": message.command, "flags": message.flags}
        if message.command == Command.VERSION and message.payload:
            version = VERSION.parse(message.payload)
            event["version"] = [version.major, version.minor, json.loads(version.data.rstrip(b"\0") or "null")]
        else:
            event["payload"] = message.payload.hex()
        self.events.append(event | {"error": message.error, "fds": len(message.fds)})

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        prototype = PROTOTYPES[name]

        def call(*arguments: Any) -> Any:
            event: dict[str, Any] = {"call": name}
            self.events.append(event)
            passed = [self._passed(name, index, argument) for index, argument in enumerate(arguments)]
            event["arguments"] = [self._shown(name, index, argument) for index, argument in enumerate(arguments)]
            ctypes.set_errno(0)
            result = function(*passed)
            number = ctypes.get_errno()
            after: dict[str, Any] = {"result": shown_result(name, prototype.restype, result)}
            if result is None or (isinstance(result, int) and result < 0):
                after["errno"] = number if prototype.restype is not None else 0
            if name in OUTPUTS and result == 0:
                after["data"] = bytes(arguments[OUTPUTS[name]]).hex()
            self.events.append({"returns": name} | after)
            ctypes.set_errno(number)
            return result

        return call

    def _passed(self, name: str, index: int, argument: Any) -> Any:
        kind = PROTOTYPES[name].argtypes[index] if index < len(PROTOTYPES[name].argtypes) else None
        if not argument or (kind not in CALLBACKS and kind is not DMA_CB):
            return argument
        return self._callback(kind, CALLBACKS.get(kind) or DMA_CALLBACKS[index], argument)

    def _callback(self, prototype: Any, name: str, function: Any) -> Any:
        def called(handle: int, *arguments: Any) -> Any:
            event: dict[str, Any] = {"callback": name}
            self.events.append(event)
            event["arguments"] = [shown_argument(argument) for argument in arguments]
            if name == "access":
                buffer, count, offset, is_write = arguments
                event["arguments"] = [count, offset, is_write]
                event["data"] = ctypes.string_at(buffer, count).hex() if is_write else None
            result = function(handle, *arguments)
            number = ctypes.get_errno()
            after: dict[str, Any] = {"leaves": name, "result": result}
            if result is not None and result < 0:
                after["errno"] = number
            elif name == "access" and not arguments[3]:
                after["data"] = ctypes.string_at(arguments[0], arguments[1]).hex()
            self.events.append(after)
            ctypes.set_errno(number)
            return result

        self._kept.append(prototype(called))
        return self._kept[-1]

    def _shown(self, name: str, index: int, argument: Any) -> Any:
        if index == 0:
            return "context" if name != "vfu_create_ctx" else argument
        if (name, index) in ADDRESSES:
            return argument
        if (name, index) in DESCRIPTORS:
            return "fd" if argument >= 0 else argument
        if name == "vfu_create_ctx" and index == 1:
            return "path"
        if name == "vfu_setup_region" and index == 5 and argument is not None:
            return [[area.iov_base or 0, area.iov_len] for area in argument]
        return shown_argument(argument)


def shown_argument(argument: Any) -> Any:
    """An argument as JSON has it."""
    if argument is None or isinstance(argument, int):
        return argument
    if isinstance(argument, bytes):
        return argument.decode()
    if isinstance(argument, ctypes.POINTER(DmaInfoStruct)):
        info = argument.contents
        mapping: Iovec = info.mapping
        return {
            "iova": [info.iova.iov_base or 0, info.iova.iov_len],
            "vaddr": None if info.vaddr is None else info.vaddr - (mapping.iov_base or 0),
            "mapping": mapping.iov_len if info.vaddr else None,
            "page_size": info.page_size,
            "prot": info.prot,
        }
    return "pointer" if argument else None


def shown_result(name: str, restype: Any, result: Any) -> Any:
    """A result likewise."""
    if restype is ctypes.c_void_p:
        return "pointer" if result else None
    return "fd" if name == "vfu_get_poll_fd" and result >= 0 else result
