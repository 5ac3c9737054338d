"""Run the GPU's tests on the stand-in: ``python -m tests.rehearsal [arguments of pytest]``."""

import sys

import pytest

if __name__ == "__main__":
    arguments = ["-p", "tests.rehearsal.plugin", "-p", "no:cacheprovider", "-m", "gpu"]
    sys.exit(pytest.main([*arguments, *sys.argv[1:]]))
