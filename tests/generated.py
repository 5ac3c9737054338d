"""Hypothesis, or where it is not installed names under which its tests are skipped.

Other tests of the same modules then run all the same.
"""

from unittest.mock import MagicMock

import pytest

__all__ = ["given", "settings", "strategies"]

try:
    from hypothesis import given, settings, strategies
except ImportError:
    strategies = MagicMock()

    def given(*args, **kwargs):
        return pytest.mark.skip(reason="Hypothesis is not installed")

    def settings(**kwargs):
        return lambda function: function
