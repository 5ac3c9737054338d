"""Slow truth: explicit loops over Python numbers and NumPy float64. Imports nothing of kfac_xp."""

import itertools

import numpy as np


def output_shape(space, kernel, strides, dilation, pads):
    """Count the positions at which the filter fits, one by one."""
    shape = []
    for n, k, s, d, (before, after) in zip(space, kernel, strides, dilation, pads, strict=True):
        starts = range(-before, n + after, s)
        shape.append(sum(start + (k - 1) * d < n + after for start in starts))
    return tuple(shape)


def same_pads(space, kernel, strides, dilation):
    """The least padding, odd zero after, with which an axis has ``ceil(size / stride)`` outputs."""
    pads = []
    for n, k, s, d in zip(space, kernel, strides, dilation, strict=True):
        for total in itertools.count():
            pair = (total // 2, total - total // 2)
            if output_shape((n,), (k,), (s,), (d,), (pair,))[0] >= -(-n // s):
                pads.append(pair)
                break
    return tuple(pads)


def taps_inside(location, space, kernel, strides, dilation, pads):
    """Each filter tap that lies inside the image at this location, and where it lies."""
    for tap in itertools.product(*(range(k) for k in kernel)):
        position = tuple(
            o * s + t * d - before
            for o, s, t, d, (before, _) in zip(location, strides, tap, dilation, pads, strict=True)
        )
        if all(0 <= p < size for p, size in zip(position, space, strict=True)):
            yield tap, position


def extract_patches(inputs, kernel, strides, dilation, pads):
    """``[N, *out, prod(kernel) * C]``: every entry looked up on its own, zero outside."""
    inputs = np.asarray(inputs, dtype=np.float64)
    num_cases, *space, channels = inputs.shape
    out = output_shape(space, kernel, strides, dilation, pads)
    patches = np.zeros((num_cases, *out, *kernel, channels))
    for n in range(num_cases):
        for location in np.ndindex(*out):
            for tap, position in taps_inside(location, space, kernel, strides, dilation, pads):
                for c in range(channels):
                    patches[(n, *location, *tap, c)] = inputs[(n, *position, c)]
    return patches.reshape(num_cases, *out, int(np.prod(kernel)) * channels)


def convolution(inputs, weight, strides, dilation, pads):
    """``[N, *out, C_out]``: the layer itself; `weight` is ``[*kernel, C_in, C_out]``."""
    inputs, weight = np.asarray(inputs, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    num_cases, *space, _ = inputs.shape
    kernel = weight.shape[:-2]
    out_shape = output_shape(space, kernel, strides, dilation, pads)
    out = np.zeros((num_cases, *out_shape, weight.shape[-1]))
    for n in range(num_cases):
        for location in np.ndindex(*out_shape):
            for tap, position in taps_inside(location, space, kernel, strides, dilation, pads):
                out[(n, *location)] += inputs[(n, *position)] @ weight[tap]
    return out


def grouped_convolution(inputs, weight, strides, dilation, pads, groups):
    """Convolutions of consecutive channels side by side: ``[*kernel, C_in / groups, C_out]``."""
    ins, outs = np.split(inputs, groups, axis=-1), np.split(weight, groups, axis=-1)
    parts = [convolution(x, w, strides, dilation, pads) for x, w in zip(ins, outs, strict=True)]
    return np.concatenate(parts, axis=-1)


def transposed_convolution(inputs, weight, strides, dilation, pads, extra, groups=1):
    """Every pixel spread over the outputs that it reaches: ``[*kernel, C_in, C_out / groups]``."""
    inputs, weight = np.asarray(inputs, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    num_cases, *space, channels = inputs.shape
    kernel, c_out = weight.shape[:-2], weight.shape[-1]
    axes = zip(space, kernel, strides, dilation, pads, extra, strict=True)
    out_shape = [(n - 1) * s + (k - 1) * d + 1 - sum(p) + e for n, k, s, d, p, e in axes]
    out = np.zeros((num_cases, *out_shape, groups, c_out))
    for pixel in np.ndindex(*space):
        for tap in np.ndindex(*kernel):
            reached = tuple(
                i * s + t * d - before
                for i, t, s, d, (before, _) in zip(pixel, tap, strides, dilation, pads, strict=True)
            )
            if all(0 <= o < size for o, size in zip(reached, out_shape, strict=True)):
                for c in range(channels):
                    group = c // (channels // groups)
                    for n in range(num_cases):
                        out[(n, *reached, group)] += inputs[(n, *pixel, c)] * weight[tap][c]
    return out.reshape(num_cases, *out_shape, groups * c_out)


def squared_outer(rows, grads):
    """``out[d, c] = sum_n (sum_t rows[n, t, d] * grads[n, t, c]) ** 2``, term by term."""
    rows, grads = np.asarray(rows, dtype=np.float64), np.asarray(grads, dtype=np.float64)
    if rows.ndim == 2:
        rows, grads = rows[:, None, :], grads[:, None, :]
    out = np.zeros((rows.shape[2], grads.shape[2]))
    for n in range(rows.shape[0]):
        case_grad = np.zeros(out.shape)
        for t in range(rows.shape[1]):
            case_grad += np.outer(rows[n, t], grads[n, t])
        out += case_grad * case_grad
    return out


def conv_squared_outer(
    inputs,
    outputs_grad,
    kernel,
    strides,
    dilation,
    pads,
    has_bias=False,
    patch_mask=None,
    groups=1,
    rotations=None,
):
    """The squares of each case's gradients of filter and bias, added up over cases.

    The gradients follow the definition of the layer, without patches. With `rotations` (u, v) they
    are made matrices, the bias as last row, and turned to ``u^T gradient v`` before the square.
    """
    inputs = np.asarray(inputs, dtype=np.float64)
    grads = np.asarray(outputs_grad, dtype=np.float64)
    num_cases, *space, channels = inputs.shape
    out_shape = output_shape(space, kernel, strides, dilation, pads)
    c_out, c_in = grads.shape[-1], channels // groups
    mask = np.ones((*kernel, c_in)) if patch_mask is None else np.asarray(patch_mask)
    total = 0.0
    for n in range(num_cases):
        weight, bias = np.zeros((*kernel, c_in, c_out)), np.zeros((1, c_out))
        for location in np.ndindex(*out_shape):
            grad = grads[(n, *location)]
            bias += grad
            for tap, position in taps_inside(location, space, kernel, strides, dilation, pads):
                pixel = inputs[(n, *position)]
                for c in range(c_out):
                    first = c // (c_out // groups) * c_in
                    weight[tap][:, c] += mask[tap] * pixel[first : first + c_in] * grad[c]
        gradient = weight.reshape(-1, c_out)
        if has_bias:
            gradient = np.concatenate([gradient, bias])
        if rotations is not None:
            u, v = (np.asarray(r, dtype=np.float64) for r in rotations)
            gradient = u.T @ gradient @ v
        total = total + gradient**2
    if num_cases == 0:
        rows = int(np.prod(kernel)) * c_in + has_bias
        return np.zeros((rows, c_out) if rotations is None else [u.shape[1] for u in rotations])
    return total


def correlation_blocks(parts, layout, channels, last=None):
    """The matrix block by block, as the op documents it."""
    num_taps = layout.blocks.shape[1]
    out = np.zeros((num_taps, channels, num_taps, channels))
    for halves, pairs, blocks in zip(parts, layout.pairs, layout.blocks, strict=True):
        for t, u in np.ndindex(num_taps, num_taps):
            if blocks[t] >= 0 and blocks[u] >= 0:
                d = pairs[t, u]
                here = halves[d, blocks[t], :, blocks[u], :]
                out[t, :, u, :] += here + halves[-1 - d, blocks[u], :, blocks[t], :].T
    out = out.reshape(num_taps * channels, -1)
    if last is None:
        return out
    return np.block([[out, last[:-1, None]], [last[None, :]]])


def sua(x, num_taps, has_bias):
    """Patches of uncorrelated pixels: ``kron(I, cov) + h h^T``, taps first, pixel by pixel."""
    pixels = x.reshape(-1, x.shape[-1])
    mean = sum(pixels) / len(pixels)
    cov = sum(np.outer(p - mean, p - mean) for p in pixels) / len(pixels)
    size = num_taps * len(mean) + has_bias
    full, h = np.zeros((size, size)), np.ones(size)
    for tap in range(num_taps):
        rows = slice(tap * len(mean), (tap + 1) * len(mean))
        full[rows, rows] = cov
        h[rows] = mean
    return full + np.outer(h, h)


def chain_fisher(option, covs, lags, uses):
    """The Fisher of a chain of uses, added up lag by lag.

    `covs` are the two sides' second moments, damped, and `lags` the moments of each use with the
    one before. Option 1: symmetric, and as long as the data; 2: not symmetric, and without an end.
    """
    if option == 1:

        def lagged(cov, lag, distance):
            w, v = np.linalg.eigh(cov)
            root, inverse = (v * w**0.5) @ v.T, (v * w**-0.5) @ v.T
            w, v = np.linalg.eigh(inverse @ ((lag + lag.T) / 2) @ inverse)
            return root @ (v * np.abs(w) ** distance) @ v.T @ root

        return sum(
            np.kron(*(lagged(c, d, abs(u - v)) for c, d in zip(covs, lags, strict=True)))
            for u in range(uses)
            for v in range(uses)
        )
    fisher, far = np.kron(*covs), list(covs)
    steps = [lag @ np.linalg.inv(cov) for cov, lag in zip(covs, lags, strict=True)]
    for _ in range(200):
        far = [step @ x for step, x in zip(steps, far, strict=True)]
        fisher = fisher + np.kron(*far) + np.kron(*far).T
    return uses * fisher
