"""kfac-jax: the two functions by which it computes the second moment of patches, compiled."""

from __future__ import annotations

import numpy as np

from benchmarks.case import Program
from kfac_xp import ConvGeometry


def covariance(images: np.ndarray, geometry: ConvGeometry, *, explicit: bool) -> Program:
    """``patches_moments_explicit``, which makes patches, or ``patches_moments``, which does not."""
    import jax
    import kfac_jax

    space = images.shape[1:-1]
    num_rows = images.shape[0] * geometry.num_locations(space)
    settings = {"strides": geometry.strides, "padding": geometry.pads(space)}
    if any(d > 1 for d in geometry.dilation):
        settings["kernel_dilation"] = geometry.dilation
    function = kfac_jax.patches_moments_explicit if explicit else kfac_jax.patches_moments

    @jax.jit
    def moment(x: jax.Array) -> jax.Array:
        return function(x, geometry.kernel, **settings)[0] / num_rows

    x = jax.device_put(images)
    compiled = moment.lower(x).compile()
    d = geometry.num_taps * images.shape[-1]
    return Program(
        lambda: compiled(x).block_until_ready(),
        lambda matrix: {"cov": np.asarray(matrix).reshape(d, d)},
    )
