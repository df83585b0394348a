"""The double of libvfio-user does as the library does: both say what the records of the real one say.

``RECORD_LIBVFIO_USER=1 pytest tests/libvfio_user/test_records.py`` writes the records anew, from the real library.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.libvfio_user_double import Double
from support.vfu_conversations import CONVERSATIONS
from support.vfu_stage import Stage

from vfiouser_virtio.libvfio_user.bindings import PROTOTYPES, HasFunctions, Library

RECORDS = Path(__file__).parent / "records"
UNRECORDED = {
    "vfu_pci_add_capability", "vfu_pci_find_capability", "vfu_pci_find_next_capability",
    "vfu_setup_device_migration_callbacks",
}  # fmt: skip
"""What the double does not do."""

conversations = pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda conversation: conversation.__name__)


@pytest.fixture
def hold(tmp_path: Path) -> Callable[[HasFunctions, Callable[[Stage], None]], list[object]]:
    """Hold a conversation: its events."""

    def hold(library: HasFunctions, conversation: Callable[[Stage], None]) -> list[object]:
        stage = Stage(library.functions, tmp_path)
        try:
            conversation(stage)
        finally:
            stage.close()
        events: list[object] = json.loads(json.dumps(stage.functions.events))
        return events

    return hold


def record(conversation: Callable[[Stage], None]) -> list[Any]:
    return [json.loads(line) for line in (RECORDS / f"{conversation.__name__}.jsonl").read_text().splitlines()]


@conversations
def test_the_double_says_what_the_library_said(
    hold: Callable[..., list[object]], conversation: Callable[[Stage], None]
) -> None:
    assert hold(Double(), conversation) == record(conversation)


@conversations
def test_the_library_still_says_it(
    libvfio_user: Library, hold: Callable[..., list[object]], conversation: Callable[[Stage], None]
) -> None:
    if conversation.__name__ == "dma" and "5d64ebf or later" not in libvfio_user.version:
        pytest.skip("this version cannot access memory directly")
    events = hold(libvfio_user, conversation)
    if os.environ.get("RECORD_LIBVFIO_USER"):
        RECORDS.mkdir(exist_ok=True)
        text = "".join(json.dumps(event) + "\n" for event in events)
        (RECORDS / f"{conversation.__name__}.jsonl").write_text(text)
    assert events == record(conversation)


def test_every_conversation_has_its_record_and_every_function_is_in_one() -> None:
    assert {path.stem for path in RECORDS.iterdir()} == {conversation.__name__ for conversation in CONVERSATIONS}
    called = {event["call"] for conversation in CONVERSATIONS for event in record(conversation) if "call" in event}
    assert called | UNRECORDED | {"dma_sg_size"} == set(PROTOTYPES) | {"dma_sg_size"}
