"""The second moment of a convolution's patches: chunked, by offsets, or spectral."""

from kfac_xp.patch_covariance.blocks import correlation_blocks
from kfac_xp.patch_covariance.covariance import PatchCovariance, patch_covariance
from kfac_xp.patch_covariance.rates import Rates

__all__ = ["PatchCovariance", "Rates", "correlation_blocks", "patch_covariance"]
