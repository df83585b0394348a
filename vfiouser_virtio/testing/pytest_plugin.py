"""Pytest plugin for authors of devices (docs/testing-your-device.md); pytest finds it where the package is installed.

=====================  =============================================================================================
fixture                what a test gets
=====================  =============================================================================================
virtio_device          the device under test: this fixture you write, and it returns a `virtio.Device`
virtio_guest           that device over a carrier, bound to its driver in Python: a `guest.VirtioDevice`
pci_device             the PCI device of your own under test: this fixture you write, and it returns a `pci.PciDevice`
pci_guest              that device over a carrier, enabled, for a driver in Python: a `guest.function.GuestFunction`
vfio_device            `virtio_device` on a socket, for any vfio-user client: a `testing.served.ServedDevice`
guest                  a Linux guest in QEMU that has `vfio_device`: ``await guest.run("lspci")``
virtio_carrier         the name of the carrier; a test with this fixture, or `virtio_guest`, runs once over each
virtio_drivers         drivers to choose from, if you have your own; by default those of `guest.drivers`
virtio_interrupts      ``None`` (the best that the device has), ``"msix"``, ``"intx"`` or ``"poll"``
virtio_offer           what the driver may choose from, a `virtio.Offer`; None: what devices offer by default
virtio_faults          what the device does wrong on purpose, a `faults.FaultPlan`: those of the mark ``virtio_faults``
virtio_feature_mask    features that the driver may accept; by default all that it knows
virtio_ids             the identity style, from the command line
virtio_conversation    what is said; printed, decoded, when the test fails
virtio_qemu            the QEMU to use, a `vm.Qemu`
virtio_guest_image     the Linux guest to boot, a `vm.GuestImage`
=====================  =============================================================================================

Override those that are choices, or parametrize a test with them: ``@pytest.mark.parametrize("virtio_interrupts", …)``.
Async tests and fixtures need pytest-trio. Nothing but pytest is imported here before a test asks for one of these.
"""

import signal
import threading
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, cast

import pytest

if TYPE_CHECKING:
    from vfiouser_virtio.faults import FaultPlan
    from vfiouser_virtio.guest import VirtioDevice, VirtioDriver
    from vfiouser_virtio.guest.function import GuestFunction
    from vfiouser_virtio.pci import PciDevice
    from vfiouser_virtio.testing.carriers import Carrier, Interrupts
    from vfiouser_virtio.testing.conversation import Conversation
    from vfiouser_virtio.testing.served import ServedDevice
    from vfiouser_virtio.transports.identity import Style
    from vfiouser_virtio.virtio import Device, Offer
    from vfiouser_virtio.vm import Guest, GuestImage, Qemu

# They need no QEMU, which would have to be fetched.
# Nor a library, which has to be built.
_DEFAULT_CARRIERS = ["loopback", "socket", "socket-private"]

_MARKERS = [
    "virtio_carriers(*names): run only over these of the chosen carriers",
    "guest(**options): how the Linux guest is booted, for vfiouser_virtio.vm.boot_guest (memory, append, …)",
    "virtio_faults(*faults, seed=0): what the device under test does wrong on purpose (docs/evil.md)",
    "qemu: runs QEMU; set by vfiouser-virtio for the qtest carriers and for tests with a Linux guest",
]

# Not in use elsewhere: SIGALRM is what pytest-timeout has.
_INTERRUPT = signal.SIGVTALRM

_CONVERSATIONS = pytest.StashKey["list[Conversation]"]()
_FAULTS = pytest.StashKey["FaultPlan"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vfiouser-virtio", "virtio devices under test")
    group.addoption(
        "--virtio-carrier",
        action="append",
        metavar="CARRIER",
        help="run device tests over loopback, socket, socket-private, qtest, qtest-private, libvfio-user, "
        "qtest-library or all that can be; may be repeated",
    )
    group.addoption(
        "--virtio-ids",
        choices=("default", "2007", "qemu"),
        default="default",
        help="identity that devices show on PCI (default: default)",
    )
    group.addoption(
        "--guest-kernel",
        metavar="SUITE|FILE",
        help="kernel of the Linux guest: a Debian suite, e.g. bookworm, or a bzImage",
    )
    parser.addini(
        "virtio_carriers", type="args", default=_DEFAULT_CARRIERS, help="what --virtio-carrier is where it is not given"
    )
    parser.addini("virtio_timeout", default="30", help="seconds after which a test with a Python guest has failed")


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    if config.getoption("--virtio-carrier"):
        _chosen_carriers(config)  # for its complaints, before anything runs


def pytest_report_header(config: pytest.Config) -> str | None:
    """What is with libvfio-user, where tests are to run over it."""
    wanted = _wanted_carriers(config)
    if not {"all", "libvfio-user", "qtest-library"} & set(wanted):
        return None
    missing, library = _library()
    return f"libvfio-user: {f'tests over it are left out: {missing}' if missing else library}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "virtio_carrier" not in metafunc.fixturenames:
        return
    if any("virtio_carrier" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")):
        return
    mark = metafunc.definition.get_closest_marker("virtio_carriers")
    carriers = [name for name in _chosen_carriers(metafunc.config) if mark is None or name in mark.args]
    if "pci_guest" in metafunc.fixturenames:
        carriers = [name for name in carriers if name != "loopback"]  # which has no PCI
    metafunc.parametrize(
        "virtio_carrier",
        [pytest.param(name, marks=[pytest.mark.qemu] * name.startswith("qtest")) for name in carriers],
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Our `guest`, and not another plugin's.
        if {"guest", "virtio_guest_image"} <= set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.qemu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for conversation in item.stash.get(_CONVERSATIONS, []):
            report.sections.append((f"conversation with {conversation.name}", conversation.text()))
        if plan := item.stash.get(_FAULTS, None):
            report.sections.append(("faults of the device", plan.log.text()))
    if report.when == "teardown" and _CONVERSATIONS in item.stash:
        del item.stash[_CONVERSATIONS]  # items live until the end of the session
    if report.when == "teardown" and _FAULTS in item.stash:
        del item.stash[_FAULTS]
    return report


def _chosen_carriers(config: pytest.Config) -> "list[Carrier]":
    from vfiouser_virtio.testing.carriers import CARRIERS, LIBRARY_CARRIERS

    names = _wanted_carriers(config)
    if unknown := set(names) - {*CARRIERS, "all"}:
        raise pytest.UsageError(
            f"no virtio carrier {', '.join(sorted(unknown))}: expected {', '.join(CARRIERS)} or all"
        )
    chosen: list[Carrier] = [name for name in CARRIERS if name in names or "all" in names]
    if not set(chosen) & set(LIBRARY_CARRIERS):
        return chosen
    missing, _library_found = _library()
    if missing and set(config.getoption("--virtio-carrier") or ()) & set(LIBRARY_CARRIERS):
        raise pytest.UsageError(f"--virtio-carrier: {missing}")
    return [name for name in chosen if not (missing and name in LIBRARY_CARRIERS)]


def _wanted_carriers(config: pytest.Config) -> list[str]:
    return list(config.getoption("--virtio-carrier") or config.getini("virtio_carriers"))


def _library() -> tuple[str, str]:
    """Why there is no libvfio-user, or empty; and what there is."""
    from vfiouser_virtio.errors import ConfigError
    from vfiouser_virtio.testing.carriers import library_engine

    try:
        library = library_engine().library
    except ConfigError as error:
        return str(error), ""
    return "", f"{library.path}: {library.version}"


@pytest.fixture
def virtio_device(request: pytest.FixtureRequest) -> "Device":
    """The device under test; override it."""
    raise pytest.UsageError(
        f"{request.node.name}: no device under test: write a fixture virtio_device that returns yours"
    )


@pytest.fixture
def virtio_carrier() -> "Carrier":
    """The carrier's name: the test is parametrized with those chosen by ``--virtio-carrier``."""
    raise AssertionError("pytest_generate_tests gives the value")


@pytest.fixture
def virtio_ids(pytestconfig: pytest.Config) -> "Style":
    """``default``, ``2007`` or ``qemu``: of ``--virtio-ids``."""
    return cast("Style", pytestconfig.getoption("--virtio-ids"))


@pytest.fixture
def virtio_interrupts() -> "Interrupts | None":
    """How a Python guest on PCI gets its interrupts; None for the best that the device has."""
    return None


@pytest.fixture
def virtio_offer() -> "Offer | None":
    """Reserved features, size of the queues: what the device offers beside the features of its type."""
    return None


@pytest.fixture
def virtio_faults(request: pytest.FixtureRequest) -> "FaultPlan":
    """What the device does wrong on purpose: the faults of ``@pytest.mark.virtio_faults("used-never:at=3", seed=7)``.

    A test may stop and start them, and read their log; without the mark there are none.
    """
    from vfiouser_virtio.faults import FaultPlan

    mark = request.node.get_closest_marker("virtio_faults")
    plan = FaultPlan() if mark is None else FaultPlan(mark.args, seed=mark.kwargs.get("seed", 0))
    request.node.stash[_FAULTS] = plan
    return plan


@pytest.fixture
def virtio_feature_mask() -> int:
    """The driver accepts no feature bits outside of this."""
    return -1


@pytest.fixture
def virtio_drivers() -> "Sequence[VirtioDriver]":
    """The drivers of a Python guest; none of its own means all of `guest.drivers`."""
    return ()


@pytest.fixture
def virtio_conversation(request: pytest.FixtureRequest, virtio_device: "Device") -> "Conversation":
    """What is said to and by the device in this test."""
    from vfiouser_virtio.testing.conversation import Conversation

    conversation = Conversation(virtio_device.name)
    request.node.stash.setdefault(_CONVERSATIONS, []).append(conversation)
    return conversation


@pytest.fixture(scope="session")
def virtio_qemu() -> "Qemu":
    """QEMU with vfio-user-pci: yours, or one that is fetched at the first time."""
    from vfiouser_virtio.vm import find_qemu

    return find_qemu()


@pytest.fixture(scope="session")
def virtio_guest_image(pytestconfig: pytest.Config) -> "GuestImage":
    """The small Linux guest with the kernel of ``--guest-kernel``, fetched and built at the first time."""
    from vfiouser_virtio.vm import guest_image

    return guest_image(pytestconfig.getoption("--guest-kernel"))


@pytest.fixture
def _carrier_qemu(request: pytest.FixtureRequest, virtio_carrier: "Carrier") -> "Qemu | None":
    """QEMU only where the carrier needs it: it may have to be fetched."""
    return request.getfixturevalue("virtio_qemu") if virtio_carrier.startswith("qtest") else None


@pytest.fixture
async def virtio_guest(
    virtio_device: "Device",
    virtio_carrier: "Carrier",
    virtio_ids: "Style",
    virtio_interrupts: "Interrupts | None",
    virtio_offer: "Offer | None",
    virtio_feature_mask: int,
    virtio_drivers: "Sequence[VirtioDriver]",
    virtio_conversation: "Conversation",
    virtio_faults: "FaultPlan",
    pytestconfig: pytest.Config,
    _carrier_qemu: "Qemu | None",
) -> "AsyncIterator[VirtioDevice]":
    """The device under test as its driver has it: ``virtio_guest.driver_data`` is what that driver makes of it.

    A device that does not answer for ``virtio_timeout`` seconds has failed, so that its conversation is seen.
    """
    from vfiouser_virtio.background import background
    from vfiouser_virtio.testing.carriers import carry

    timeout = float(pytestconfig.getini("virtio_timeout"))
    with _must_yield(timeout) as complaints:
        async with background() as nursery:
            nursery.start_soon(_give_up, timeout, complaints)
            async with carry(
                virtio_device,
                virtio_carrier,
                *virtio_drivers,
                ids=virtio_ids,
                interrupts=virtio_interrupts,
                offer=virtio_offer,
                feature_mask=virtio_feature_mask,
                conversation=virtio_conversation,
                qemu=_carrier_qemu,
                faults=virtio_faults,
            ) as found:
                yield found


@contextmanager
def _must_yield(seconds: float) -> Iterator[list[str]]:
    """Fail the test where the device is that does not let the event loop go on for so long: no time-out of its own can.

    Again and again, for the device may catch what is raised. The value gets what has been said about it.
    """
    from vfiouser_virtio.watchdog import watchdog, where

    complaints: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield complaints  # where pytest itself is run so, signals are not ours
        return
    loop = threading.get_ident()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        pytest.fail(complaints[-1])

    def stuck(so_far: float) -> None:
        if so_far >= seconds:
            complaints.append(
                f"the device has not yielded for {seconds:g} s (virtio_timeout in pytest's configuration); "
                f"it was here:\n{where(loop).lines}"
            )
            signal.pthread_kill(loop, _INTERRUPT)

    before = signal.signal(_INTERRUPT, interrupt)
    try:
        with watchdog(stuck):
            yield complaints
    finally:
        signal.signal(_INTERRUPT, before)


async def _give_up(seconds: float, complaints: list[str]) -> None:
    import trio

    await trio.sleep(seconds)
    ended = f"the test has not ended within {seconds:g} s (virtio_timeout in pytest's configuration)"
    raise TimeoutError(complaints[-1] if complaints else ended)


@pytest.fixture
def pci_device(request: pytest.FixtureRequest) -> "PciDevice":
    """The PCI device of one's own under test; override it."""
    raise pytest.UsageError(f"{request.node.name}: no device under test: write a fixture pci_device that returns yours")


@pytest.fixture
async def pci_guest(
    request: pytest.FixtureRequest,
    pci_device: "PciDevice",
    virtio_carrier: "Carrier",
    pytestconfig: pytest.Config,
    _carrier_qemu: "Qemu | None",
) -> "AsyncIterator[GuestFunction]":
    """The device under test as its driver has it: ``pci_guest.bar[0].read32(0)``. Time-outs as with `virtio_guest`."""
    from vfiouser_virtio.background import background
    from vfiouser_virtio.testing.own_pci import conversation_with, pci_function

    conversation = conversation_with(pci_device)
    request.node.stash.setdefault(_CONVERSATIONS, []).append(conversation)
    timeout = float(pytestconfig.getini("virtio_timeout"))
    with _must_yield(timeout) as complaints:
        async with background() as nursery:
            nursery.start_soon(_give_up, timeout, complaints)
            async with pci_function(
                pci_device, virtio_carrier, conversation=conversation, qemu=_carrier_qemu
            ) as opened:
                yield opened


@pytest.fixture
async def vfio_device(
    virtio_device: "Device",
    virtio_ids: "Style",
    virtio_offer: "Offer | None",
    virtio_conversation: "Conversation",
    virtio_faults: "FaultPlan",
    pytestconfig: pytest.Config,
) -> "AsyncIterator[ServedDevice]":
    """The device under test on a socket: ``vfio_device.path``.

    A test in which the event loop stands still for ``virtio_timeout`` seconds has failed.
    """
    from vfiouser_virtio.testing.served import served

    with _must_yield(float(pytestconfig.getini("virtio_timeout"))):
        async with served(
            virtio_device,
            ids=virtio_ids,
            offer=virtio_offer,
            conversation=virtio_conversation,
            faults=virtio_faults,
        ) as at:
            yield at


@pytest.fixture
async def guest(
    request: pytest.FixtureRequest,
    vfio_device: "ServedDevice",
    virtio_qemu: "Qemu",
    virtio_guest_image: "GuestImage",
) -> "AsyncIterator[Guest]":
    """A Linux guest that has the device under test, booted for this test (about 4 s without KVM)."""
    from vfiouser_virtio.vm import boot_guest

    mark = request.node.get_closest_marker("guest")
    options = dict(mark.kwargs) if mark else {}
    async with boot_guest(virtio_qemu, virtio_guest_image, devices=[vfio_device.qemu_argument], **options) as booted:
        yield booted
