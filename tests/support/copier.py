"""The simulated copier of examples/rtl: a simulator for a bridge, and the registers of the design."""

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio
from support.icarus import with_icarus

RTL = Path(__file__).parents[2] / "examples" / "rtl"
IDENT, CONTROL, STATUS, LENGTH, SOURCE, TARGET, SUM, CLOCKS, SCRATCH = (
    0x00,
    0x04,
    0x08,
    0x0C,
    0x10,
    0x18,
    0x20,
    0x24,
    0x28,
)
START, INTERRUPT_ENABLE = 1, 2
BUSY, DONE, ERROR = 1, 2, 4
RTL1 = int.from_bytes(b"RTL1", "little")


@asynccontextmanager
async def simulated_copier(path: Path, folder: Path, *options: str) -> AsyncIterator[None]:
    """examples/rtl/simulate.py for the bridge at ``path``, which builds in ``folder``.

    When the block ends, the bridge has to end as well: the simulation is waited for, and must not have failed.
    """
    environment = await trio.to_thread.run_sync(with_icarus, dict(os.environ))
    command = [sys.executable, str(RTL / "simulate.py"), str(path), *options]
    with (folder / "simulation.log").open("wb") as log:
        process = await trio.lowlevel.open_process(
            command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
        with trio.fail_after(120):
            status = await process.wait()
        assert status == 0, (folder / "simulation.log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the simulator, too
        with trio.CancelScope(shield=True):
            await process.wait()


# Three copies, each of what the one before has made: waited for by reads, and by interrupts.
DRIVER = r"""
device=$(find_device 1234:5ac1)
echo 1234 5ac1 >/sys/bus/pci/drivers/uio_pci_generic/new_id
bar=$(head -n 1 $device/resource | cut -d' ' -f1)
reg() { devmem $((bar + $1)) ${3:-32} $2; }
intx() { printf '\006\000' | dd of=$device/config bs=1 seek=4 conv=notrunc 2>/dev/null; }   # memory, bus master, INTx
ram=%(ram)d
read_ram() { dd if=/dev/mem bs=4096 skip=$(((ram + $1) / 4096)) count=1 2>/dev/null; }
intx
until [ "$(reg 0)" = 0x314C5452 ]; do sleep 0.1; done
seq 2000 | head -c 4096 >/tmp/page
dd if=/tmp/page of=/dev/mem bs=4096 seek=$((ram / 4096)) conv=notrunc 2>/dev/null
exec 4</dev/uio0
interrupted() { echo interrupts $(dd bs=4 count=1 <&4 2>/dev/null | hexdump -v -e '1/4 "%%d"') $(reg 0x08); }
polled() { while [ $(($(reg 0x08) & 1)) = 1 ]; do :; done; echo polled $(reg 0x08); }
copy() {
    reg 0x10 $1 64; reg 0x18 $2 64; reg 0x0c 4096; reg 0x04 $4
    $3
    reg 0x08 6
    reg 0x08 >/dev/null   # a write is posted: when this read is answered, the interrupt is down, and may be unmasked
    read_ram $(($2 - ram)) | cmp - /tmp/page && echo the same
}
copy $ram $((ram + 0x2000)) polled 1
copy $((ram + 0x2000)) $((ram + 0x4000)) interrupted 3
intx
copy $((ram + 0x4000)) $((ram + 0x6000)) interrupted 3
exec 4<&-
reg 0x28 0x12345678
echo 1 >$device/reset
intx
echo reset $(reg 0x28)
before=$(reg 0x24); sleep 1; after=$(reg 0x24)
[ $((after - before)) -gt 0 ] && [ $((after - before)) -lt 1000 ] && echo time stands still
"""
