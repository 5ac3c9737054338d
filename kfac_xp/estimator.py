"""The curvature of a whole model: statistics of every layer, and products block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kfac_xp.batches import as_sources, as_towers
from kfac_xp.fisher_blocks import FisherBlock, add_moments, average_in
from kfac_xp.fisher_factors import FisherFactor, refresh_factors
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.linearized_batch import LinearizedBatch
from kfac_xp.randomness import Generator, as_generator
from kfac_xp.representations import require_damping
from kfac_xp.typing import Array, Damping, Linearization, Params, Scalar, Vectors

ESTIMATION_MODES = {"gradients": "Fisher", "empirical": "Empirical_Fisher"}
"""Estimation modes and the matrix that each estimates."""


class FisherEstimator:
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
    exps
        Powers of the damped Fisher that inverse updates compute.
    seed
        Seed of the draws. An update's draws depend on the seed and on how many updates there have
        been, and on nothing else.

    Raises
    ------
    ValueError
        If the mode is unknown, a number is out of range, or the collection is not fresh.
    """

    def __init__(
        self,
        layer_collection: LayerCollection,
        damping: Damping,
        *,
        cov_ema_decay: Scalar = 0.95,
        estimation_mode: str = "gradients",
        exps: Sequence[float] = (-1,),
        seed: int = 0,
        name: str = "FisherEstimator",
    ) -> None:
        if estimation_mode not in ESTIMATION_MODES:
            raise ValueError(
                f"`estimation_mode` must be one of {tuple(ESTIMATION_MODES)}; "
                f"got {estimation_mode!r}."
            )
        require_damping("damping", damping)
        layer_collection.finalize()
        self.name = name
        self.layers = layer_collection
        self.damping = damping
        self.cov_ema_decay = cov_ema_decay
        self.estimation_mode = estimation_mode
        self.seed = seed
        self.num_cov_updates = 0
        self._blocks = layer_collection.fisher_blocks
        for block in self._blocks.values():
            block.instantiate_factors([block.tensors_to_compute_grads()], damping)
            for exp in exps:
                block.register_matpower(exp)

    @property
    def blocks(self) -> list[FisherBlock]:
        """The blocks, in order of registration."""
        return list(self._blocks.values())

    @property
    def factors(self) -> list[FisherFactor]:
        """Every factor once."""
        return self.layers.get_factors()

    @property
    def mat_type(self) -> str:
        """Which matrix the mode estimates: "Fisher" or "Empirical_Fisher"."""
        return ESTIMATION_MODES[self.estimation_mode]

    # ------------------------------------------------------------------ statistics

    def update_cov(
        self,
        statistics: Mapping[str, tuple[Any, Any]] | Linearization | Sequence[Linearization],
        targets: Any = None,
        *,
        ema_decay: Scalar | None = None,
        ema_weight: Scalar | None = None,
        generator: Generator | None = None,
    ) -> None:
        """Average one batch into the statistics of every layer.

        Parameters
        ----------
        statistics
            ``{layer name: (inputs, outputs_grads)}``, the gradients being those of the loss
            summed over cases, nested as in ``block.update_cov``; or a linearised model (a list of
            them is towers), whose ``vjp`` is then sent the cotangents of the estimation mode.
        targets
            With a model: the targets of its loss, or ``{loss name: targets}``; a list over
            towers if models are.
        ema_decay, ema_weight
            Weights of the old statistics (`cov_ema_decay` by default) and of the new.
        generator
            A seed, NumPy generator or device generator for this update's draws.

        Raises
        ------
        ValueError
            If a registered layer's data is missing or does not fit, towers differ in size, or
            layers differ in cases. Statistics are unchanged then.
        TypeError
            If arrays belong to other libraries than the layers, or a loss lacks a method.
        FloatingPointError
            If a statistic is not finite, where that can be read for free.
        """
        if isinstance(statistics, Mapping):
            inputs, sources = self._from_arrays(statistics)
            self.average_sources(inputs, sources, ema_decay=ema_decay, ema_weight=ema_weight)
            return
        batch = LinearizedBatch(self.layers, statistics, targets)
        self.average_sources(
            batch.layer_inputs(),
            self.mode_sources(batch, generator),
            ema_decay=ema_decay,
            ema_weight=ema_weight,
        )

    def mode_sources(
        self, batch: LinearizedBatch, generator: Generator | None = None
    ) -> Iterator[dict[str, list[Array]]]:
        """Gradients of the preactivations, source by source, for the estimation mode."""
        if self.estimation_mode == "empirical":
            yield batch.vjp(batch.data_cotangents(), parameters=False)[1]
            return
        if generator is None:
            generator = np.random.default_rng([self.seed, self.num_cov_updates])
        cotangents = batch.sampled_cotangents(as_generator(generator))
        yield batch.vjp(cotangents, parameters=False)[1]

    def average_sources(
        self,
        inputs: Mapping[str, list[Array]],
        sources: Iterable[Mapping[str, list[Array]]],
        *,
        ema_decay: Scalar | None = None,
        ema_weight: Scalar | None = None,
    ) -> None:
        """Average in ``{layer: inputs over towers}`` and, per source, ``{layer: gradients}``.

        Sources are consumed one at a time, and every factor takes one step of its average after
        the last.
        """
        self._require_equal_towers(inputs)
        moments: dict[FisherFactor, Array] = {}
        for name, block in self._blocks.items():
            add_moments(moments, block.input_moments(inputs[name]))
        num_sources = 0
        for s, grads in enumerate(sources):
            num_sources += 1
            for name, block in self._blocks.items():
                if name not in grads:
                    raise ValueError(
                        f"there is no gradient for the registered layer {name!r}; got gradients "
                        f"for {list(grads)}. `vjp` must return one for every registered layer."
                    )
                add_moments(moments, block.source_moments(inputs[name], grads[name], source=s))
        if num_sources == 0:
            raise ValueError("there must be at least one source of gradients; got none.")
        decay = self.cov_ema_decay if ema_decay is None else ema_decay
        average_in(moments, ema_decay=decay, ema_weight=ema_weight)
        for name, block in self._blocks.items():
            block.note_batch(inputs[name])
        self.num_cov_updates += 1

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
        refresh_factors(self.factors)

    # ------------------------------------------------------------------ products

    def multiply(self, vectors: Vectors) -> dict[str, Params]:
        """Multiply by the damped Fisher of now: ``{layer name: kernel or (kernel, bias)}``."""
        return self.multiply_matpower(1, vectors)

    def multiply_inverse(self, vectors: Vectors) -> dict[str, Params]:
        """Multiply by the inverse of the damped Fisher, as last computed."""
        return self.multiply_matpower(-1, vectors)

    def multiply_matpower(self, exp: float, vectors: Vectors) -> dict[str, Params]:
        """Multiply by a power of the damped Fisher, block by block.

        The result has the layers of `vectors` in their order.

        Raises
        ------
        KeyError
            If a layer is not registered.
        RuntimeError
            If `exp` is neither 1 nor one of the registered powers, or not computed yet.
        """
        return {name: self._block(name).multiply_matpower(v, exp) for name, v in vectors.items()}

    # ------------------------------------------------------------------ state

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """Statistics and, unless `powers` is False, the stored powers (stale as they are)."""
        return {
            "num_cov_updates": self.num_cov_updates,
            "factors": {f.name: f.state_dict(powers=powers) for f in self.factors},
            "blocks": {name: block.own_state_dict() for name, block in self._blocks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, flattened through a file or not."""
        names = {f.name for f in self.factors}
        unknown = set(state.get("factors", {})) - names
        if unknown:
            raise ValueError(
                f"the saved state has factors {sorted(unknown)} that this estimator lacks; it has "
                f"{sorted(names)}. Register the same layers with the same approximations."
            )
        for factor in self.factors:
            factor.load_state_dict(state.get("factors", {}).get(factor.name, {}))
        for name, block in self._blocks.items():
            block.load_own_state_dict(state.get("blocks", {}).get(name, {}))
        self.num_cov_updates = int(state["num_cov_updates"])

    # ------------------------------------------------------------------ helpers

    def _block(self, name: str) -> FisherBlock:
        if name not in self._blocks:
            raise KeyError(f"layer {name!r} is not registered; registered: {list(self._blocks)}.")
        return self._blocks[name]

    def _from_arrays(
        self, statistics: Mapping[str, tuple[Any, Any]]
    ) -> tuple[dict[str, list[Array]], Iterator[dict[str, list[Array]]]]:
        for name in statistics:
            self._block(name)
        missing = [name for name in self._blocks if name not in statistics]
        if missing:
            raise ValueError(
                f"`statistics` has no data for the registered layers {missing}; it has "
                f"{list(statistics)}. Pass (inputs, outputs_grads) for every registered layer."
            )
        for name, pair in statistics.items():
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(
                    f"`statistics[{name!r}]` must be a pair (inputs, outputs_grads); "
                    f"got {type(pair).__name__}."
                )
        inputs = {name: as_towers(f"{name}: inputs", x) for name, (x, _) in statistics.items()}
        streams = {n: as_sources(f"{n}: outputs_grads", g) for n, (_, g) in statistics.items()}
        return inputs, _zipped(streams)

    def _require_equal_towers(self, inputs: Mapping[str, list[Array]]) -> None:
        sizes = {name: [x.shape[0] for x in inputs[name]] for name in self._blocks}
        first_name, first = next(iter(sizes.items()))
        for name, here in sizes.items():
            if here != first:
                raise ValueError(
                    f"layers must have been given the same cases: the inputs of {first_name!r} "
                    f"have {first} cases by tower, those of {name!r} have {here}."
                )
        if len(set(first)) > 1 and self.layers.options.tower_strategy == "separate":
            raise ValueError(
                f"towers must have the same number of cases; got {first}. Use towers of one size, "
                "or LayerCollection(tower_strategy='concat')."
            )


def _zipped(
    streams: Mapping[str, Iterator[list[Array]]],
) -> Iterator[dict[str, list[Array]]]:
    """Sources of all layers side by side; every layer must have as many."""
    end = object()
    while True:
        row = {name: next(stream, end) for name, stream in streams.items()}
        ended = [name for name, value in row.items() if value is end]
        if len(ended) == len(row):
            return
        if ended:
            raise ValueError(
                f"every layer must have as many sources of gradients; {ended} have fewer than "
                f"{[name for name in row if name not in ended]}."
            )
        yield {name: value for name, value in row.items() if isinstance(value, list)}
