"""vfio-user (QEMU docs/interop/vfio-user.rst): VERSION, and what may come before and after it."""

import json

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import DEVICE_INFO, VERSION, Command, MessageFlags
from vfiouser_virtio.testing.conformance.checks import wire_check
from vfiouser_virtio.testing.conformance.verdicts import expect, fail
from vfiouser_virtio.testing.conformance.wire import Wire
from vfiouser_virtio.vfio_user import QEMU_VERSION, Client, ClientOptions, Reply, VersionProposal

_SECTION = "VFIO_USER_VERSION"
_SILENT = ClientOptions(version=None)
_INFO = DEVICE_INFO.build({"argsz": DEVICE_INFO.sizeof(), "flags": 0, "num_regions": 0, "num_irqs": 0})


async def _ask(client: Client, command: int, payload: bytes) -> Reply | None:
    """The reply; None where the server closes the connection instead, as it may for what it cannot accept."""
    try:
        return await client.exchange(command, payload)
    except PeerError:
        if client.alive:
            raise  # no answer at all
        return None


def _refused(reply: Reply | None) -> bool:
    return reply is None or bool(reply.flags & MessageFlags.ERROR)


async def _answer(wire: Wire, proposal: VersionProposal) -> tuple[int, int, bytes]:
    """major, minor and data of the reply to a VERSION that any server accepts."""
    async with wire.connect(_SILENT) as client:
        reply = await client.exchange(Command.VERSION, proposal.payload())
        expect(not _refused(reply), f"VERSION {proposal.payload()!r} is refused with errno {reply.error}")
        expect(len(reply.payload) >= 4, f"the reply's payload has {len(reply.payload)} bytes, 4 or more expected")
        version = VERSION.parse(reply.payload)
        return version.major, version.minor, version.data


@wire_check(
    "vfio-user/version-first", section=_SECTION, observe="DEVICE_GET_INFO as the first message: an error, or the end"
)
async def version_first(wire: Wire) -> None:
    """VERSION is the first message; any other is not carried out."""
    async with wire.connect(_SILENT) as client:
        reply = await _ask(client, Command.DEVICE_GET_INFO, _INFO)
        expect(_refused(reply), "DEVICE_GET_INFO before VERSION was answered")


@wire_check("vfio-user/version-major", section=_SECTION, observe="VERSION 1.0: an error, or the end")
async def version_major(wire: Wire) -> None:
    """A major version that the server does not have is refused."""
    async with wire.connect(_SILENT) as client:
        reply = await _ask(client, Command.VERSION, VersionProposal(major=1, minor=0).payload())
        expect(_refused(reply), f"VERSION 1.0 was accepted with {reply.payload if reply else b''!r}")


@wire_check("vfio-user/version-minor", section=_SECTION, observe="VERSION 0.0 and 0.65535")
async def version_minor(wire: Wire) -> None:
    """The reply has the same major, and no higher minor than was proposed."""
    for proposed in (0, 0xFFFF):
        major, minor, _ = await _answer(wire, VersionProposal(minor=proposed))
        expect(major == 0 and minor <= proposed, f"the answer to 0.{proposed} is {major}.{minor}")


@wire_check("vfio-user/version-json", section=_SECTION, observe="the data of the reply to QEMU's VERSION")
async def version_json(wire: Wire) -> None:
    """The reply's data is a JSON object, ended by a NUL, with an object `capabilities` if any; or nothing."""
    *_, data = await _answer(wire, QEMU_VERSION)
    if not data:
        return
    expect(data[-1] == 0, f"the data does not end with a NUL: {data[-20:]!r}")
    try:
        document = json.loads(data[:-1])
    except ValueError as error:
        fail(f"the data is not JSON: {error}")
    expect(isinstance(document, dict), f"the data is no object: {data[:60]!r}")
    expect(isinstance(document.get("capabilities", {}), dict), f"capabilities is no object: {data[:60]!r}")


@wire_check(
    "vfio-user/version-no-json", section=_SECTION, observe="VERSION with two numbers and nothing else, as SPDK sends it"
)
async def version_no_json(wire: Wire) -> None:
    """The client's version data may be left out."""
    await _answer(wire, VersionProposal(capabilities=None))


@wire_check("vfio-user/version-subset", section=_SECTION, observe="propose max_msg_fds alone, look at the reply's keys")
async def version_subset(wire: Wire) -> None:
    """What the client did not propose, the server does not turn on: twin_socket, write_multiple."""
    *_, data = await _answer(wire, VersionProposal(capabilities={"max_msg_fds": 8, "padding": "x" * 200}))
    capabilities = json.loads(data[:-1]).get("capabilities", {}) if data else {}
    twin = capabilities.get("twin_socket")
    expect(not (isinstance(twin, dict) and twin.get("supported")), f"twin_socket {twin} was not proposed")
    expect(not capabilities.get("write_multiple"), "write_multiple was not proposed")


@wire_check("vfio-user/version-twice", section=_SECTION, observe="VERSION again: an error, or the end")
async def version_twice(wire: Wire) -> None:
    """VERSION is only negotiated once."""
    async with wire.connect() as client:
        reply = await _ask(client, Command.VERSION, QEMU_VERSION.payload())
        expect(_refused(reply), "a second VERSION was answered")


@wire_check(
    "vfio-user/version-bad-json",
    section=_SECTION,
    observe="data that is no JSON, or has no NUL: an error, or the end; then a VERSION that is right",
)
async def version_bad_json(wire: Wire) -> None:
    """Version data that is malformed is refused, and the next client is served."""
    for data in (b"{not json\0", b'{"capabilities": {}}', b'{"capabilities": 7}\0'):
        async with wire.connect(_SILENT) as client:
            reply = await _ask(client, Command.VERSION, VersionProposal(data=data).payload())
            expect(_refused(reply), f"VERSION with {data!r} was accepted")
    await _answer(wire, QEMU_VERSION)


@wire_check("qemu/version-size", section=_SECTION, observe="size of the reply to QEMU's 214 bytes")
async def version_size(wire: Wire) -> None:
    """The reply is no longer than the request: QEMU receives it into the request's own buffer."""
    *_, data = await _answer(wire, QEMU_VERSION)
    size, room = len(data) + 4, len(QEMU_VERSION.payload())
    expect(size <= room, f"a reply of {size} bytes to a request of {room} (without headers)")


@wire_check("qemu/version-limits", section=_SECTION, observe="capabilities of the reply to QEMU's VERSION")
async def version_limits(wire: Wire) -> None:
    """The limits are QEMU's: max_msg_fds 0 to 16, max_data_xfer_size 4096 to 64 MiB, pgsizes of 4 KiB or more."""
    *_, data = await _answer(wire, QEMU_VERSION)
    capabilities = json.loads(data[:-1]).get("capabilities", {}) if data else {}
    for key, least, most in (
        ("max_msg_fds", 0, 16),
        ("max_data_xfer_size", 4096, 64 << 20),
        ("max_dma_maps", 1, 65535),
        ("pgsizes", 4096, (1 << 64) - 1),
    ):
        value = capabilities.get(key, least)
        expect(type(value) is int and least <= value <= most, f"{key} is {value!r}, not {least} to {most}")
