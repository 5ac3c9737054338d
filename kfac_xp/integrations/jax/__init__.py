"""JAX functions as they are: the layers found in what they compute, registered and linearised."""

from kfac_xp.integrations.jax.model import Linearization, Model, register

__all__ = ["Linearization", "Model", "register"]
