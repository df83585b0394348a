"""Cases that are run as one: the same things are found, and each with the case that shows it."""

from dataclasses import replace
from typing import Any

import pytest

from vfiouser_virtio.testing.fuzz import TARGETS, Case, FuzzTarget, fuzz, generate
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.joined import MOST, groups, joined, run_joined
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.targets import Echo
from vfiouser_virtio.virtio import Queue


class FailsFor(Echo):
    """Echo that fails at the request that makes its ``limit`` complete: so many of those that start with X."""

    limit = 1

    def __init__(self) -> None:
        super().__init__()
        self._seen = 0

    async def _serve(self, requests: Queue) -> None:
        async for chain in requests:
            self._seen += chain.readable.read(min(chain.readable.length, 1)) == b"X"
            if self._seen == self.limit:
                raise RuntimeError("what was I thinking")
            chain.complete()


class FailsAtTheSecond(FailsFor):
    limit = 2


class FailsOnce(Echo):
    """Echo that fails at the first request of all, however often it is made anew."""

    left = 1

    async def _serve(self, requests: Queue) -> None:
        async for chain in requests:
            if FailsOnce.left:
                FailsOnce.left -= 1
                self.fail()
            chain.complete()

    def fail(self) -> None:
        raise RuntimeError("but once")


class IsLateOnce(FailsOnce):
    """Likewise, by a finding that a busy machine could feign."""

    def fail(self) -> None:
        raise Found("hang", "it took long", "buffer")


async def _works(driver: FuzzDriver) -> None:
    await driver.request(0, [b"good"], [4])


def _case(data: str, memory: Memory = "shared", **keys: Any) -> Case:
    request: dict[str, Any] = {"do": "request", "queue": 0, "out": [data], "room": [8]}
    steps = [{"do": "bring_up"}, request, {"do": "settle"}]
    return Case("requests", "echo", memory, offer={"poll": "off"}, steps=steps, origin=data, **keys)


@pytest.mark.parametrize("direct", [False, True], ids=["socket", "direct"])
def test_what_a_case_shows_alone_is_found_with_it(direct: bool) -> None:
    cases = [_case(data, direct=direct) for data in ("00", "5858", "01")]
    found = run_joined(cases, FuzzTarget(FailsFor, _works))
    assert found is not None
    case, finding = found
    assert case is cases[1]
    assert finding.where.startswith("RuntimeError at tests/fuzz/test_joined.py:")


def test_what_no_case_shows_alone_is_found_with_all_of_them() -> None:
    cases = [_case("5858"), _case("00", "private"), _case("5859")]
    found = run_joined(cases, FuzzTarget(FailsAtTheSecond, _works))
    assert found is not None
    assert found[0] == joined(cases)
    assert run_joined(cases[:2], FuzzTarget(FailsAtTheSecond, _works)) is None


@pytest.mark.parametrize(("device", "counts"), [(FailsOnce, True), (IsLateOnce, False)])
def test_what_does_not_come_again_says_so(
    device: type[FailsOnce], counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug counts all the same, it may be a race; what time alone could have done does not."""
    target = FuzzTarget(device, _works)
    for cases in ([_case("5858")], [_case("00"), _case("5858")]):
        monkeypatch.setattr(FailsOnce, "left", 1)
        found = run_joined(cases, target)
        assert found is not None
        assert found[0] == joined(cases)
        assert (found[1].once, found[1].counts) == (True, counts)
        assert " (not reproduced): " in str(found[1])
    monkeypatch.setattr(FailsOnce, "left", 1)
    assert bool(fuzz(5, cases=4, kinds=["requests"], targets=["echo"], target=target)) == counts
    assert not FailsOnce.left


def test_what_comes_again_is_found() -> None:
    found = run_joined([_case("5858")], FuzzTarget(FailsFor, _works))
    assert found is not None
    assert not found[1].once


def test_where_each_case_begins_is_told_once() -> None:
    """Also of those that another client does, and not when what was found is looked for in each."""
    cases = [_case("00"), _case("01"), _case("02", "private"), _case("5858")]
    began: list[int] = []
    assert run_joined(cases, TARGETS["echo"], began.append) is None
    assert began == [1, 2, 3]
    assert run_joined(cases, FuzzTarget(FailsFor, _works), began.append) is not None
    assert began[:6] == [1, 2, 3, 1, 2, 3]
    assert len(began) == 6


def test_a_client_stays_where_the_next_case_can_go_on() -> None:
    silent, unmapped = ({"do": "answers", "how": ["never"]}, {"do": "unmap"})
    left, lost = (replace(_case("01"), steps=[*_case("01").steps, each]) for each in (silent, unmapped))
    whole = joined([_case("00"), _case("01"), lost, left, _case("02"), _case("03", "private", twin=True)])
    parts = list(whole.clients())
    assert [(part.memory, part.twin) for part in parts] == [("shared", False), ("shared", False), ("private", True)]
    assert [step["do"] for step in parts[0].steps[9:13]] == ["unmap", "unmap", "map", "bring_up"]
    assert run_joined([whole], TARGETS["echo"]) is None


def test_a_client_that_has_broken_the_protocol_is_followed_by_another() -> None:
    rude = replace(_case("00"), kind="messages", steps=[{"do": "raw", "data": "00" * 16}])
    [before, after] = joined([rude, _case("00")]).clients()
    assert before.steps == rude.steps
    assert run_joined([rude, _case("00"), rude, rude], TARGETS["echo"]) is None
    assert run_joined([rude, _case("5858")], FuzzTarget(FailsFor, _works)) is not None
    assert after.steps[0] == {"do": "bring_up"}


def test_no_case_is_lost_in_groups() -> None:
    cases = [generate(kind, 1, index) for index in range(200) for kind in ("rings", "messages")]
    made = list(groups(cases))
    assert sorted(case.origin for group in made for case in group) == sorted(case.origin for case in cases)
    assert max(map(len, made)) <= MOST
    for group in made:
        assert len({(case.target, str(case.offer)) for case in group}) == 1
