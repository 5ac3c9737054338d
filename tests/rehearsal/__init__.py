"""The GPU's tests and programs on a stand-in of CuPy: ``python -m tests.rehearsal``."""
