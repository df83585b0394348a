"""Soak: servers and Python guests in processes of their own, under load, faults and kills, for as long as wanted.

::

    children    processes that are forked from one that has imported all, and killed at any moment
    ledger      what has been written to a disk, and what was flushed: survives the death of every process but ours
    writer      guest that writes numbered blocks to a disk
    kills       disk whose guest and server are killed again and again
"""
