"""Compiled replacements for the Array API bodies in ``kfac_xp.ops``.

Installed as ``kfac_xp.kernels``. A kernel assumes checked input and knows nothing of K-FAC;
``kfac_xp.ops`` names kernels by dotted path, so that Numba is imported when one is first wanted.
"""
