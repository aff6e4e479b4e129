import resource
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: every page is one of 4 kB
from psla_fast.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
def touch():
    torch.ones(24 * 2**20)  # 96 MB
for _ in range(10):  # until the heap has settled
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_large_tensors_get_the_pages_that_earlier_ones_freed():
    pages = 5 * 96 * 2**20 // resource.getpagesize()
    assert count_faults("keep") < 0.01 * pages
    assert count_faults("don't") > 0.5 * pages  # otherwise this module isn't needed
