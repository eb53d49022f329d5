"""The kernels' PTX, executed on the host: what it computes, and that its counts have not risen (bench/counts.py)."""

from __future__ import annotations

import ctypes
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import counts
from bench.counts import Layer
from tests.emulation import build, ptx

reason = ptx.missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"PTX is not executed: {reason}")

IN_ONE_BLOCK = (232448, 232448)  # bytes of shared memory, in float32 and in bfloat16


@pytest.fixture(scope="module")
def counter() -> counts.Counter:
    return counts.Counter(build.ROOT / "csrc")


def of_launch(counter: counts.Counter, kernel: str) -> counts.Counts:
    """What was counted of the one of `kernel`'s instances that was launched."""
    found = [each for name in counter.library.entries if kernel in name and (each := counter.counted(name)).launches]
    assert len(found) == 1
    return found[0]


def matrix(layer: Layer, weight: Tensor) -> Tensor:
    """Of the operator on channels-last maps."""
    if not layer.size:
        return weight.double()
    unit = torch.eye(layer.units[0], dtype=torch.float64).view(-1, layer.size, layer.size, layer.in_channels)
    images = F.conv2d(
        unit.permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), stride=layer.stride, padding=layer.padding
    )
    return images.permute(0, 2, 3, 1).flatten(1).T


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("tf32", 2e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(
    "layer, shared",
    [
        (Layer(4, 8, 8, 3, 1, 1), IN_ONE_BLOCK),
        (Layer(8, 8, 12, 3, 1, 1), (24000, 17000)),
        (Layer(5, 33, 9, 4, 2, 1), IN_ONE_BLOCK),
        (Layer(8, 16, 11, 4, 2, 1), (28000, 25000)),
        (Layer(48, 24), IN_ONE_BLOCK),
        (Layer(40, 10), IN_ONE_BLOCK),
    ],
    ids=lambda value: value.title if isinstance(value, Layer) else f"{value} bytes",
)
def test_norms(
    counter: counts.Counter, layer: Layer, shared: tuple[int, int], precision: str, tolerance: float
) -> None:
    random = torch.Generator().manual_seed(0)
    into, out = layer.units
    batch = 2
    sizes = (layer.out_channels, layer.kernel, layer.kernel, layer.in_channels)
    weight = torch.randn(sizes if layer.size else sizes[::3], generator=random)
    row_mask, col_mask = (torch.rand(batch, n, generator=random) < 0.3 for n in (out, into))
    whole = matrix(layer, weight)
    masked = whole * row_mask[:, :, None] * col_mask[:, None]
    # near the top singular vector, so that few iterations converge
    start = torch.linalg.svd(masked).Vh[:, 0].float().contiguous()
    counter.reset()
    limit = counter.handle.locallip_emulation_shared_limit
    limit(ctypes.c_size_t(shared[precision == "bfloat16"]))
    try:
        sigma, right, left = counter.library.norms(
            *(weight, row_mask, col_mask, start), geometry=layer.geometry, iterations=12, precision=precision
        )
    finally:
        limit(ctypes.c_size_t(IN_ONE_BLOCK[0]))
    expected = torch.linalg.matrix_norm(masked, 2)
    torch.testing.assert_close(sigma.double(), expected, rtol=tolerance, atol=0)
    reached = torch.einsum("bi,bij,bj->b", left.double(), masked, right.double())
    torch.testing.assert_close(reached, expected, rtol=tolerance, atol=0)
    if layer.size:
        assert (of_launch(counter, "convolution_kernel").cluster > 1) == (shared != IN_ONE_BLOCK)


def launched(counter: counts.Counter, body: str, *arrays: Tensor) -> counts.Counts:
    """Runs one warp with 4 KiB of shared memory. %a0 to 8: of 64 bits, the arrays' addresses first; %r, %f."""
    parameters = ",".join(f".param .u64 p{i}" for i in range(len(arrays)))
    loads = "".join(f"ld.param.u64 %a{i}, [p{i}];\n" for i in range(len(arrays)))
    registers = ".reg .b64 %a<9>;\n.reg .b32 %r<9>;\n.reg .f32 %f<9>;\n"
    (entry,) = ptx.parse(f".entry snippet({parameters})\n{{\n{registers}{loads}{body}ret;\n}}\n")
    counter.library.entries["snippet"] = entry
    try:
        counter.library.load("snippet", counts.facts(entry))
    finally:
        del counter.library.entries["snippet"]
    addresses = b"".join(array.data_ptr().to_bytes(8, "little") for array in arrays)
    found = counter.counted("snippet")
    ctypes.memset(ctypes.byref(found), 0, ctypes.sizeof(found))
    wrong = counter.handle.locallip_ptx_launch(
        b"snippet", 1, 32, ctypes.c_size_t(4096), addresses, ctypes.c_size_t(len(addresses))
    )
    assert wrong is None, wrong
    return found


def test_a_product_in_bfloat16(counter: counts.Counter) -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 16, generator=random).bfloat16(), torch.randn(16, 8, generator=random).bfloat16()
    c = torch.randn(16, 8, generator=random)
    # lane by lane, pairs of neighbours in depth: a at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
    lanes = [(lane // 4, lane % 4) for lane in range(32)]
    of_a = torch.stack([a[g + 8 * (i % 2), 2 * t + 8 * (i // 2) :][:2] for g, t in lanes for i in range(4)])
    of_b = torch.stack([b[2 * t + 8 * i :][:2, g] for g, t in lanes for i in range(2)])
    of_c = torch.stack([c[g + 8 * i, 2 * t :][:2] for g, t in lanes for i in range(2)])
    sums = "{%f0, %f1, %f2, %f3}"
    launched(
        counter,
        f"""
        shl.b32 %r6, %laneid, 3;
        shl.b32 %r7, %laneid, 4;
        cvt.u64.u32 %a3, %r6;
        cvt.u64.u32 %a4, %r7;
        add.s64 %a5, %a0, %a4;
        add.s64 %a6, %a1, %a3;
        add.s64 %a7, %a2, %a4;
        ld.global.v4.u32 {{%r0, %r1, %r2, %r3}}, [%a5];
        ld.global.v2.u32 {{%r4, %r5}}, [%a6];
        ld.global.v4.f32 {sums}, [%a7];
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {sums}, {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, {sums};
        st.global.v4.f32 [%a7], {sums};
        """,
        *(of_a, of_b, of_c),
    )
    expected = a.double() @ b.double() + c.double()
    found = torch.stack([of_c[2 * (4 * (i % 8) + j // 2) + i // 8, j % 2] for i in range(16) for j in range(8)])
    torch.testing.assert_close(found.view(16, 8).double(), expected, rtol=1e-6, atol=1e-6)
    assert bool((found.view(16, 8).double().abs() <= expected.abs()).all())  # toward zero


@pytest.mark.parametrize(
    "access, shift, wavefronts",
    [("f32", 2, 1), ("f32", 3, 2), ("f32", 7, 32), ("f32", 0, None), ("v2.f32", 3, 2), ("v4.f32", 4, 4), ("f64", 3, 2)],
)
def test_wavefronts_of_shared_memory(counter: counts.Counter, access: str, shift: int, wavefronts: int | None) -> None:
    """Lanes 2 ** shift bytes apart; all at one place where that is 1."""
    registers = {"v2.f32": "{%f0, %f1}", "v4.f32": "{%f0, %f1, %f2, %f3}"}.get(access, "%f0")
    step = f"shl.b32 %r0, %laneid, {shift};\n" if shift else "mov.u32 %r0, 0;\n"
    found = launched(counter, f"{step}ld.shared.{access} {registers}, [%r0];\n")
    phase, load = counts.PHASES.index("rest"), counts.NUMBER["shared load"]
    assert found.wavefronts[phase][load] == (wavefronts or 1)


@pytest.mark.parametrize("shift, sectors", [(2, 4), (3, 8), (5, 32)])
def test_sectors_of_global_memory(counter: counts.Counter, shift: int, sectors: int) -> None:
    array = torch.zeros(512)
    step = f"shl.b32 %r0, %laneid, {shift};\ncvt.u64.u32 %a1, %r0;\nadd.s64 %a2, %a0, %a1;\n"
    found = launched(counter, f"{step}ld.global.f32 %f0, [%a2];\n", array)
    phase, load = counts.PHASES.index("rest"), counts.NUMBER["global load"]
    assert found.sectors[phase][load] == sectors and found.bytes[phase][load] == 128


def test_an_unknown_register_is_named(counter: counts.Counter) -> None:
    with pytest.raises(ValueError, match="%smid"):
        launched(counter, "mov.u32 %r0, %smid;\n")


def test_an_unknown_instruction_is_named(counter: counts.Counter) -> None:
    name, entry = next(iter(counter.library.entries.items()))
    first = dataclasses.replace(entry.instructions[0], opcode="ld.unheard")
    counter.library.entries[name] = dataclasses.replace(entry, instructions=[first, *entry.instructions[1:]])
    try:
        with pytest.raises(ValueError, match=r"ld\.unheard"):
            counter.library.load(name)
    finally:
        counter.library.entries[name] = entry


def test_tensor_instructions_are_as_many_as_the_shape_needs(counter: counts.Counter) -> None:
    # 16 x 16 pixels by 16 channels, 9 taps of 16 channels, padded to tiles of 16 x 8 x 8 and channels to 32; both ways
    layer = Layer(16, 16, 16, 3, 1, 1)
    counted = counter.count(layer, "tf32", 1)
    pieces = -(-9 * 16 // 32)
    assert counted.main.totals["tensor"] == 3 * (256 // 16) * (32 // 8) * pieces * 4


def test_products_have_no_conflicts_of_banks(counter: counts.Counter) -> None:
    counter.count(Layer(32, 32, 32, 3, 1, 1), "tf32", 0)
    found = of_launch(counter, "convolution_kernel")
    phase, load = counts.PHASES.index("products"), counts.NUMBER["shared load"]
    steps = found.executed[phase][counts.NUMBER["tensor"]] / 16
    # for 16 tensor instructions a load of the offset, 4 of pixels and 2 of weights, each of these 512 bytes
    assert found.executed[phase][load] == 7 * steps
    assert found.wavefronts[phase][load] == 25 * steps


def test_what_rises_is_told() -> None:
    assert counts.risen({"layer": {"shared wavefronts": 100}}, {"layer": {"shared wavefronts": 104}})
    assert not counts.risen({"layer": {"shared wavefronts": 100}}, {"layer": {"shared wavefronts": 102}})


def test_no_count_has_risen(counter: counts.Counter) -> None:
    old = json.loads(counts.COMMITTED.read_text())
    if old["nvcc"] != counts.compiler():
        pytest.skip(f"the counts are from nvcc {old['nvcc']}, this is {counts.compiler()}")
    new = {each.title: each.record() for each in counts.checked(counter)}
    assert old["counts"].keys() == new.keys()
    assert not counts.risen(old["counts"], new), "python -m bench counts --check --json bench/counts.json renews them"
