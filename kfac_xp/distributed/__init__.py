"""Training on several ranks: what connects them, and who keeps, inverts and applies what."""

from kfac_xp.distributed.buffers import Form, gather_arrays
from kfac_xp.distributed.communicator import Communicator, SingleProcess
from kfac_xp.distributed.mpi import MpiCommunicator
from kfac_xp.distributed.nccl import NcclCommunicator
from kfac_xp.distributed.placement import Placement, PlacementStrategy, place, worker_fractions
from kfac_xp.distributed.team import RankError, Said, Shares, Team

__all__ = [
    "Communicator",
    "Form",
    "MpiCommunicator",
    "NcclCommunicator",
    "Placement",
    "PlacementStrategy",
    "RankError",
    "Said",
    "Shares",
    "SingleProcess",
    "Team",
    "gather_arrays",
    "place",
    "worker_fractions",
]
