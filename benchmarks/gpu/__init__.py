"""Benchmarks on one device, in one process: ``python -m benchmarks.run --gpu``."""
