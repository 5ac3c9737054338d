"""PyTorch: patches by ``unfold`` and a matrix product, as kfac-pytorch and curvlinops do it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.case import Program
from kfac_xp import ConvGeometry


def start() -> Any:
    """PyTorch, with as many threads as the others have, and products of float32 in float32."""
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # since 2.9
        matmul.fp32_precision = cudnn.conv.fp32_precision = "ieee"
    else:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
    return torch


def as_tensor(x: Any) -> Any:
    """A tensor on the memory of a NumPy array; a tensor as it is."""
    return start().from_numpy(x) if isinstance(x, np.ndarray) else x


def on_host(x: Any) -> np.ndarray:
    """The values of a tensor."""
    return x.detach().cpu().numpy()


def captured(call: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    """As `benchmarks.gpu.device.Device.captured`, of calls on PyTorch's CUDA tensors."""
    torch = start()
    if not torch.cuda.is_available():
        raise NotImplementedError("torch has no graphs here")
    current, own = torch.cuda.current_stream(), torch.cuda.Stream()
    own.wait_stream(current)
    with torch.cuda.stream(own):
        call()  # whatever is made once is there before
    current.wait_stream(own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for x in results:
        x.fill_(float("nan"))

    def replay() -> list[Any]:
        graph.replay()
        return results

    return replay


def channels_first(images: Any) -> Any:
    """A contiguous tensor [N, C, H, W] of images [N, H, W, C], NumPy's or PyTorch's."""
    return as_tensor(images).movedim(-1, 1).contiguous()


def unfolding(geometry: ConvGeometry, space: tuple[int, ...]) -> Callable[[Any], Any]:
    """A function from images [N, C, H, W] to patches [N, C * kh * kw, T]."""
    torch = start()
    (top, bottom), (left, right) = geometry.pads(space)
    settings = {"dilation": geometry.dilation, "stride": geometry.strides}
    if (top, left) == (bottom, right):
        settings["padding"] = (top, left)
        return lambda x: torch.nn.functional.unfold(x, geometry.kernel, **settings)
    pads = (left, right, top, bottom)
    functional = torch.nn.functional
    return lambda x: functional.unfold(functional.pad(x, pads), geometry.kernel, **settings)


def taps_first(dimension: int, num_taps: int) -> np.ndarray:
    """Indices that bring a patch, flattened as (C, taps), into kfac_xp's order (taps, C).

    What is left over after the last full set of taps, a bias, stays where it is.
    """
    full = dimension - dimension % num_taps if num_taps > 1 else dimension
    order = np.arange(full).reshape(-1, num_taps).T.reshape(-1)
    return np.concatenate([order, np.arange(full, dimension)])


def covariance(images: Any, geometry: ConvGeometry) -> Program:
    """Unfold, one row per location, and ``rows.T @ rows / len(rows)``."""
    x = channels_first(images)
    unfold = unfolding(geometry, images.shape[1:-1])

    def call() -> Any:
        patches = unfold(x)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        return (rows.t() @ rows) / rows.shape[0]

    order = taps_first(geometry.num_taps * images.shape[-1], geometry.num_taps)
    return Program(call, lambda cov: {"cov": on_host(cov)[np.ix_(order, order)]})


def conv_squared_outer(images: Any, grads: Any, geometry: ConvGeometry) -> Program:
    """Gradients of all cases by an einsum over unfolded patches, their squares summed."""
    torch = start()
    x, ds = channels_first(images), channels_first(grads).flatten(2)
    unfold = unfolding(geometry, images.shape[1:-1])

    def call() -> Any:
        case_grads = torch.einsum("ndt,nct->ndc", unfold(x), ds)
        return (case_grads**2).sum(0)

    order = taps_first(geometry.num_taps * images.shape[-1], geometry.num_taps)
    return Program(call, lambda out: {"diagonal": on_host(out)[order]})


def cholesky_inverses(matrices: list[Any]) -> Program:
    """``cholesky`` and ``cholesky_inverse``, one matrix after the other."""
    torch = start()
    from benchmarks.cases.inverses import probed

    tensors = [as_tensor(x) for x in matrices]
    return Program(
        lambda: [torch.cholesky_inverse(torch.linalg.cholesky(x)) for x in tensors],
        lambda inverses: probed([on_host(x) for x in inverses]),
    )
