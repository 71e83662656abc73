"""Threads are fixed before anything loads them: two under contention can be twenty times slower than one."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")
