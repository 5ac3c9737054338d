import itertools

import numpy as np
import pytest

from kfac_xp import ConvGeometry
from kfac_xp.geometry import require_channels_last
from tests.cases import load
from tests.generated import given, settings
from tests.generated import strategies as st


@pytest.mark.parametrize("case", load("patches"))
def test_output_shapes_of_the_reference(case):
    meta, arrays = load("patches")[case]
    geometry = ConvGeometry.create(
        meta["kernel"], meta["strides"], meta["padding"], meta["dilation"]
    )
    out = arrays["out.convolution_patches"].shape[1 : 1 + geometry.num_axes]
    assert geometry.output_shape(meta["in_spatial"]) == out


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    data=st.data(),
)
def test_output_shape_is_what_a_sliding_filter_gives(sizes, data):
    ints = st.tuples(*[st.integers(1, 3)] * len(sizes))
    kernel, strides, dilation = (data.draw(ints) for _ in range(3))
    padding = data.draw(
        st.one_of(
            st.sampled_from(["SAME", "VALID"]),
            st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * len(sizes)),
        )
    )
    geometry = ConvGeometry.create(kernel, strides, padding, dilation)
    for axis, (n, out, (before, after)) in enumerate(
        zip(sizes, geometry.output_shape(sizes), geometry.pads(sizes), strict=True)
    ):
        k, s, d = kernel[axis], strides[axis], dilation[axis]
        last_tap = (k - 1) * d
        starts = [i for i in range(0, n + before + after, s) if i + last_tap < n + before + after]
        assert out == len(starts)
        if padding == "SAME":
            assert out == -(-n // s)
            assert after - before in (0, 1)
    assert geometry.num_locations(sizes) == np.prod(geometry.output_shape(sizes))


def test_strides_with_and_without_the_batch_and_channel_axes():
    for strides, dilation in itertools.product([(2, 1), (1, 2, 1, 1)], [(1, 3), (1, 1, 3, 1)]):
        geometry = ConvGeometry.create((3, 3), strides, "valid", dilation)
        assert geometry == ConvGeometry((3, 3), (2, 1), (1, 3), "VALID")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": ()}, "at least one spatial axis"),
        ({"kernel": (0, 3)}, "`kernel` must hold positive ints"),
        ({"kernel": (3, 3), "strides": (1.5, 1)}, "`strides` must hold positive ints"),
        ({"kernel": (3, 3), "strides": (1, 1, 1)}, "`strides` must have 2 entries"),
        ({"kernel": (3, 3), "strides": (2, 1, 1, 1)}, "must be 1 for the batch and the channels"),
        ({"kernel": (3, 3), "dilation": (1,)}, "`dilation` must have 2 entries"),
        ({"kernel": (3, 3), "padding": "CAUSAL"}, "`padding` must be 'SAME', 'VALID' or"),
        ({"kernel": (3, 3), "padding": [(1, 1)]}, r"2 pairs \(before, after\)"),
        ({"kernel": (3,), "padding": [(-1, 1)]}, "non-negative ints"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvGeometry.create(**arguments)


def test_channels_must_be_last():
    for good in (None, "NHWC", "NWC", "channels_lastC"):
        require_channels_last(good)
    with pytest.raises(ValueError, match="'NCHW'"):
        require_channels_last("NCHW")


def test_taps_in_the_padding_are_left_out():
    geometry = ConvGeometry.create((3, 3))
    one_pixel, dropped = geometry.without_padding_taps((1, 1))
    assert (one_pixel.kernel, dropped) == ((1, 1), ((1, 1), (1, 1)))
    assert one_pixel.output_shape((1, 1)) == (1, 1)
    row, dropped = geometry.without_padding_taps((1, 4))
    assert (row.kernel, dropped) == ((1, 3), ((1, 1), (0, 0)))
    assert geometry.without_padding_taps((2, 2))[1] == ((0, 0), (0, 0))
    nowhere = ConvGeometry.create((3,), padding="VALID")
    assert nowhere.without_padding_taps((2,))[1] == ((0, 0),)
