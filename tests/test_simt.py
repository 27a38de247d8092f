"""The SIMT emulator: what it computes, and what it refuses to let pass."""

from __future__ import annotations

import numpy as np
import pytest
from simt.build import load

SEEDS = range(6)
RACE = "race|read before it was written"


@pytest.fixture(scope="module")
def probes():
    return load("probes")


def numbers(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal(n).astype(np.float32)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_gives_the_same_under_every_schedule(probes, seed):
    x = numbers(4 * 96)
    y = probes.run("reverse_block", x, 4 * 96, grid=4, block=96, shared_bytes=96 * 4, seed=seed)
    np.testing.assert_array_equal(y, x.reshape(4, 96)[:, ::-1].ravel())
    x = numbers(128)
    y = probes.run("reverse_warp", x, 128, block=128, shared_bytes=128 * 4, seed=seed)
    np.testing.assert_array_equal(y, x.reshape(4, 32)[:, ::-1].ravel())
    y = probes.run("warp_sum", x, 128, grid=2, block=64, seed=seed)
    np.testing.assert_allclose(y, np.repeat(x.reshape(4, 32).sum(1), 32), rtol=1e-5, atol=1e-5)


def test_the_seed_draws_the_order_of_threads_and_blocks(probes):
    def order(seed):
        return tuple(probes.run("order_of_threads", numbers(1), 129, grid=2, block=64, seed=seed)[1:])

    orders = [order(s) for s in SEEDS]
    assert all(sorted(o) == list(range(128)) for o in orders)
    assert len(set(orders)) == len(orders)
    assert orders[0] == order(0)


def test_a_race_in_global_memory_shows_between_seeds(probes):
    left = {float(probes.run("last_writer_wins", numbers(1), 1, block=64, seed=s)[0]) for s in SEEDS}
    assert len(left) > 1


def test_shuffles(probes):
    x = numbers(32)
    y = probes.run("shuffles", x, 128).reshape(4, 32)
    lane = np.arange(32)
    np.testing.assert_array_equal(y[0], np.full(32, x[5]))
    np.testing.assert_array_equal(y[1], x[np.where(lane < 3, lane, lane - 3)])
    np.testing.assert_array_equal(y[2], x[np.where(lane % 16 + 3 > 15, lane, lane + 3)])
    np.testing.assert_array_equal(y[3], x[lane ^ 9])


def test_votes_and_reducing_barriers(probes):
    x = np.where(np.arange(32) % 5 == 0, 1, -1).astype(np.float32)
    ballot = sum(1 << i for i in range(0, 32, 5)) & 0xFFFFFF
    assert probes.run("votes", x, 6).tolist() == [ballot, 1, 0, 1, 0, 7]
    assert probes.run("votes", -np.ones(32, np.float32), 6).tolist() == [0, 0, 0, 0, 0, 0]
    assert probes.run("votes", np.ones(32, np.float32), 6).tolist() == [0xFFFFFF, 1, 1, 1, 1, 32]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma(probes, dtype):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    y = probes.run(f"matrix_{dtype}", np.concatenate([a.ravel(), b.ravel()]).astype(np.float32), 128)
    np.testing.assert_array_equal(y.reshape(16, 8), a @ b)


def test_atomics_and_asynchronous_copies(probes):
    assert probes.run("count_up", numbers(1), 1, grid=3, block=50)[0] == 150
    x = numbers(256)
    y = probes.run("copy_async", x, 256, block=64, shared_bytes=1024)
    np.testing.assert_array_equal(y, x.reshape(64, 4)[::-1].ravel())


@pytest.mark.parametrize(
    ("kernel", "arguments", "message"),
    [
        ("barrier_in_branch", {}, "divergent block barrier"),
        ("exit_before_barrier", {"n": 31}, "1 of 32 threads exited without reaching it"),
        ("shuffle_in_branch", {}, "waits for lanes that never come.*exited"),
        ("shuffle_of_absent_lane", {}, "reads lane 20, which takes no part"),
        ("mask_without_caller", {}, "mask leaves out the caller"),
        ("shuffle_against_barrier", {"block": 64}, "waits for lanes that never come.*block barrier"),
        ("write_past_end", {"shared_bytes": 128, "n": 1}, "out of bounds: write of 4 bytes at byte 128"),
        ("read_before_start", {"shared_bytes": 128}, "out of bounds: read of 4 bytes at byte -4"),
        ("read_unwritten", {"shared_bytes": 128}, "read before it was written"),
        ("vector_misaligned", {"shared_bytes": 128, "block": 1}, "misaligned"),
        ("copy_async_unawaited", {"shared_bytes": 512}, "read before it was written"),
        ("reverse_without_barrier", {"shared_bytes": 128}, RACE),
        ("reverse_across_warps_with_syncwarp", {"shared_bytes": 256, "block": 64}, RACE),
        ("warp_sum", {"block": 1025}, "a block of 1025 threads"),
        ("warp_sum", {"grid": 0}, "an empty grid"),
        ("warp_sum", {"shared_bytes": 228 * 1024}, "bytes of shared memory"),
    ],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_errors_are_caught(probes, kernel, arguments, message, seed):
    with pytest.raises(probes.Error, match=message) as caught:
        probes.run(kernel, numbers(2048), 2048, seed=seed, **arguments)
    if "invalid launch" not in str(caught.value):
        assert f"seed {seed}" in str(caught.value)
    # The emulator is as good as new after an error.
    x = numbers(64)
    y = probes.run("reverse_block", x, 64, block=64, shared_bytes=256, seed=seed)
    np.testing.assert_array_equal(y, x[::-1])


def test_shared_memory_starts_as_nan_in_every_block(probes):
    probes.run("reverse_block", numbers(64), 64, block=64, shared_bytes=256)
    assert np.isnan(probes.run("poison", numbers(1), 64, grid=2, block=1, shared_bytes=256, n=64)).all()
