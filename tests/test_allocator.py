"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

# Larger than what glibc would keep by itself, 32 MiB.
FAULTS = """
import resource, sys, torch
from memflow_ops.allocator import keep_freed_memory
if "keep" in sys.argv and not keep_freed_memory():
    sys.exit("not glibc")
for step in range(40):
    if step == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, *arguments], capture_output=True, text=True)
    if "not glibc" in done.stderr:
        pytest.skip("this C library has no such setting")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults of Linux")
def test_a_process_that_keeps_freed_memory_takes_no_page_faults_for_it_again():
    pages = 20 * (40 << 20) // 4096
    assert faults() > pages / 2, "there is nothing to save here"
    assert faults("keep") < pages / 4
