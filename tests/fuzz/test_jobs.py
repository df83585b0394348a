"""Jobs of the fuzzers, in processes of their own."""

import json
import subprocess
import sys

# Called with two arguments, getpid takes none: an exception that nothing catches.
_JOBS = """
import os
from vfiouser_virtio.testing.fuzz.jobs import run_jobs
from vfiouser_virtio.testing.fuzz.report import FuzzReport

report = FuzzReport("x", 1)
run_jobs(os.getpid, None, report, cases=1, seconds=None, jobs=2, stop=5, on_found=lambda _: None)
print(report.as_json())
"""


def test_a_job_that_dies_is_a_finding() -> None:
    """It was passed over: a crash in the fuzzer's own process was a good run."""
    done = subprocess.run([sys.executable, "-c", _JOBS], capture_output=True, text=True, check=True)
    [found] = json.loads(done.stdout)["findings"]
    assert found["kind"] == "died"
    assert "has ended with status 1" in found["what"]
    assert "TypeError" in done.stderr
