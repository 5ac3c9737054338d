"""State as nested dicts: flattened, written to files, and read back with every entry checked."""

from kfac_xp.state.errors import StateError
from kfac_xp.state.files import load_state, save_state
from kfac_xp.state.nested import flatten_state, to_numpy, unflatten_state
from kfac_xp.state.saved import Saveable, Saved

__all__ = [
    "Saveable",
    "Saved",
    "StateError",
    "flatten_state",
    "load_state",
    "save_state",
    "to_numpy",
    "unflatten_state",
]
