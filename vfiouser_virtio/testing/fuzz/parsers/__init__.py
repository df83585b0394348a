"""Fuzzing of parsers alone: rings and messages, in tens of microseconds a case, in step with a plain reading of them.

::

    seed, number ──▶ entropy ──▶ *_cases ──▶ ops ──▶ *_bench ──▶ the package's parser ─┐
                                               └───────────────▶ *_model ───────────────┴─▶ the same, or a finding

`run` has the loop. What is around the parsers (an event loop, a device at work, a client's process) is not in it: for
that there are `fuzz.run`, `fuzz.servers` and `fuzz.process`.
"""
