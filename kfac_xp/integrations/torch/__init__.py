"""PyTorch modules and functions as they are: layers found, registered, linearised, trained."""

from kfac_xp.integrations.torch.functions import linearize
from kfac_xp.integrations.torch.linearization import Linearization
from kfac_xp.integrations.torch.model import Model
from kfac_xp.integrations.torch.optimizer import KFAC
from kfac_xp.integrations.torch.registration import register

__all__ = ["KFAC", "Linearization", "Model", "linearize", "register"]
