"""Host memory that the kernels of a card can read: page-locked, of exactly the size that was asked for.

`Tensor.pin_memory` rounds up to a power of two, which for 18 GB of experts is 14 GB too many. Here memory is mapped in
huge pages (random reads of 2 KB meet far fewer entries of the card's page tables) and locked in one registration,
because a copy may not span two; where the system locks no memory of ours, the driver is asked for memory of its own.
What is not locked stays usable by the host.
The two calls of the CUDA driver are behind `Driver`; all else runs anywhere.
"""
from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from contextlib import suppress
from typing import Protocol

import torch

from engine.units import size

Tensor = torch.Tensor
HUGE_PAGE = 1 << 21
SHARED = 3          # CUDA's flags "portable" and "device map": every context, and the kernels, may use it


class Driver(Protocol):
    """What is asked of CUDA. Results are CUDA's own codes, 0 for success."""

    def register(self, address: int, n_bytes: int) -> int: ...

    def unregister(self, address: int) -> int: ...

    def allocate(self, n_bytes: int) -> tuple[int, int]:
        """-> code, address."""

    def free(self, address: int) -> int: ...


class CudaDriver:
    """libcuda itself, in the context that torch made."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")  # makes the context, and makes it this thread's
        self._cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")

    @staticmethod
    def _enter() -> None:
        """Waits until no kernel reads the memory. A thread that has called nothing of CUDA yet has no context before,
        and would be refused; of a card that was lost the driver has taken everything back."""
        with suppress(RuntimeError):
            torch.cuda.synchronize()

    def register(self, address: int, n_bytes: int) -> int:
        return self._cuda.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), SHARED)

    def unregister(self, address: int) -> int:
        self._enter()
        return self._cuda.cuMemHostUnregister(ctypes.c_void_p(address))

    def allocate(self, n_bytes: int) -> tuple[int, int]:
        found = ctypes.c_void_p()
        code = self._cuda.cuMemHostAlloc(ctypes.byref(found), ctypes.c_size_t(n_bytes), SHARED)
        return code, found.value or 0

    def free(self, address: int) -> int:
        self._enter()
        return self._cuda.cuMemFreeHost(ctypes.c_void_p(address))


class _Debt:
    """What the driver has been told of one piece of memory, and `mapped`, which must not go before it is taken back."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.registered, self.owned = driver, 0, 0
        self.mapped: mmap.mmap | None = None

    def register(self, address: int, n_bytes: int) -> int:
        code = self.driver.register(address, n_bytes)
        self.registered = 0 if code else address
        return code

    def unregister(self) -> None:
        if self.registered:
            self.driver.unregister(self.registered)
        self.registered = 0

    def settle(self) -> None:
        self.unregister()
        if self.owned:
            self.driver.free(self.owned)
        self.owned, self.mapped = 0, None


class HostMemory:
    """`bytes`: uint8 [n_bytes]. locked_bytes: how much of it, from the start, a card can read.

    Close it when done; what is dropped without it is unlocked before it is unmapped all the same.
    """

    def __init__(self, n_bytes: int, driver: Driver, unit_bytes: int | None = None) -> None:
        """unit_bytes: where not everything can be locked, a multiple of it is; None: all or nothing."""
        self._debt = _Debt(driver)
        weakref.finalize(self, self._debt.settle).atexit = False  # the end of the process settles it
        self.n_bytes, self.refusal, self._unit = n_bytes, 0, unit_bytes or n_bytes
        self._map(n_bytes)
        self.locked_bytes = self._lock()
        if not self.locked_bytes and n_bytes:
            self._let_the_driver_allocate()

    def _map(self, n_bytes: int) -> None:
        """Anonymous memory that begins at a huge page; nothing of it is touched yet."""
        # Python maps shared memory unless told otherwise, and Linux gives that no huge pages.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
        mapped = self._debt.mapped = mmap.mmap(-1, max(n_bytes, 1) + HUGE_PAGE, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                mapped.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without huge pages: the same memory in small ones
                pass
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        self.bytes = whole[start:start + n_bytes]

    def _lock(self) -> int:
        """Register everything, else as many whole units as the system lets -> bytes that are locked."""
        if self._register(self.n_bytes):
            return self.n_bytes
        unit, fits, fails = self._unit, 0, -(-self.n_bytes // self._unit)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if self._register(middle * unit):
                self._debt.unregister()
                fits = middle
            else:
                fails = middle
        return fits * unit if fits and self._register(fits * unit) else 0

    def _register(self, n_bytes: int) -> bool:
        code = self._debt.register(self.bytes.data_ptr(), n_bytes) if n_bytes else 0
        self.refusal = code or self.refusal
        return not code

    def _let_the_driver_allocate(self) -> None:
        """Memory of the driver's own, in place of ours, all or nothing."""
        code, address = self._debt.driver.allocate(self.n_bytes)
        if code == 0 and address:
            self._debt.owned = address
            buffer = (ctypes.c_uint8 * self.n_bytes).from_address(address)
            self.bytes = torch.frombuffer(buffer, dtype=torch.uint8)
            self._debt.mapped, self.locked_bytes, self.refusal = None, self.n_bytes, 0

    @property
    def reason(self) -> str:
        """What could not be locked, and what helps; "" when everything is."""
        if self.locked_bytes == self.n_bytes:
            return ""
        return (f"The system page-locks only {size(self.locked_bytes)} of the {size(self.n_bytes)} of experts "
                f"(CUDA error {self.refusal}); close other programs, or take a model with smaller experts.")

    def close(self) -> None:
        """Unlock, which waits for the card, and let go of the memory."""
        self._debt.settle()
        self.locked_bytes, self.bytes = 0, None
