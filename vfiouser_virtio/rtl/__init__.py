"""Simulator's end of a bridge (`pci.bridge`), for programs that simulate hardware: see docs/rtl-bridge.md.

`client` is plain Python with blocking calls; `cocotb_bridge`, with the extra ``cocotb``, drives a simulated design.
"""
