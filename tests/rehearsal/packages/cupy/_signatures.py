"""What the real CuPy takes, from ``_signatures.txt``: calls are bound to it first of all."""

import ast
import functools
import inspect
import re
from pathlib import Path

_LINES = Path(__file__).with_name("_signatures.txt").read_text().splitlines()

used = set()
"""``(owner, name)`` of everything that was called."""


@functools.cache
def names(owner):
    """``{name: signature, (number of inputs, of outputs) of a ufunc, or None of an attribute}``."""
    found, inside = {}, False
    for line in _LINES:
        if line.startswith("["):
            inside = line == f"[{owner}]"
        elif inside and line and not line.startswith("#"):
            name = re.match(r"\w+", line)[0]
            found[name] = _parsed(line[len(name) :])
    return found


def _parsed(rest):
    if rest.startswith(" ufunc"):
        return tuple(map(int, rest.split()[1:]))
    if not rest:
        return None
    arguments = ast.parse(f"def f{rest}: pass").body[0].args
    kinds, p = [], inspect.Parameter
    both = [*arguments.posonlyargs, *arguments.args]
    defaults = [p.empty] * (len(both) - len(arguments.defaults))
    defaults += [ast.literal_eval(d) for d in arguments.defaults]
    for i, (argument, default) in enumerate(zip(both, defaults, strict=True)):
        only = i < len(arguments.posonlyargs)
        kind = p.POSITIONAL_ONLY if only else p.POSITIONAL_OR_KEYWORD
        kinds.append(p(argument.arg, kind, default=default))
    if arguments.vararg:
        kinds.append(p(arguments.vararg.arg, p.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = p.empty if default is None else ast.literal_eval(default)
        kinds.append(p(argument.arg, p.KEYWORD_ONLY, default=default))
    if arguments.kwarg:
        kinds.append(p(arguments.kwarg.arg, p.VAR_KEYWORD))
    return inspect.Signature(kinds)


def checked(owner, name):
    """Decorate a function or method: arguments that the real one does not take are a TypeError."""
    signature = names(owner)[name]

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            used.add((owner, name))
            bound = signature.bind(*args, **kwargs)
            return function(*bound.args, **bound.kwargs)

        call.__name__ = name
        return call

    return decorate


def checked_class(owner):
    """Decorate a class: its public methods are those of the table, with their signatures."""

    def decorate(cls):
        table = names(owner)
        for name, value in list(vars(cls).items()):
            if not name.startswith("_") and inspect.isfunction(value):
                setattr(cls, name, checked(owner, name)(value))
            elif not name.startswith("_") and name not in table:
                raise AttributeError(f"{owner} has no {name}")
        return cls

    return decorate
