"""Block-tridiagonal K-FAC: chains of dense layers whose inverse couples neighbours."""

from kfac_xp.block_tridiagonal.blocks import Chain, FullyConnectedChainFB
from kfac_xp.block_tridiagonal.chain import BlockTridiagonalChain, ChainDecomposition
from kfac_xp.block_tridiagonal.factor import ChainFactor
from kfac_xp.block_tridiagonal.links import ChainMoments

__all__ = [
    "BlockTridiagonalChain",
    "Chain",
    "ChainDecomposition",
    "ChainFactor",
    "ChainMoments",
    "FullyConnectedChainFB",
]
