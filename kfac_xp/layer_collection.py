"""Which layers and losses a model has, by name, and how each layer's Fisher is approximated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kfac_xp.backend import array_namespace, device_of, require_one_place
from kfac_xp.batches import Placeholder
from kfac_xp.fisher_blocks import (
    ConvDiagonalFB,
    ConvKFCBasicFB,
    FisherBlock,
    FullyConnectedDiagonalFB,
    FullyConnectedKFACBasicFB,
    blocks_factors,
)
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.geometry import Padding
from kfac_xp.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    LossFunction,
    MultiBernoulliNegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
)
from kfac_xp.options import FactorOptions
from kfac_xp.params import param_shapes
from kfac_xp.typing import Array, Params

APPROXIMATIONS = ("kron", "diagonal")
"""Names of the approximations of a layer's block; the first is the default."""

LossFactory = Callable[[Any, Any], LossFunction]


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss of the model: made anew for each batch by ``make(outputs, targets)``."""

    name: str
    make: LossFactory
    coeff: float


class LayerCollection:
    """The layers and losses of a model.

    Layers are registered by the names under which their parameters, inputs and gradients will be
    passed later; losses by the names of the model's outputs.

    Parameters
    ----------
    **options
        Fields of `FactorOptions` for every block.
    """

    def __init__(self, **options: Any) -> None:
        self.options = FactorOptions().changed(**options)
        self._blocks: dict[str, FisherBlock] = {}
        self._losses: dict[str, RegisteredLoss] = {}
        self._factors: dict[Any, tuple[FisherFactor, Any]] = {}
        self._finalized = False

    # ------------------------------------------------------------------ layers

    def register_fully_connected(
        self, name: str, params: Params, approx: str | None = None
    ) -> FisherBlock:
        """Register a dense layer.

        Parameters
        ----------
        name
            Name of the layer.
        params
            Kernel [d_in, d_out], or a pair (kernel, bias [d_out]). Shapes, dtype, library and
            device are read, values are not.
        approx
            ``"kron"`` (the default) or ``"diagonal"``.

        Raises
        ------
        ValueError
            If the name is taken, the approximation unknown, or a shape impossible.
        """
        kernel, has_bias = self._checked_layer(name, params, 2, "[d_in, d_out]")
        cls: Any = self._approximation(
            approx, kron=FullyConnectedKFACBasicFB, diagonal=FullyConnectedDiagonalFB
        )
        return self._add(name, cls(self, has_bias, name=name), kernel, (None,))

    def register_conv1d(
        self,
        name: str,
        params: Params,
        strides: Sequence[int] | None = None,
        padding: Padding = "SAME",
        dilations: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
    ) -> FisherBlock:
        """Register a convolution over one axis: kernel [k, C_in, C_out]. See `register_conv2d`."""
        return self._add_convolution(
            name, params, 1, strides, padding, dilations, data_format, approx
        )

    def register_conv2d(
        self,
        name: str,
        params: Params,
        strides: Sequence[int] | None = None,
        padding: Padding = "SAME",
        dilations: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
    ) -> FisherBlock:
        """Register a convolution over two axes.

        Parameters
        ----------
        name
            Name of the layer.
        params
            Kernel [kh, kw, C_in, C_out], or a pair (kernel, bias [C_out]). Shapes, dtype, library
            and device are read, values are not.
        strides, dilations
            One int per spatial axis, or with the batch and channel axes; None means ones.
        padding
            ``"SAME"``, ``"VALID"``, or a pair (before, after) per spatial axis.
        data_format
            None or a name that ends in "C": channels are last.
        approx
            ``"kron"`` (the default) or ``"diagonal"``.

        Raises
        ------
        ValueError
            If the name is taken, the approximation unknown, a shape or the geometry impossible.
        """
        return self._add_convolution(
            name, params, 2, strides, padding, dilations, data_format, approx
        )

    def register_convolution(
        self,
        name: str,
        params: Params,
        padding: Padding = "SAME",
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
    ) -> FisherBlock:
        """Register a convolution over any number of axes. See `register_conv2d`."""
        num_axes = max(1, len(param_shapes(params)[0]) - 2)
        return self._add_convolution(
            name, params, num_axes, strides, padding, dilation_rate, data_format, approx
        )

    # ------------------------------------------------------------------ losses

    def register_categorical_predictive_distribution(self, name: str, coeff: float = 1.0) -> None:
        """The output `name` is logits [N, K] of a class: softmax cross-entropy.

        `coeff` multiplies the loss. Targets are integers [N].
        """
        self.register_loss(name, CategoricalLogitsNegativeLogProbLoss, coeff)

    register_softmax_cross_entropy_loss = register_categorical_predictive_distribution

    def register_normal_predictive_distribution(
        self, name: str, var: float = 0.5, coeff: float = 1.0
    ) -> None:
        """The output `name` is the mean of a normal distribution with variance `var`."""
        if not var > 0:
            raise ValueError(f"`var` must be a positive number; got {var!r}.")
        self.register_loss(
            name, lambda mean, targets: NormalMeanNegativeLogProbLoss(mean, var, targets), coeff
        )

    def register_squared_error_loss(self, name: str, coeff: float = 1.0) -> None:
        """The loss is the squared error of the output `name` (plus a constant)."""
        self.register_normal_predictive_distribution(name, 0.5, coeff)

    def register_multi_bernoulli_predictive_distribution(
        self, name: str, coeff: float = 1.0
    ) -> None:
        """The output `name` is logits of independent bits: sigmoid cross-entropy.

        Targets have the shape of the logits, with entries in [0, 1].
        """
        self.register_loss(name, MultiBernoulliNegativeLogProbLoss, coeff)

    register_sigmoid_cross_entropy_loss = register_multi_bernoulli_predictive_distribution

    def register_loss(self, name: str, make: LossFactory, coeff: float = 1.0) -> None:
        """Register a loss of any kind.

        Parameters
        ----------
        name
            Name of the output of the model that the loss is a function of.
        make
            ``make(outputs, targets)`` returns the loss of one batch: see `kfac_xp.loss_functions`
            for the methods that it needs.
        coeff
            Positive factor of the loss.

        Raises
        ------
        ValueError
            If the name is taken or the coefficient is not positive.
        """
        self._require_open()
        if name in self._losses:
            raise ValueError(
                f"a loss named {name!r} is already registered; names must be unique. "
                f"Registered: {list(self._losses)}."
            )
        if not coeff > 0:
            raise ValueError(f"`coeff` must be a positive number; got {coeff!r}.")
        self._losses[name] = RegisteredLoss(name, make, float(coeff))

    # ------------------------------------------------------------------ what is registered

    @property
    def fisher_blocks(self) -> dict[str, FisherBlock]:
        """The blocks by name, in order of registration."""
        return dict(self._blocks)

    @property
    def losses(self) -> dict[str, RegisteredLoss]:
        """The losses by name."""
        return dict(self._losses)

    @property
    def registered_variables(self) -> list[str]:
        """Names of the registered layers."""
        return list(self._blocks)

    def get_blocks(self) -> list[FisherBlock]:
        """The blocks, in order of registration."""
        return list(self._blocks.values())

    def get_factors(self) -> list[FisherFactor]:
        """Every factor once."""
        return blocks_factors(self._blocks.values())

    def make_or_get_factor(
        self, cls: type[FisherFactor], args: tuple[Any, ...], **keywords: Any
    ) -> FisherFactor:
        """The factor of this class and arguments: made the first time, shared from then on.

        Arrays count as equal if they are the same object.

        Raises
        ------
        TypeError
            If an argument can be compared neither so nor by its hash.
        """
        options = {k: v for k, v in keywords.items() if k != "name"}
        key = (cls, _key(args), _key(options))
        hash(key)
        if key not in self._factors:
            # The arguments are kept, so that the identity of an array stays its own.
            self._factors[key] = (cls(*args, **keywords), args)
        return self._factors[key][0]

    def finalize(self) -> None:
        """Close the collection: an estimator has taken it.

        Raises
        ------
        ValueError
            If it was closed before, or holds no layer.
        """
        self._require_open()
        if not self._blocks:
            raise ValueError("the collection has no layers. Register them first.")
        self._finalized = True

    # ------------------------------------------------------------------ helpers

    def _add_convolution(
        self,
        name: str,
        params: Params,
        num_axes: int,
        strides: Sequence[int] | None,
        padding: Padding,
        dilations: Sequence[int] | None,
        data_format: str | None,
        approx: str | None,
    ) -> FisherBlock:
        form = f"[{', '.join(f'k_{i}' for i in range(num_axes))}, C_in, C_out]"
        kernel, _ = self._checked_layer(name, params, num_axes + 2, form)
        block: FisherBlock
        if self._approximation(approx, kron=True, diagonal=False):
            block = ConvKFCBasicFB(
                self, params, padding, strides, dilations, data_format, name=name
            )
        else:
            block = ConvDiagonalFB(
                self, params, strides, padding, data_format, dilations, name=name
            )
        return self._add(name, block, kernel, (None,) * (1 + num_axes))

    def _add(
        self, name: str, block: FisherBlock, kernel: Array, leading: tuple[None, ...]
    ) -> FisherBlock:
        """Give the block a placeholder for its data and enter it."""
        xp = array_namespace(kernel)
        like = xp.empty((0,), dtype=kernel.dtype, device=device_of(kernel))
        d_in, d_out = kernel.shape[-2:]
        block.register_additional_tower(
            Placeholder((*leading, d_in), like), Placeholder((*leading, d_out), like)
        )
        self._blocks[name] = block
        return block

    def _checked_layer(self, name: str, params: Params, ndim: int, form: str) -> tuple[Array, bool]:
        self._require_open()
        if name in self._blocks:
            raise ValueError(
                f"a layer named {name!r} is already registered; names must be unique. "
                f"Registered: {list(self._blocks)}."
            )
        arrays = params if isinstance(params, (tuple, list)) else (params,)
        require_one_place(**{f"params[{i}]": a for i, a in enumerate(arrays)})
        shapes = param_shapes(params)
        if len(shapes) > 2 or len(shapes[0]) != ndim or shapes[1:] not in ((), (shapes[0][-1:],)):
            raise ValueError(
                f"`params` of layer {name!r} must be a kernel {form} or a pair of it and a bias "
                f"over its last axis; got shapes {', '.join(map(str, shapes))}."
            )
        return arrays[0], len(shapes) == 2

    def _approximation(self, approx: str | None, **choices: Any) -> Any:
        approx = APPROXIMATIONS[0] if approx is None else approx
        if approx not in choices:
            raise ValueError(f"`approx` must be one of {tuple(choices)}; got {approx!r}.")
        return choices[approx]

    def _require_open(self) -> None:
        if self._finalized:
            raise ValueError(
                "this collection already belongs to an estimator and takes no more layers or "
                "losses. Register everything before making the estimator or optimizer, and make "
                "one collection for each."
            )


def _key(value: Any) -> Any:
    """A hashable stand-in for an argument; arrays and placeholders by identity."""
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    if isinstance(value, Placeholder) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        return ("by identity", id(value))
    return value
