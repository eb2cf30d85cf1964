"""What is free goes back to the machine, by what the kernel says of the process."""

import subprocess
import sys

import pytest

FREED = """
import torch
from genarm.lab.machine import give_back

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

del_me = torch.zeros(30 << 20, dtype=torch.uint8)
del del_me  # glibc takes pieces of up to this size from its heap from now on
before = resident()
pieces = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(400)]
kept = pieces[::40]
del pieces
held = resident() - before
give_back()
print(held, resident() - before, sum(int(piece.sum()) for piece in kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_is_free_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    held, left, kept = map(float, done.stdout.split())
    assert held > 300  # MiB: or else there is nothing to give back
    assert left < 30
    assert kept == 10 * 2**20
