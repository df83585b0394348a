"""Recording transport: keeps what its driver asks, for carriers that have no messages."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

from vfiouser_virtio.guest.ports import Transport
from vfiouser_virtio.protocols.vfio_user import Direction
from vfiouser_virtio.testing.conversation import Conversation

_SHOWN = 60  # characters of an argument or a result


def recorded(transport: Transport, conversation: Conversation) -> Transport:
    """The same transport; every call and every result becomes a line of ``conversation``."""
    # Structural: it has whatever the transport has.
    return cast("Transport", _Recorded(transport, conversation))


class _Recorded:
    def __init__(self, transport: Transport, conversation: Conversation) -> None:
        self._transport, self._conversation = transport, conversation

    def __getattr__(self, name: str) -> Any:
        found: Any = getattr(self._transport, name)
        if not callable(found):
            return found
        # The one that is not async.
        return self._noting(name, found) if name == "notify" else self._awaiting(name, found)

    def _noting(self, name: str, method: Any) -> Callable[..., object]:
        def called(*arguments: object) -> object:
            self._conversation.note(Direction.CLIENT_TO_SERVER, f"{name}({_shown(*arguments)})")
            result: object = method(*arguments)
            return result

        return called

    def _awaiting(self, name: str, method: Any) -> Callable[..., Awaitable[object]]:
        async def called(*arguments: object) -> object:
            self._conversation.note(Direction.CLIENT_TO_SERVER, f"{name}({_shown(*arguments)})")
            result: object = await method(*arguments)
            if result is not None:
                self._conversation.note(Direction.SERVER_TO_CLIENT, f"{name}: {_shown(result)}")
            return result

        return called


def _shown(*values: object) -> str:
    """Numbers in hex, anything else as Python shows it, but not at length."""
    texts = [f"{value:#x}" if isinstance(value, int) else repr(value) for value in values]
    return ", ".join(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…" for text in texts)
