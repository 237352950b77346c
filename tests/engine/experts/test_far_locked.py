"""Page-locked far memory with everything real but the calls of CUDA: sizes, order, refusals, damage, the way back."""
from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch

from engine.core import UserError
from engine.experts.store import FarBlobs, FarLocked
from engine.files.manifest import Manifest, experts_name
from engine.machine.pinned_memory import HUGE_PAGE, HostMemory
from tests.support.folders import compressed


class Ledger:
    """A driver that locks up to `limit` bytes, or allocates up to `own`, and remembers what it still owes."""

    def __init__(self, limit: int = 1 << 60, own: int = 0) -> None:
        self.limit, self.own, self.registered, self.allocated = limit, own, {}, {}

    def register(self, address: int, n_bytes: int) -> int:
        if sum(self.registered.values()) + n_bytes > self.limit:
            return 2  # CUDA_ERROR_OUT_OF_MEMORY
        self.registered[address] = n_bytes
        return 0

    def unregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def allocate(self, n_bytes: int) -> tuple[int, int]:
        if n_bytes > self.own:
            return 2, 0
        buffer = (ctypes.c_uint8 * n_bytes)()
        self.allocated[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def free(self, address: int) -> int:
        del self.allocated[address]
        return 0


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def folder(request, tmp_path_factory) -> Path:
    return compressed(request.param, tmp_path_factory.mktemp("locked"))[2]


def test_far_memory_is_the_files(folder):
    manifest, ledger, shares = Manifest.load(folder), Ledger(), []
    plain, locked = FarBlobs(folder, manifest), FarLocked(folder, manifest, ledger, shares.append)
    assert locked.memory.locked_bytes == plain.layers * plain.experts * plain.layout.blob_bytes
    assert sum(ledger.registered.values()) == locked.memory.n_bytes and locked.memory.reason == ""
    assert shares == sorted(shares) and shares[-1] == 1.0
    for layer in range(plain.layers):
        for view in ("blobs", "sketches", "records"):
            assert torch.equal(getattr(locked, view)(layer), getattr(plain, view)(layer))
        assert locked.biases(layer).keys() == plain.biases(layer).keys()
        assert all(torch.equal(bias, plain.biases(layer)[name]) for name, bias in locked.biases(layer).items())
        assert locked.records(layer).data_ptr() % 128 == 0 and locked.records(layer).stride(1) % 16 == 0
    targets = [[torch.empty(plain.neurons, plain.hidden) for _ in range(3)] for _ in range(2)]
    for far, rows in zip((plain, locked), targets, strict=True):
        far.decode(1, 2, *rows)
    assert all(map(torch.equal, *targets))
    locked.close()
    assert not ledger.registered and locked.memory.bytes is None


def test_a_damaged_or_short_file_is_a_sentence_and_unlocks(folder, tmp_path):
    manifest = Manifest.load(folder)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path, ledger = tmp_path / experts_name(1), Ledger()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged .expert .* compress the model again"):
        FarLocked(tmp_path, manifest, ledger)
    assert not ledger.registered


def test_memory_starts_at_a_huge_page_and_has_its_exact_size():
    ledger = Ledger()
    memory = HostMemory(5 * (1 << 20) // 2 + 17, ledger)
    assert memory.bytes.shape == (memory.n_bytes,) and memory.bytes.data_ptr() % HUGE_PAGE == 0
    assert list(ledger.registered.values()) == [memory.n_bytes]  # a copy may not span two
    memory.bytes.fill_(7)
    assert int(memory.bytes.long().sum()) == 7 * memory.n_bytes
    memory.close()


def test_memory_that_is_dropped_is_unlocked_while_it_is_still_mapped():
    """Also where its maker failed before anybody could close it."""
    class Reading(Ledger):
        def unregister(self, address: int) -> int:
            assert bytes((ctypes.c_uint8 * 16).from_address(address)) == b"\7" * 16  # unmapped, this ends the process
            return super().unregister(address)
    ledger, own = Reading(), Ledger(limit=0, own=1 << 22)
    for driver in (ledger, own):
        memory = HostMemory(3 << 20, driver)
        memory.bytes.fill_(7)
        assert driver.registered or driver.allocated
        del memory
        assert not driver.registered and not driver.allocated


@pytest.mark.parametrize("n_units", [1, 2, 3])
def test_a_refusal_leaves_what_is_locked_and_says_so(n_units):
    ledger = Ledger(limit=(n_units << 20) + 5, own=0)
    memory = HostMemory(4 << 20, ledger, 1 << 20)
    assert memory.locked_bytes == sum(ledger.registered.values()) == n_units << 20
    assert memory.bytes.shape == (4 << 20,) and len(ledger.registered) == 1
    assert memory.reason.startswith(f"The system page-locks only {n_units}") and "CUDA error 2" in memory.reason
    assert memory.reason.endswith(".") and memory.reason.count(".") < 4


def test_what_the_system_does_not_lock_the_driver_may_have():
    ledger = Ledger(limit=0, own=1 << 22)
    memory = HostMemory(3 << 20, ledger)
    assert memory.locked_bytes == memory.n_bytes and len(ledger.allocated) == 1 and not memory.reason
    memory.bytes.copy_(torch.arange(3 << 20) % 251)
    assert int(memory.bytes[1000]) == 1000 % 251
    memory.close()
    assert not ledger.allocated
    refused = HostMemory(3 << 20, Ledger(limit=0))
    assert refused.locked_bytes == 0 and refused.reason and refused.bytes.shape == (3 << 20,)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells how memory is mapped")
def test_memory_is_private():
    """Shared memory, which is what Python maps by itself, gets small pages whatever it asks for."""
    memory = HostMemory(4 * HUGE_PAGE, Ledger())
    spans = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
    kinds = [kind for start, end, kind in spans if int(start, 16) <= memory.bytes.data_ptr() < int(end, 16)]
    assert kinds == ["rw-p"]
    memory.close()
