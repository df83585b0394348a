"""Declarations of all faults, by the part of a device that they are in."""
