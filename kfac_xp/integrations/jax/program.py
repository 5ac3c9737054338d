"""What a JAX function computes, as one list of equations that can be looked at and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfac_xp.typing import Array

# Calls whose equations are taken for their own. Functions with derivatives of their own are not
# among them: they are run as they are, and parameters that they use are used otherwise than by
# layers.
_INLINED = frozenset(("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"))


@dataclass(frozen=True)
class Known:
    """A value that does not depend on the inputs."""

    value: Any


@dataclass(frozen=True)
class Step:
    """One equation: numbers of the values that it takes (or `Known` ones) and makes."""

    equation: Any
    inputs: tuple[int | Known, ...]
    outputs: tuple[int, ...]

    @property
    def operation(self) -> str:
        """Name of the primitive."""
        return self.equation.primitive.name

    @property
    def arguments(self) -> dict[str, Any]:
        """Parameters of the primitive."""
        return self.equation.params

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the values that it takes."""
        return [tuple(v.aval.shape) for v in self.equation.invars]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first value that it makes."""
        return tuple(self.equation.outvars[0].aval.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the first value that it makes."""
        return self.equation.outvars[0].aval.dtype


@dataclass(frozen=True)
class Program:
    """A function of flat arguments: values are numbered, the arguments first.

    Parameters
    ----------
    num_inputs
        How many arguments there are.
    steps
        The equations in order.
    outputs
        Numbers of the results, or `Known` ones.
    """

    num_inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int | Known, ...]

    @classmethod
    def create(cls, closed: Any) -> Program:
        """Of a closed jaxpr, with inner calls inlined."""
        builder = _Builder()
        inputs = [builder.new() for _ in closed.jaxpr.invars]
        outputs = builder.add(closed.jaxpr, closed.consts, inputs)
        return cls(len(inputs), tuple(builder.steps), tuple(outputs))

    def run(
        self, arguments: Sequence[Array], taps: Mapping[int, Array], read: Mapping[int, int]
    ) -> tuple[list[Array], dict[int, Array]]:
        """The results, and some values on the way.

        Parameters
        ----------
        arguments
            The arguments.
        taps
            ``{step: what is added to the value that it makes}``.
        read
            ``{step: which of the values that it takes is returned}``.
        """
        values: dict[int, Any] = dict(enumerate(arguments))
        found = {}

        def value(x: int | Known) -> Any:
            return x.value if isinstance(x, Known) else values[x]

        for i, step in enumerate(self.steps):
            taken = [value(x) for x in step.inputs]
            if i in read:
                found[i] = taken[read[i]]
            primitive = step.equation.primitive
            given = primitive.get_bind_params(step.arguments)
            # Before JAX 0.10 the functions that calls take stand beside their parameters.
            functions, parameters = given if isinstance(given, tuple) else ((), given)
            with step.equation.ctx.manager:
                made = primitive.bind(*functions, *taken, **parameters)
            made = made if primitive.multiple_results else [made]
            if i in taps:
                made = [made[0] + taps[i], *made[1:]]
            values.update(zip(step.outputs, made, strict=True))
        return [value(x) for x in self.outputs], found


class _Builder:
    """Numbers the values of nested jaxprs anew, each time they are called."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._count = 0

    def new(self) -> int:
        self._count += 1
        return self._count - 1

    def add(
        self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[int | Known]
    ) -> list[int | Known]:
        """Append the equations of a jaxpr; return its results."""
        names: dict[Any, int | Known] = dict(zip(jaxpr.invars, arguments, strict=True))
        names.update(zip(jaxpr.constvars, map(Known, consts), strict=True))

        def number(atom: Any) -> int | Known:
            return Known(atom.val) if hasattr(atom, "val") else names[atom]

        for equation in jaxpr.eqns:
            inputs = tuple(map(number, equation.invars))
            inner = _inner(equation)
            if inner is None:
                outputs = tuple(self.new() for _ in equation.outvars)
                self.steps.append(Step(equation, inputs, outputs))
                results: Sequence[int | Known] = outputs
            else:
                results = self.add(*inner, inputs)
            names.update(zip(equation.outvars, results, strict=True))
        return [number(atom) for atom in jaxpr.outvars]


def _inner(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr, and its constants, of a call that is inlined."""
    if equation.primitive.name not in _INLINED:
        return None
    for key in ("jaxpr", "call_jaxpr"):
        inner = equation.params.get(key)
        if inner is not None:
            return (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
    return None
