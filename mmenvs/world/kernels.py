"""How the kernels of the world are compiled: to be found on disk the next time, and without the lock of Python."""

from __future__ import annotations

from numba import njit

# Kernels borrow their arrays and make none, so nothing needs to count references to them. Counting is a locked
# instruction wherever an array is taken out of a tuple, a quarter of the time that a question takes to be drawn.
# numba finds kernels on disk by the files they stand in: after a change here, delete those in ``__pycache__``.
kernel = njit(cache=True, nogil=True, _nrt=False)  # type: ignore[call-overload]

# What kernels are made of. A call would hand over every field of every array, a quarter of the time again. LLVM does the
# inlining: with numba's own, ``inline="always"``, each place is typed anew, which takes several times as long to compile.
inlined = njit(forceinline=True, _nrt=False)  # type: ignore[call-overload]
