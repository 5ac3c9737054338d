"""Chains of dense layers in a collection."""

from __future__ import annotations

from kfac_xp.backend import require_one_place
from kfac_xp.block_tridiagonal import Chain, FullyConnectedChainFB
from kfac_xp.layer_collection.layers import LayerRegistry, dense_sizes
from kfac_xp.params import as_arrays
from kfac_xp.typing import Vectors


class ChainRegistry(LayerRegistry):
    """Registers chains: a block for each layer, and one factor for all."""

    def __init__(self) -> None:
        super().__init__()
        self._chains: dict[str, Chain] = {}

    @property
    def chains(self) -> dict[str, Chain]:
        """The chains by name, in order of registration."""
        return dict(self._chains)

    def register_chain(
        self, name: str, params: Vectors, *, kernel_layout: str | None = None
    ) -> Chain:
        """Register dense layers whose inverse is block-tridiagonal: each with its neighbours.

        See `BlockTridiagonalChain` for the matrix. The estimator's `multiply_inverse` then takes
        the vectors of all layers of a chain together; of powers there are 1 and -1, no Cholesky
        factors, and no `matrix`. Statistics and the optimizer go on as ever.

        Parameters
        ----------
        name
            Name of the chain, for messages and saved states.
        params
            ``{layer name: kernel [d_in, d_out] or (kernel, bias [d_out])}`` of at least two layers,
            in the order in which they are applied, each once for each case. Shapes, dtype,
            library and device are read, values are not.
        kernel_layout
            As for `register_fully_connected`, of all layers.

        Raises
        ------
        ValueError
            If a name is taken, there are less than two layers, one is not dense, a parameter is
            registered already, or the collection's options ask for a damping that chains lack
            (``damping_split="exact"``, ``relative_damping``) or for ``initial="identity"``.
            Nothing is registered then.
        TypeError
            If layers belong to several libraries.
        """
        if name in self._chains:
            raise ValueError(
                f"a chain named {name!r} is already registered; names must be unique. Registered: "
                f"{list(self._chains)}."
            )
        if len(params) < 2:
            raise ValueError(
                f"`params` of the chain {name!r} must hold at least two layers; got "
                f"{list(params)}. Register a layer of its own with `register_fully_connected`."
            )
        arrays = [a for layer in params.values() for a in as_arrays(layer)]
        require_one_place(**{f"params[{i}]": a for i, a in enumerate(arrays)})
        if len({id(a) for a in arrays}) < len(arrays):
            raise ValueError(
                f"a parameter of the chain {name!r} is that of two of its layers: a layer that is "
                "used several times is no chain. See `register_fully_connected_multi`."
            )
        chain, sizes = Chain(name, arrays[0]), {}
        for layer, layer_params in params.items():
            self._check_name(layer, layer_params, False)
            sizes[layer] = dense_sizes(layer, layer_params, kernel_layout)
        for layer, (d_in, d_out) in sizes.items():
            has_bias = len(as_arrays(params[layer])) == 2
            chain.blocks[layer] = FullyConnectedChainFB(
                self,  # type: ignore[arg-type]  # the collection makes factors, too
                chain,
                d_in,
                d_out,
                has_bias,
                kernel_layout=kernel_layout,
                name=layer,
            )
        order = " -> ".join(sizes)
        for layer, block in chain.blocks.items():
            kernel = as_arrays(params[layer])[0]
            data = [self._placeholder((None, size), kernel) for size in sizes[layer]]
            self._enter(block, "chain", layer, params[layer], data[0], data[1], 1, False)
            self._layers[layer].neighbours = f", in the chain {name!r}: {order}"
        self._chains[name] = chain
        return chain
