"""Chains of dense layers in a collection: a block for each layer, and products with all at once."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from kfac_xp.backend import cast
from kfac_xp.block_tridiagonal.factor import ChainFactor
from kfac_xp.block_tridiagonal.links import Coupling, Link, multiply_chain, solve_chain
from kfac_xp.descriptions import Described, facts_of_array
from kfac_xp.fisher_blocks import FisherBlock, InputOutputMultiTower
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.fully_connected import hint_at_sequences
from kfac_xp.fisher_factors import FisherFactor, facts_of_factors
from kfac_xp.layer_specs import DenseSpec
from kfac_xp.linalg import kron
from kfac_xp.operators import LinearOperator
from kfac_xp.options import FactorOptions
from kfac_xp.params import layer_params_to_mat2d, mat2d_to_layer_params
from kfac_xp.precision import exact_products
from kfac_xp.typing import Array, Params, Scalar, Split, Vectors


class FullyConnectedChainFB(InputOutputMultiTower):
    """FisherBlock for a dense layer that is one of a `Chain`.

    It checks the layer's data and knows the shapes of its vectors. Statistics are averaged and
    vectors multiplied by the chain, for all its layers together: by the estimator. Alone the block
    can do neither, and says so.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    chain
        The chain.
    d_in, d_out, has_bias
        The layer's size.
    kernel_layout
        As for `FullyConnectedKFACBasicFB`.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If the options ask for a damping that a chain does not have.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        chain: Chain,
        d_in: int,
        d_out: int,
        has_bias: bool,
        *,
        kernel_layout: str | None = None,
        name: str,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, name=name, **options)
        _require_options(self.options, chain.name)
        self.spec: DenseSpec = DenseSpec.create(kernel_layout)
        self.chain, self.d_in, self.d_out, self.has_bias = chain, d_in, d_out, has_bias

    @property
    def factors(self) -> dict[str, FisherFactor]:
        """``{"chain": ...}``: one factor for all layers of the chain."""
        return {"chain": self.chain.factor}

    def input_moments(
        self, inputs: list[Any], done: Container[FisherFactor] = ()
    ) -> dict[FisherFactor, Array]:
        """Nothing: the chain makes its moments of the data of all layers."""
        return {}

    def source_moments(
        self,
        inputs: list[Any],
        grads: Any,
        source: int = 0,
        done: Container[FisherFactor] = (),
    ) -> dict[FisherFactor, Array]:
        """Nothing: see `input_moments`."""
        return {}

    def register_matpower(self, exp: float) -> None:
        """Ask for the inverse of the chain to be computed; other powers there are none."""
        self._require_factors()
        if exp not in (1, -1):
            raise self._without(f"power {exp:g}")
        assert self._damping is not None
        self.chain.factor.register_chain(self._damping)

    def register_cholesky(self) -> None:
        """Raise NotImplementedError."""
        raise self._without("Cholesky factor")

    def register_cholesky_inverse(self) -> None:
        """Raise NotImplementedError."""
        raise self._without("Cholesky factor")

    def multiply_matpower(self, vector: Params, exp: float) -> Params:
        """Raise NotImplementedError: a chain multiplies the vectors of all its layers together."""
        raise self._without("products of one layer")

    def multiply_cholesky(self, vector: Params, transpose: bool = False) -> Params:
        """Raise NotImplementedError."""
        raise self._without("Cholesky factor")

    def multiply_cholesky_inverse(self, vector: Params, transpose: bool = False) -> Params:
        """Raise NotImplementedError."""
        raise self._without("Cholesky factor")

    def full_fisher_block(self) -> Array:
        """The layer's own block ``kron(A, G)``, dense and undamped."""
        self._require_factors()
        moments = self.chain.factor.moments[self.chain.position(self.name)]
        return kron(moments.input, moments.output)

    def as_matrix(self, vector: Params) -> Array:
        """A checked vector as a matrix [d_in (+ 1), d_out], in the dtype of the statistics."""
        self._require_vector(vector)
        return cast(layer_params_to_mat2d(self._expanded(vector)), self.chain.factor.dtype)

    def as_params(self, matrix: Array, template: Params) -> Params:
        """Inverse of `as_matrix`, in the dtype of the template."""
        expanded = self._expanded(template)
        given = layer_params_to_mat2d(expanded).dtype
        return self._contracted(mat2d_to_layer_params(expanded, cast(matrix, given)), template)

    def checked_inputs(self, inputs: list[Any]) -> list[Array]:
        """The layer's inputs of each tower."""
        return self._checked_inputs(inputs)

    def checked_grads(self, inputs: list[Any], grads: list[Any], source: int) -> list[Array]:
        """The layer's gradients of each tower, of one source."""
        return self._checked_grads(inputs, grads, source)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        self.chain.make_factor(self, self.options)

    @property
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.spec.shapes(self.d_in, self.d_out, self.has_bias)

    def _hint(self, array: Array) -> str:
        return hint_at_sequences(array)

    def _input_pattern(self) -> tuple[int | str, ...]:
        return ("N", self.d_in)

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        return (inputs.shape[0], self.d_out)

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        raise self._without("matrix of one layer")

    def _mean_eigenvalue(self) -> Array:
        raise self._without("matrix of one layer")

    def _without(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"layer {self.name!r} is one of the chain {self.chain.name!r}, which has no {what}: "
            "`multiply` and `multiply_inverse` of the estimator multiply the whole chain. Register "
            "the layer with `register_fully_connected` for more."
        )


class Chain(Described):
    """Dense layers that follow one another, whose inverse couples neighbours.

    See `BlockTridiagonalChain` for the matrix. Made by `LayerCollection.register_chain`, and asked
    by the estimator for what takes the data or the vectors of several layers.

    Parameters
    ----------
    name
        For messages, and of the saved state.
    like
        An array of the library, device and dtype of the layers.
    """

    def __init__(self, name: str, like: Array) -> None:
        self.name, self._like = name, like
        self.blocks: dict[str, FullyConnectedChainFB] = {}
        self._factor: ChainFactor | None = None

    def _facts(self) -> dict[str, str]:
        facts = {"layers": " -> ".join(self.blocks)}
        if self._factor is None:
            return facts | facts_of_array(self._like)
        return facts | facts_of_factors([self._factor])

    @property
    def factor(self) -> ChainFactor:
        """The one factor of all layers."""
        assert self._factor is not None
        return self._factor

    def make_factor(self, block: FisherBlock, options: FactorOptions) -> None:
        """Make the factor for the first of the blocks; the others use it, too."""
        if self._factor is None:
            sizes = [(b.d_in, b.d_out) for b in self.blocks.values()]
            biases = tuple(b.has_bias for b in self.blocks.values())
            name = f"{self.name}.chain"
            self._factor = ChainFactor(sizes, biases, self._like, name=name, **options.keywords())
        self._factor.users.append(f"{block.name}.chain")

    def position(self, layer: str) -> int:
        """The number of a layer in the chain."""
        return list(self.blocks).index(layer)

    def input_moments(self, inputs: Mapping[str, list[Any]]) -> dict[FisherFactor, Array]:
        """The moments of the inputs of all layers. Changes nothing."""
        sides = [block.checked_inputs(inputs[name]) for name, block in self.blocks.items()]
        towers = list(zip(*sides, strict=True))
        return {self.factor: self.factor.compute_new_cov(inputs=towers, outputs_grads=None)}

    def source_moments(
        self,
        inputs: Mapping[str, list[Any]],
        grads: Callable[[FisherBlock, str], list[Any]],
        source: int,
    ) -> dict[FisherFactor, Array]:
        """The moments of the gradients of all layers for one source. Changes nothing."""
        sides = [
            block.checked_grads(inputs[name], grads(block, name), source)
            for name, block in self.blocks.items()
        ]
        towers = list(zip(*sides, strict=True))
        return {self.factor: self.factor.compute_new_cov(inputs=None, outputs_grads=towers)}

    def multiply_matpower(self, vectors: Vectors, exp: float) -> dict[str, Params]:
        """The damped matrix (power 1) or its inverse (-1) times the vectors of all layers.

        Both as last computed: they are inverses of each other.

        Raises
        ------
        ValueError
            If the vector of a layer is missing, or has other shapes.
        NotImplementedError
            If the power is neither.
        RuntimeError
            Before the first inverse update.
        """
        if exp not in (1, -1):
            raise next(iter(self.blocks.values()))._without(f"power {exp:g}")
        self.require_all(vectors)
        matrices = [block.as_matrix(vectors[name]) for name, block in self.blocks.items()]
        links, couplings = self._links()
        with exact_products(matrices[0]):
            product = solve_chain if exp == -1 else multiply_chain
            results = product(links, couplings, matrices)
        pairs = zip(self.blocks.items(), results, strict=True)
        return {name: block.as_params(result, vectors[name]) for (name, block), result in pairs}

    def require_all(self, vectors: Vectors) -> None:
        """Raise ValueError unless all layers of the chain are among the vectors."""
        missing = [name for name in self.blocks if name not in vectors]
        if missing:
            raise ValueError(
                f"`vectors` must hold all layers of the chain {self.name!r}, "
                f"{list(self.blocks)}, or none; missing: {missing}."
            )

    def _links(self) -> tuple[list[Link], list[Coupling]]:
        damping = next(iter(self.blocks.values()))._damping
        assert damping is not None
        return self.factor.get_chain(damping)


def _require_options(options: FactorOptions, name: str) -> None:
    """Refuse what a chain does not have."""
    if options.damping_split != "pi" or options.relative_damping:
        raise ValueError(
            f"the chain {name!r} splits its damping between factors: `damping_split` must be 'pi' "
            f"and `relative_damping` False; got {options.damping_split!r} and "
            f"{options.relative_damping}. Register the layers one by one."
        )
    if options.initial != "zeros":
        raise ValueError(
            f"the chain {name!r} starts from nothing: `initial` must be 'zeros'; got "
            f"{options.initial!r}. Register the layers one by one."
        )
