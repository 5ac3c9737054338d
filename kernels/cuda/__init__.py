"""Numba CUDA kernels for CuPy arrays, each the twin of the CPU kernel of the same name."""
