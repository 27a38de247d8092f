"""The CUDA kernels of the grid family, planned as on a device and run by the emulator, against plain torch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from simt.grid import Device
from torch import Tensor

from torchlin.ops.grid import grid_decode_reference, grid_dequantize_reference, grid_encode_reference
from torchlin.ops.grid_codes import (
    code_dtype,
    code_layout,
    grid_pack_reference,
    grid_unpack_reference,
    packed_bytes,
)

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
DTYPES = [FLOAT, HALF, BFLOAT]
DTYPE_IDS = ["float32", "float16", "bfloat16"]
SMALL = {"multiprocessors": 2}  # so few that blocks take several groups of rows
N = (2, 3, 4, 5, 7, 8, 11, 13, 16, 47, 64, 88, 256, 257, 300, 830, 1024, 4097, 40000, 65535, 65536)


def misaligned(t: Tensor, elements: int = 1) -> Tensor:
    """The same contiguous tensor, beginning `elements` into its storage."""
    room = torch.full((t.numel() + elements + 16,), 77, dtype=torch.float64).to(t.dtype)
    return room[elements : elements + t.numel()].view(t.shape).copy_(t)


@dataclass
class Layer:
    """A quantized layer with random codes."""

    n: int
    p: int
    in_features: int
    out_features: int
    block: int | None = None
    scales_dtype: torch.dtype = HALF

    def __post_init__(self) -> None:
        count = -(-self.in_features // self.p)
        self.grid = torch.randn(self.n, self.p)
        codes = torch.randint(0, self.n, (self.out_features, count)).to(code_dtype(self.n))
        self.packed = grid_pack_reference(codes, self.n)
        self.block_size = self.block or max(self.in_features, 1)
        blocks = -(-self.in_features // self.block_size)
        self.scales = (torch.rand(self.out_features, blocks) + 0.5).to(self.scales_dtype)

    def weight(self) -> Tensor:
        return grid_dequantize_reference(
            self.packed,
            self.scales.double(),
            self.grid.double(),
            self.in_features,
            block_size=self.block_size,
        )

    def check(
        self,
        batch: int,
        dtype: torch.dtype,
        *,
        bias: bool = True,
        off: int = 0,
        seed: int = 0,
        **device: int,
    ) -> dict:
        """Runs the layer on random x and returns the plan."""
        emulated = Device(seed=seed, **device)
        x = torch.randn(batch, self.in_features).to(dtype)
        b = torch.randn(self.out_features).to(dtype) if bias else None
        packed = misaligned(self.packed, off) if off else self.packed
        arguments = (packed, self.scales, self.grid, b, self.block_size)
        y = emulated.linear(misaligned(x, off) if off else x, *arguments)
        expected = torch.nn.functional.linear(x.double(), self.weight(), None if b is None else b.double())
        assert y.dtype == dtype
        # Sums are float32 and rounded once; elsewhere than in the plain kernel every number of the weight is rounded, too.
        rounding = (expected.to(dtype).double() - expected).norm()
        if emulated.plan["path"] != "gemv" and dtype is not FLOAT:
            terms = (x.double().square() @ self.weight().square().mT).sqrt().norm()
            rounding = rounding + torch.finfo(dtype).eps / 2 * terms
        error = (y.double() - expected).norm()
        assert error <= 1.001 * rounding + 3e-7 * expected.norm(), (
            f"error {error:.2e}, of rounding {rounding:.2e}, with {emulated.plan}"
        )
        return emulated.plan


# ---- codes


@pytest.mark.parametrize("n", N)
def test_pack_and_unpack(n):
    device = Device()
    assert device.module.layout(n) == code_layout(n)
    for rows, count in ((1, 1), (3, 7), (2, 33), (5, 64), (1, 301)):
        codes = torch.randint(0, n, (rows, count)).to(code_dtype(n))
        codes.view(-1)[0] = n - 1
        packed = device.pack(codes, n)
        assert torch.equal(packed, grid_pack_reference(codes, n))
        for bytes_in in (packed, misaligned(packed), misaligned(packed, 3)):
            assert torch.equal(device.unpack(bytes_in, n, count), codes)
    anything = torch.randint(0, 256, (4, packed_bytes(n, 37)), dtype=torch.uint8)
    assert torch.equal(device.unpack(anything, n, 37), grid_unpack_reference(anything, n, 37))
    assert device.pack(torch.empty(0, 5, dtype=code_dtype(n)), n).shape == (0, packed_bytes(n, 5))
    assert device.unpack(torch.empty(3, 0, dtype=torch.uint8), n, 0).shape == (3, 0)


@pytest.mark.parametrize("p", range(1, 9))
def test_encode_is_the_reference_bit_for_bit(p):
    for n, rows, k in ((2, 3, 1), (16, 5, 3 * p), (256, 7, 4 * p + 1), (300, 2, 2 * p - 1), (17, 40, 8 * p)):
        grid, x = torch.randn(n, p), torch.randn(rows, k)
        grid[n // 2] = grid[0]  # of equal points the first
        x[0, : min(k, p)] = grid[0, : min(k, p)]
        assert torch.equal(Device().encode(x, grid), grid_encode_reference(x, grid))
    assert Device().encode(torch.empty(2, 0), torch.randn(4, p)).shape == (2, 0)


def test_encode_breaks_ties_to_the_lowest_index():
    grid = torch.tensor([[1.0, 3.0], [3.0, 1.0], [-1.0, 2.0], [3.0, 1.0]])
    x = torch.tensor([[2.0, 2.0, 3.0, 1.0, 0.1, 0.3, 0.3]])
    assert Device().encode(x, grid).tolist() == [[0, 1, 2, 0]]  # the last has one coordinate
    # A square and a sum are two roundings: coordinates in another order are as far.
    pair = torch.tensor([[0.1, 0.7], [0.7, 0.1]])
    assert Device().encode(torch.full((1, 2), 0.3), pair).tolist() == [[0]]
    assert Device().encode(torch.full((1, 2), 0.3), pair.flip(0)).tolist() == [[0]]


@pytest.mark.parametrize("p", [1, 3, 8])
def test_encode_with_a_grid_of_several_tiles(p):
    n = 32768 // 4 // (1 if p == 1 else 4 if p == 3 else 8) + 37
    grid, x = torch.randn(n, p), torch.randn(3, 4 * p + 1)
    grid[-5:] = 3.0  # the last tile has some to find
    x[1] = 3.0
    codes = Device().encode(x, grid)
    assert torch.equal(codes, grid_encode_reference(x, grid))
    assert codes[1, 0] == n - 5


@pytest.mark.parametrize("p", [1, 2, 3, 8])
def test_decode(p):
    for n in (2, 256, 300):
        grid, codes = torch.randn(n, p), torch.randint(0, n, (77,)).to(code_dtype(n))
        expected = grid_decode_reference(codes.view(-1, 1), grid)
        assert torch.equal(Device().decode(codes, grid), expected)
    grid = torch.randn(5, p)
    assert torch.equal(Device().decode(torch.tensor([7], dtype=torch.uint8), grid)[0], grid[4])
    assert Device().decode(torch.empty(0, dtype=torch.uint8), grid).shape == (0, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("n", "p"), [(16, 1), (3, 1), (64, 2), (256, 2), (88, 3), (830, 2), (300, 5), (4096, 8)]
)
def test_dequantize(n, p, dtype):
    for in_features, block in (
        (8 * p, None),
        (24 * p + 1, None),
        (48 * p, 8 * p),
        (21 * p, 3 * p),
        (1, None),
    ):
        layer = Layer(n, p, in_features, 5, block, HALF if in_features % 2 else FLOAT)
        for packed in (layer.packed, misaligned(layer.packed)):
            got = Device().dequantize(packed, layer.scales, layer.grid, in_features, layer.block_size, dtype)
            exact = grid_dequantize_reference(
                layer.packed, layer.scales.float(), layer.grid, in_features, block_size=layer.block_size
            )
            assert torch.equal(got, exact.to(dtype)), "one product, one rounding"
    assert Device().dequantize(
        torch.empty(4, 0, dtype=torch.uint8), torch.ones(4, 0), torch.randn(n, p), 0, 1
    ).shape == (4, 0)


# ---- the linear layer


@pytest.mark.parametrize(("n", "p"), [(16, 1), (16, 2), (256, 2), (64, 2), (256, 1)])
def test_tensor_cores_serve_a_single_row_of_a_large_layer(n, p):
    """16-bit points are half the bytes of float32 ones, and those of lookups are what takes time."""
    for batch, dtype in ((1, BFLOAT), (3, HALF)):
        plan = Layer(n, p, 1024, 70).check(batch, dtype)
        assert (plan["path"], plan["tiling"]) == ("mma", "narrow")
    assert Layer(n, p, 1024, 33).check(1, HALF)["path"] == "gemv"


# What is planned at batch 1: where points are, how many codes an entry has, how many coordinates.
@pytest.mark.parametrize(
    ("n", "p", "in_features", "source", "codes", "coordinates"),
    [(16, 1, 1024, "wide", 2, 2), (16, 2, 1024, "wide", 2, 4), (256, 1, 512, "wide", 1, 1), (256, 2, 1100, "shared", 1, 2),
     (256, 2, 1120, "wide", 1, 2), (256, 4, 1024, "wide", 1, 4), (4, 1, 640, "wide", 4, 4), (6, 1, 384, "wide", 3, 4),
     (2, 1, 300, "shared", 4, 4), (3, 1, 301, "shared", 3, 4), (8, 1, 300, "shared", 2, 2), (64, 2, 515, "shared", 1, 2),
     (88, 2, 401, "shared", 1, 2), (830, 2, 300, "shared", 1, 2), (300, 5, 203, "shared", 1, 8), (16, 3, 100, "shared", 1, 4),
     (4096, 3, 101, "shared", 1, 4), (40000, 1, 90, "shared", 1, 1), (65536, 4, 66, "global", 1, 4),
     (65536, 1, 40, "global", 1, 1), (40000, 3, 61, "global", 1, 4), (65536, 8, 90, "global", 1, 8)],
)  # fmt: skip
def test_grids_of_every_kind_at_few_rows(n, p, in_features, source, codes, coordinates):
    layer = Layer(n, p, in_features, 13)
    for batch, columns in (
        (1, 1),
        (3, 8 if source == "global" else 4),
        (6, 4 if (source, p) == ("shared", 5) else 8),
    ):
        plan = layer.check(batch, FLOAT, **SMALL)
        assert (plan["path"], plan["source"], plan["columns"]) == ("gemv", source, columns)
        assert (plan["codes"], plan["coordinates"]) == (codes, coordinates)
    for dtype in (HALF, BFLOAT):
        layer.check(2, dtype, **SMALL)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "p", "in_features", "source"),
    [(16, 1, 1024, "wide"), (16, 2, 640, "wide"), (256, 1, 512, "wide"), (256, 2, 544, "wide"), (256, 4, 512, "wide"),
     (6, 1, 384, "wide"), (3, 1, 301, "shared"), (64, 2, 515, "shared"), (64, 1, 130, "shared"), (88, 2, 401, "shared"),
     (88, 1, 99, "shared"), (830, 2, 300, "shared"), (256, 3, 100, "shared"), (4096, 4, 200, "shared")],
)  # fmt: skip
def test_grids_of_every_kind_on_tensor_cores(n, p, in_features, source, dtype):
    layer = Layer(n, p, in_features, 21)
    for batch, tiling in ((6, "narrow"), (11, "tall"), (33, "broad")):
        plan = layer.check(batch, dtype)
        assert (plan["path"], plan["source"], plan["tiling"]) == ("mma", source, tiling)


@pytest.mark.parametrize(
    ("n", "p", "in_features", "block", "fine", "path"),
    [(256, 2, 256, 32, False, "mma"), (256, 2, 320, 64, False, "mma"), (16, 1, 1536, 512, False, "mma"),
     (64, 2, 90, 8, False, "mma"), (16, 1, 256, 48, False, "mma"), (64, 2, 100, 6, True, "mma"), (16, 2, 72, 6, True, "mma"),
     (88, 2, 64, 8, True, "mma"),
     # Blocks that end within a word are left to the plain kernel.
     (88, 2, 64, 6, True, "gemv"), (3, 1, 40, 7, True, "gemv"), (300, 3, 63, 9, True, "gemv"),
     (65536, 4, 40, 12, True, "gemv")],
)  # fmt: skip
def test_blocks_of_scales(n, p, in_features, block, fine, path):
    for scales_dtype in (HALF, FLOAT):
        layer = Layer(n, p, in_features, 9, block, scales_dtype)
        for batch in (1, 2):
            assert layer.check(batch, FLOAT)["fine"] == fine
        for batch, dtype, tiling in ((5, HALF, "narrow"), (9, BFLOAT, "blocks")):
            plan = layer.check(batch, dtype)
            assert (plan["path"], plan["tiling"]) == (path, tiling if path == "mma" else "")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_bytes_at_any_address(batch, dtype):
    for n, p, in_features in ((256, 2, 512), (64, 2, 301), (88, 2, 100), (830, 1, 50), (16, 1, 33)):
        layer = Layer(n, p, in_features, 7)
        for off in (1, 2, 3, 5):
            plan = layer.check(batch, dtype, off=off)
            assert plan["source"] == "shared", "16-byte loads need 16-byte addresses"


def test_what_lies_beside_the_codes_does_not_matter():
    layer = Layer(64, 2, 301, 3)
    x, results = torch.randn(1, 301), []
    for fill in (0, 255):
        room = torch.full((layer.packed.numel() + 64,), fill, dtype=torch.uint8)
        packed = room[17 : 17 + layer.packed.numel()].view(layer.packed.shape).copy_(layer.packed)
        results.append(Device().linear(x, packed, layer.scales, layer.grid, None, 301))
    assert torch.equal(*results)


@pytest.mark.parametrize(("n", "p"), [(7, 1), (88, 2), (300, 1), (40000, 4)])
def test_bytes_that_are_no_codes_read_as_the_last_point(n, p):
    """Nothing is read out of bounds, and every kernel reads the same."""
    layer = Layer(n, p, 64, 5)
    layer.packed = torch.randint(0, 256, layer.packed.shape, dtype=torch.uint8)
    layer.check(1, FLOAT)
    layer.check(9, HALF)
    got = Device().dequantize(layer.packed, layer.scales, layer.grid, 64, 64)
    torch.testing.assert_close(got.double(), layer.weight(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_odd_shapes(dtype):
    for in_features, out_features, batch in (
        (1, 1, 1),
        (2, 1, 5),
        (3, 2, 1),
        (31, 3, 9),
        (64, 5, 2),
        (0, 3, 2),
        (0, 3, 9),
    ):
        for bias in (False, True):
            if in_features or bias:
                Layer(16, 1, in_features, out_features).check(batch, dtype, bias=bias)
    layer = Layer(16, 1, 0, 3)
    empty = Device().linear(torch.empty(2, 0, dtype=dtype), layer.packed, layer.scales, layer.grid, None, 1)
    assert torch.equal(empty, torch.zeros(2, 3, dtype=dtype))
    for shape in ((0, 4), (2, 0)):
        layer = Layer(16, 1, 4, shape[1])
        y = Device().linear(
            torch.empty(shape[0], 4, dtype=dtype), layer.packed, layer.scales, layer.grid, None, 4
        )
        assert y.shape == shape


def test_rows_longer_than_shared_memory():
    """x comes in chunks, and warps that share rows go on where they left off."""
    tight = {"multiprocessors": 1, "shared_per_block": 99 * 1024}
    plan = Layer(16, 2, 40000, 6).check(1, FLOAT, **tight)
    assert plan["source"] == "wide"
    assert plan["steps"] > plan["chunk"]
    plan = Layer(64, 2, 9001, 6).check(8, FLOAT, **tight)
    assert plan["steps"] > plan["chunk"] >= plan["splits"] > 1
    plan = Layer(16, 1, 4096, 17, 512).check(5, HALF, **tight)
    assert plan["tiling"] == "narrow", "the sums of 32 columns do not fit"
    tight["shared_per_block"] = 120 * 1024
    plan = Layer(256, 2, 3072, 200).check(9, BFLOAT, **tight)
    assert plan["tiling"] == "tall"
    assert plan["steps"] > plan["parts"] * plan["chunk"]


@pytest.mark.parametrize(
    ("n", "in_features", "block"), [(256, 1100, None), (64, 300, None), (256, 1024, 128)]
)
def test_parts_of_rows_are_added_afterwards(n, in_features, block):
    """Steps that do not divide, parts with nothing to do, warps that share a part's."""
    for batch, tiling in ((9, "tall"), (65, "broad")):
        plan = Layer(n, 2, in_features, 40, block).check(batch, HALF)
        assert (plan["tiling"], plan["parts"]) == ("blocks" if block else tiling, 8)
        assert plan["steps"] % 8 or block
    plan = Layer(n, 2, in_features, 40, block).check(9, BFLOAT, multiprocessors=1)
    assert plan["parts"] > 1


@pytest.mark.parametrize(("batch", "dtype"), [(1, FLOAT), (4, HALF), (6, BFLOAT), (12, HALF)])
def test_blocks_take_several_groups_of_rows(batch, dtype):
    for layer in (Layer(256, 2, 96, 150), Layer(64, 2, 90, 150), Layer(256, 2, 96, 150, 32)):
        plan = layer.check(batch, dtype, multiprocessors=1)
        groups = -(-150 // (4 if plan["path"] == "gemv" else 32 if plan["tiling"] == "tall" else 16))
        assert groups * plan["splits"] > 8 * plan["grid"][0] or plan["path"] == "mma"


@pytest.mark.parametrize(("dtype", "limit"), [(FLOAT, 48), (HALF, 192), (BFLOAT, 192)])
def test_many_rows_are_left_to_torch(dtype, limit):
    layer = Layer(16, 1, 64, 8)
    assert layer.check(limit + 1, dtype)["path"] == "dense"
    assert layer.check(limit, dtype, multiprocessors=2)["path"] != "dense"


@pytest.mark.parametrize(
    ("n", "p", "in_features", "block", "batch", "dtype"),
    [(256, 2, 1024, None, 1, FLOAT), (64, 2, 301, None, 3, HALF), (256, 2, 512, None, 12, BFLOAT),
     (16, 1, 512, 64, 6, HALF), (65536, 2, 64, None, 2, FLOAT)],
)  # fmt: skip
def test_the_schedule_never_shows(n, p, in_features, block, batch, dtype):
    layer, x = Layer(n, p, in_features, 22, block), torch.randn(batch, in_features).to(dtype)
    results = []
    for seed in range(3):
        device = Device(seed=seed, multiprocessors=2)
        results.append(device.linear(x, layer.packed, layer.scales, layer.grid, None, layer.block_size))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("batch", [2, 9])
def test_non_finite_numbers_stay_in_their_row(batch, dtype):
    layer, x = Layer(256, 2, 101, 5), torch.randn(batch, 101).to(dtype)
    x[1, 3] = torch.nan
    y = Device().linear(x, layer.packed, layer.scales, layer.grid, None, 101)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()
    assert y[2:].isfinite().all()


def test_integers_are_exact():
    """Whole numbers within float32 and the 16-bit types: no tolerance."""
    for batch, dtype in ((1, FLOAT), (4, HALF), (6, BFLOAT), (20, HALF)):
        layer = Layer(16, 2, 64, 11)
        layer.grid = torch.randint(-3, 4, (16, 2)).float()
        layer.scales = torch.ones_like(layer.scales)
        x = torch.randint(-1, 2, (batch, 64)).to(dtype)
        y = Device().linear(x, layer.packed, layer.scales, layer.grid, None, 64)
        assert torch.equal(y.double(), x.double() @ layer.weight().mT)
