"""Models of other libraries as linearisations: `torch`, `jax` and `autograd`.

Each module is imported on its own, and imports its library; importing `kfac_xp` imports none::

    from kfac_xp.integrations import torch as kfac_torch
"""
