"""Simulation of copier.v for a bridge: a cocotb test, which lasts as long as the bridge does."""

import os
from typing import Any

import cocotb
from cocotb.clock import Clock

from vfiouser_virtio.rtl.axi import AxiLiteMaster, AxiMemory
from vfiouser_virtio.rtl.client import connect_to_bridge
from vfiouser_virtio.rtl.cocotb_bridge import BridgedDesign


@cocotb.test()
async def answer_for_the_bridge(dut: Any) -> None:
    Clock(dut.clk, 10, unit="ns").start()
    with connect_to_bridge(os.environ["BRIDGE"]) as bridge:
        card = BridgedDesign(bridge, dut.clk, reset=dut.rst, busy=[dut.busy])
        card.registers[0] = AxiLiteMaster(dut, "s_axil", dut.clk)
        card.add_memory(AxiMemory(dut, "m_axi", dut.clk, card))
        card.add_interrupt(0, dut.irq)
        await card.serve()
