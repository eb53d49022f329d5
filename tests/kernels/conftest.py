"""Where the kernels run: emulated on the host under several orders of threads, on a GPU, or the CPU's own."""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Callable, Iterator

import pytest
import torch

EMULATED = os.environ.get("LOCALLIP_EMULATION")
DEVICE = os.environ.get("LOCALLIP_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
# lowest thread first, highest first, at random, and one warp far ahead of the others
ORDERS = [0, 1, 2, 3, 5]
SHARED_LIMIT = 232448


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device. Where it is emulated, threads run in an order that follows from the test's name.

    Each kernel is run by so many tests that it meets all orders.
    """
    if EMULATED:
        order = ORDERS[zlib.crc32(request.node.nodeid.encode()) % len(ORDERS)]
        ctypes.CDLL(EMULATED).locallip_emulation_order(order)
    return DEVICE


@pytest.fixture
def shared_limit() -> Iterator[object]:
    """A function that sets how many bytes of shared memory an emulated block may have; of no effect elsewhere."""

    def limit(size: int) -> None:
        if EMULATED:
            ctypes.CDLL(EMULATED).locallip_emulation_shared_limit(ctypes.c_size_t(size))

    yield limit
    limit(SHARED_LIMIT)


@pytest.fixture
def took_blocks() -> Callable[[int], None]:
    """A function that asserts the size of the largest cluster that was launched; of no effect on a device."""

    def check(blocks: int) -> None:
        if EMULATED:
            assert ctypes.CDLL(EMULATED).locallip_emulation_largest_cluster() == blocks

    if EMULATED:
        ctypes.CDLL(EMULATED).locallip_emulation_largest_cluster()
    return check


@pytest.fixture
def code_for_compute_80() -> Iterator[None]:
    """Emulated kernels are of PTX for compute capability 8.0, on a device of 9.0; of no effect elsewhere."""
    if EMULATED:
        ctypes.CDLL(EMULATED).locallip_emulation_ptx_version(80)
    yield
    if EMULATED:
        ctypes.CDLL(EMULATED).locallip_emulation_ptx_version(90)


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """No norm is taken by a kernel that stays on chip."""
    monkeypatch.setenv("LOCALLIP_STREAMING", "1")


@pytest.fixture
def autocast() -> Iterator[None]:
    with torch.autocast(DEVICE, torch.bfloat16):
        yield
