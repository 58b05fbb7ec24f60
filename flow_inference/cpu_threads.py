"""How PyTorch's threads wait for each other on a CPU. It is read when torch is imported."""

import os

SPIN_COUNT = "10000"  # turns of a loop, about half a millisecond; docs/speed.md has the measurement


def limit_spinning() -> None:
    """Have threads of GNU OpenMP that wait for others give their core up after half a millisecond.

    By default they spin for many times longer, and the thread that they wait for does not get the core where another
    program has the other ones. Call it before torch is imported. What the environment says already stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
