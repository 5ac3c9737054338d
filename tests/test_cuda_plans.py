"""How squared outer products are divided among blocks of CUDA threads: no device is needed."""

import itertools

import pytest

from kfac_xp.kernels.cuda.squared_channels import division
from kfac_xp.kernels.cuda.tiles import TILES, Plan, Tile, plan

SIZES = list(itertools.product([1, 27, 577, 4608], [1, 64, 1000], [1, 7, 512], [1, 49, 3136]))


def blocks(chosen: Plan, rows: int, columns: int, groups: int = 1) -> int:
    """How many are launched."""
    return chosen.tile.cover(rows, columns, groups) * chosen.parts * chosen.splits


class TestTiles:
    @pytest.mark.parametrize("tile", [*TILES["float32"], *TILES["float64"]])
    def test_kernels_can_use_them(self, tile):
        assert tile.threads_d % 2 == 0
        assert tile.threads_c % tile.each_d == tile.threads_d % tile.each_c == 0
        assert tile.threads % tile.chunk == 0
        assert tile.chunk % (tile.threads_c // tile.each_d) == 0
        assert tile.chunk % (tile.threads_d // tile.each_c) == 0

    def test_groups_have_tiles_of_their_own(self):
        tile = Tile(threads_d=2, threads_c=2, each_d=2, each_c=2)  # 4 x 4
        assert tile.cover(5, 12, 1) == 2 * 3
        assert tile.cover(5, 12, 2) == 2 * 2 * 2  # six columns each


class TestPlans:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_what_holds_for_all(self, dtype):
        for rows, columns, cases, locations in SIZES:
            chosen = plan(rows, columns, 1, cases, locations, dtype)
            assert chosen.tile in TILES[dtype]
            assert 1 <= chosen.parts <= cases
            assert chosen.splits == 1 or chosen.parts == cases
            assert 1 <= chosen.splits <= locations
            sums = chosen.parts * chosen.splits * rows * columns * (4 if dtype == "float32" else 8)
            assert chosen.parts * chosen.splits == 1 or sums <= 2**24

    def test_large_problems_have_many_blocks(self):
        # N, T, rows, columns: layers of a ResNet-50, and one location.
        for n, t, rows, columns in [
            (32, 49, 2304, 256),
            (32, 196, 1152, 128),
            (32, 784, 576, 64),
            (32, 3136, 576, 64),
            (512, 64, 576, 64),
            (4096, 1, 577, 64),
        ]:
            assert blocks(plan(rows, columns, 1, n, t, "float32"), rows, columns) >= 132

    def test_small_problems_are_not_divided(self):
        assert plan(16, 16, 1, 4, 4, "float32")[1:] == (1, 1)

    def test_few_columns_have_a_narrow_tile(self):
        assert plan(577, 32, 1, 64, 16, "float32").tile.columns == 32
        assert plan(577, 64, 1, 64, 16, "float32").tile.columns == 64
        assert plan(577, 64, 2, 64, 16, "float32").tile.columns == 32


class TestOneChannelPerGroup:
    def test_cases_first_and_then_locations(self):
        assert division(64, 5000, 3136) == (1024, 1)
        assert division(64, 32, 3136) == (32, 32)
        assert division(64, 32, 49) == (32, 1)
        assert division(10**6, 32, 3136) == (1, 1)
