"""What an optimizer saves, and how it continues from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

from kfac_xp.changes import Change, attributes, make
from kfac_xp.linearized_batch import require_layers
from kfac_xp.optimizer.info import LossFn, OptimizerState
from kfac_xp.optimizer.stages import StepStages
from kfac_xp.state import Saveable, Saved, StateError, save_state
from kfac_xp.typing import Vectors


class ResumableSteps(Saveable, StepStages):
    """Steps whose state can be saved, and loaded by another optimizer of the same settings."""

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """Everything that continuing bit for bit needs.

        Counters, velocity, the adapted damping and what adapts it, seed, statistics, and powers
        (stale as they are; with `powers` False they are left out, and the next step that needs
        them must be one that updates inverses). Settings such as rates and periods are not part
        of it.

        With `update_damping_immediately` False the state may wait for the loss of the last batch,
        a function, which cannot be saved: `load_state_dict` asks for it. Call
        `maybe_pre_update_adapt_damping` with the parameters of now before, and the state waits for
        nothing and goes on just the same.

        With several ranks, all must ask, and all get the same: one of them saves it, and any
        number of ranks can continue from it.
        """
        settings = {"momentum_type": self.momentum_type, "adapt_damping": self.adapt_damping}
        own = self._state.state_dict()
        return settings | own | {"estimator": self.estimator.state_dict(powers=powers)}

    def save(self, path: str | PathLike[str], *, powers: bool = True) -> None:
        """``save_state(path, self.state_dict(powers=powers))``: the file is whole or not there.

        With several ranks, all must ask, and the first one writes.
        """
        state = self.state_dict(powers=powers)
        if self.estimator.team.rank == 0:
            save_state(path, state)

    def load(
        self,
        path: str | PathLike[str],
        params: Vectors,
        *,
        loss_fn: LossFn | None = None,
        batch_size: int = 1,
    ) -> None:
        """``load_state_dict(load_state(path), params, ...)``.

        Raises
        ------
        StateError
            If the file is damaged, or its state does not fit, naming the file and the key.
            Nothing is changed.
        """
        super().load(path, params, loss_fn=loss_fn, batch_size=batch_size)

    def load_state_dict(  # type: ignore[override]
        self,
        state: Mapping[str, Any],
        params: Vectors,
        *,
        loss_fn: LossFn | None = None,
        batch_size: int = 1,
    ) -> None:
        """Continue from `state_dict`, flattened through a file or not. The seed is taken over.

        Parameters
        ----------
        state
            What `state_dict` returned, or `load_state`.
        params
            The parameters to go on from, for the form of the velocity.
        loss_fn
            That of the last step before saving: needed if the state has ``"pending"``, and waits
            to adapt the damping to the effect of that step. Of several ranks each gives that of
            its own cases.
        batch_size
            The number of these, needed if it is not the same on all ranks.

        Raises
        ------
        StateError
            If it is the state of other layers, approximations or settings, naming the key, or
            waits for a `loss_fn` that is not given. Nothing is changed.
        """
        require_layers("params", params, self.layers)
        with self.estimator.team.agreement() as said:
            said.say(batch_size)
            read, changes = self._read(Saved(state), params, loss_fn)
        if read.pending is not None:
            weight = said.shares().weight
            read = replace(read, pending=replace(read.pending, weight=weight))
        make([*changes, attributes(self, _state=read)])
        self.estimator.forget_foreign()

    def _read(
        self, saved: Saved, params: Vectors, loss_fn: LossFn | None
    ) -> tuple[OptimizerState, list[Change]]:
        """What a saved state, which is checked, makes of the optimizer, and of its estimator."""
        way_out = (
            "Make the optimizer with the settings of then, or load the part 'estimator' into "
            "`optimizer.estimator` alone."
        )
        saved.require_word("momentum_type", self.momentum_type, way_out)
        if saved.flag("adapt_damping") is not self.adapt_damping:
            raise StateError(
                f"the saved {saved.key('adapt_damping')!r} is {not self.adapt_damping}, and here "
                f"it is {self.adapt_damping}. {way_out}"
            )
        read = OptimizerState.from_saved(saved, params, loss_fn)
        return read, self.estimator.changes_to(saved.part("estimator"))
