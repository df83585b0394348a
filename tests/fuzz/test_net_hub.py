"""Network device on a hub whose other ports answer: its learning is exercised, and what it may not do is found."""

from typing import Any

import pytest

from vfiouser_virtio.backends.net.hub import Hub
from vfiouser_virtio.testing.fuzz import TARGETS, Case, net_hub
from vfiouser_virtio.testing.fuzz.bench import run_case

FRAME = "ff" * 6 + "020000000001" + "88b5" + "5a" * 46


def _case(frames: int) -> Case:
    """So many frames of one station, to all."""
    sent: dict[str, Any] = {"do": "request", "queue": 1, "out": ["00" * 12, FRAME], "room": []}
    steps: list[dict[str, Any]] = [{"do": "bring_up", "features": 0}, {"do": "pause"}]
    for _ in range(frames):
        steps += [sent, {"do": "settle"}, {"do": "pause"}]
    return Case("requests", "net-hub", offer={"poll": "off"}, steps=steps)


def test_the_ways_to_answer_leave_a_hub_as_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    true = net_hub.check_stations

    def check(hub: Hub) -> None:
        seen.append(len(hub.stations))
        true(hub)

    monkeypatch.setattr(net_hub, "check_stations", check)
    assert run_case(_case(7), TARGETS["net-hub"]) is None
    assert max(seen) > net_hub.NEW, "new stations were learned"


def test_what_a_hub_may_not_do_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_hub, "MAX_STATIONS", net_hub.NEW // 2)
    found = run_case(_case(7), TARGETS["net-hub"])
    assert found is not None
    assert "stations of one port" in found.what
