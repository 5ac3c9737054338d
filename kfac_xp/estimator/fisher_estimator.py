"""The estimator: averages one batch after another, and multiplies by powers of the result."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kfac_xp.averages import NonFiniteStatisticsError
from kfac_xp.backend import is_readable, library_of
from kfac_xp.changes import Change, attributes, make
from kfac_xp.descriptions import place_of
from kfac_xp.distributed import Communicator, Placement, PlacementStrategy, Team
from kfac_xp.estimator.data_sets import DataSetEstimator
from kfac_xp.estimator.modes import ESTIMATION_MODES
from kfac_xp.estimator.shared_work import SharedWork
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.randomness import Generator
from kfac_xp.representations import require_damping
from kfac_xp.state import Saveable, Saved
from kfac_xp.timings import Clock, Timings, Untimed
from kfac_xp.typing import Damping, Linearization, Params, Scalar

logger = logging.getLogger("kfac_xp.estimator")


class FisherEstimator(Saveable, DataSetEstimator):
    """Statistics of the layers of a collection and products with the approximate Fisher.

    Parameters
    ----------
    layer_collection
        The layers and losses. An estimator takes it over; no more can be registered.
    damping
        Added to the Fisher: a number, a 0-d array, or a function without arguments that returns
        one, read at every inverse update.
    cov_ema_decay
        Weight of the old statistics in each update.
    estimation_mode
        ``"gradients"``: the Fisher, from targets drawn from the model; unbiased.
        ``"empirical"``: the empirical Fisher, from the data's targets.
        ``"curvature_prop"``: the Fisher, from random signs sent through a factor of each loss's
        Fisher; unbiased. ``"exact"``: the Fisher without draws, one backward pass per output
        coordinate. ``"curvature_prop_GGN"`` and ``"exact_GGN"`` estimate the generalised
        Gauss-Newton matrix instead; the same for losses of natural parameters.
    num_samples
        Draws per case in the mode ``"gradients"``, each with a backward pass of its own.
    exps
        Powers of the damped Fisher that inverse updates compute.
    compute_cholesky, compute_cholesky_inverse
        Whether inverse updates compute the Cholesky factor of the damped Fisher, and its inverse.
    compute_params_stats
        Whether updates keep `params_stats`.
    seed
        Seed of the draws. An update's draws depend on the seed and on how many updates there have
        been, and on nothing else.
    communicator
        What connects this process with others that have other cases of each batch, such as
        `MpiCommunicator`; None for a process on its own. All ranks must make the same calls. A
        batch is then the cases of all ranks, in their order, and every rank's statistics are those
        of the whole batch.
    grad_worker_fraction
        Part of the ranks that keep the powers of each layer and multiply by them: 1 for speed,
        ``1 / number of ranks`` for memory. See `kfac_xp.distributed.place`.
    placement_strategy
        Which rank computes which powers: ``"greedy"`` by what they cost, or ``"round_robin"``.
    timings
        Whether to measure how long statistics, inverses and products take: see `timings`.

    Raises
    ------
    ValueError
        If the mode is unknown, a number is out of range, or the collection is not fresh.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, section 5; Martens, Sutskever and Swersky (2012),
    arXiv:1206.6464, for curvature propagation.
    """

    def __init__(
        self,
        layer_collection: LayerCollection,
        damping: Damping,
        *,
        cov_ema_decay: Scalar = 0.95,
        estimation_mode: str = "gradients",
        num_samples: int = 1,
        exps: Sequence[float] = (-1,),
        compute_cholesky: bool = False,
        compute_cholesky_inverse: bool = False,
        compute_params_stats: bool = False,
        seed: int = 0,
        communicator: Communicator | None = None,
        grad_worker_fraction: float = 1.0,
        placement_strategy: PlacementStrategy = "greedy",
        timings: bool = False,
        name: str = "FisherEstimator",
    ) -> None:
        if estimation_mode not in ESTIMATION_MODES:
            raise ValueError(
                f"`estimation_mode` must be one of {tuple(ESTIMATION_MODES)}; "
                f"got {estimation_mode!r}."
            )
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"`num_samples` must be a positive int; got {num_samples!r}.")
        if num_samples > 1 and estimation_mode != "gradients":
            raise ValueError(
                f"`num_samples` belongs to the estimation mode 'gradients'; got {num_samples} with "
                f"{estimation_mode!r}, which draws no targets."
            )
        require_damping("damping", damping)
        team, names = Team(communicator), layer_collection.fisher_blocks
        work = SharedWork(team, names, grad_worker_fraction, placement_strategy)
        layer_collection.finalize()
        self.name = name
        self.layers = layer_collection
        self.damping = damping
        self.cov_ema_decay = cov_ema_decay
        self.estimation_mode = estimation_mode
        self.num_samples = num_samples
        self.compute_cholesky = compute_cholesky
        self.compute_cholesky_inverse = compute_cholesky_inverse
        self.compute_params_stats = compute_params_stats
        self.seed = seed
        self.num_cov_updates = 0
        self._are_equal = False
        self._params_stats: dict[str, Params] | None = None
        self.team, self._work = team, work
        self._clock: Clock = Timings() if timings else Untimed()
        self._blocks = layer_collection.fisher_blocks
        for block in self._blocks.values():
            block.instantiate_factors([block.tensors_to_compute_grads()], damping)
            for exp in exps:
                block.register_matpower(exp)
            if compute_cholesky:
                block.register_cholesky()
            if compute_cholesky_inverse:
                block.register_cholesky_inverse()
        like = self.factors[0].like
        if isinstance(self._clock, Timings):
            self._clock.of_launching = not is_readable(like) or library_of(like) == "jax"
        if logger.isEnabledFor(logging.INFO):
            ranks = team.communicator.describe()
            logger.info("%s of %s, %s; %s", name, ", ".join(names), place_of(like), ranks)
        added_up = [n for n, block in self._blocks.items() if block.needs_params_grads]
        if added_up and estimation_mode in ("empirical", "exact", "exact_GGN"):
            logger.warning(
                "estimation mode %r is not for generic parameters (%s): the gradients of all cases "
                "are added up before they are squared, and the result is up to as many times too "
                "large as there are cases. Use 'gradients' or 'curvature_prop'.",
                estimation_mode,
                ", ".join(added_up),
            )

    @property
    def mat_type(self) -> str:
        """Which matrix the mode estimates: "Fisher", "Empirical_Fisher" or "GGN"."""
        return ESTIMATION_MODES[self.estimation_mode]

    @property
    def placement(self) -> Placement:
        """Which rank computes which powers, and which ranks keep them. ``print`` shows tables.

        With several ranks, asking before the first inverse update is collective.
        """
        return self._work.placement

    @property
    def params_stats(self) -> dict[str, Params]:
        """Parameter gradients of the last update: summed over sources, per case of the batch.

        Raises
        ------
        RuntimeError
            Without ``compute_params_stats=True``, or before the first update.
        """
        if self._params_stats is None:
            raise RuntimeError(
                "there are no `params_stats`. Pass `compute_params_stats=True` to the constructor, "
                "then call `update_cov` with a model."
            )
        return dict(self._params_stats)

    # ------------------------------------------------------------------ statistics

    def update_cov(
        self,
        statistics: Mapping[str, tuple[Any, Any]] | Linearization | Sequence[Linearization],
        targets: Any = None,
        *,
        ema_decay: Scalar | None = None,
        ema_weight: Scalar | None = None,
        generator: Generator | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Average one batch into the statistics of every layer.

        As training does it, batch by batch. For the matrix of a data set see `estimate`.

        Parameters
        ----------
        statistics
            ``{layer name: (inputs, outputs_grads)}``, the gradients being those of the loss
            summed over cases, nested as in ``block.update_cov`` (for generic parameters
            ``(batch_size, params_grads)``); or a linearised model (a list of them is towers),
            whose ``vjp`` is then sent the cotangents of the estimation mode.
        targets
            With a model: the targets of its loss, or ``{loss name: targets}``; a list over
            towers if models are.
        ema_decay, ema_weight
            Weights of the old statistics (`cov_ema_decay` by default) and of the new.
        generator
            A seed, NumPy generator or device generator for this update's draws.
        batch_size
            What `params_stats` are divided by; the number of cases unless given.

        Raises
        ------
        ValueError
            If a registered layer's data is missing or does not fit, towers differ in size, or
            layers differ in cases. Statistics are unchanged then.
        TypeError
            If arrays belong to other libraries than the layers, or a loss lacks a method.
        NotImplementedError
            If a loss has no GGN and the mode asks for it.
        FloatingPointError
            If a statistic is not finite, where that can be read for free.
        RankError
            If another rank has raised. Statistics are unchanged on all ranks.
        """
        self._average_batch(
            statistics,
            targets,
            lambda cases: (ema_decay, ema_weight),
            generator=generator,
            batch_size=batch_size,
        )

    def update_inverses(self) -> None:
        """Recompute every registered power, with one look at the device for all factors.

        Raises
        ------
        RuntimeError
            Before the first covariance update, or if a damped covariance can be inverted in no
            way and there is no earlier inverse to keep.
        FloatingPointError
            If statistics on a device were not finite since the last call, naming the factors.
        """
        rollback = self.rollback()
        try:
            with self._clock.stage("inverses"):
                self._work.update_inverses()
        except BaseException as error:
            rollback.undo()
            if isinstance(error, NonFiniteStatisticsError):
                error.forget()
            raise

    # ------------------------------------------------------------------ state

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """Everything that continuing needs: seed, counter, statistics and powers.

        The powers are stale as they are; with `powers` False they are left out, and continuing
        begins with `update_inverses`. `params_stats` are those of the last update, and not kept.

        With several ranks, all must ask, and all get the same: what any number of ranks, or a
        process on its own, can continue from.
        """
        layers = self.layers.state_dict(powers=powers)
        for factor, state in (self._work.powers_of_all() if powers else {}).items():
            own = layers["factors"][factor.name]
            own["powers"] = own.get("powers", {}) | state
        return {
            "estimation_mode": self.estimation_mode,
            "seed": self.seed,
            "num_cov_updates": self.num_cov_updates,
            "layers": layers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, flattened through a file or not. The seed is taken over.

        Raises
        ------
        StateError
            If it is the state of other layers, approximations or another mode, naming the key.
            Nothing is changed.
        """
        make(self.changes_to(Saved(state)))
        self.forget_foreign()

    def forget_foreign(self) -> None:
        """After loading, on several ranks: let go of the powers that other ranks keep."""
        self._work.forget_foreign()

    def changes_to(self, saved: Saved) -> list[Change]:
        """The changes by which the estimator continues from a saved state, which is checked."""
        saved.require(("estimation_mode", "seed", "num_cov_updates", "layers"))
        way_out = "Use that mode, or load the part 'layers' into `layers` alone."
        saved.require_word("estimation_mode", self.estimation_mode, way_out)
        own = attributes(
            self,
            seed=saved.count("seed"),
            num_cov_updates=saved.count("num_cov_updates"),
            _params_stats=None,
        )
        return [*self.layers.changes_to(saved.part("layers")), own]
