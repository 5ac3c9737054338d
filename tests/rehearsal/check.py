"""The names and signatures of the stand-in beside those of the real CuPy, which must be installed.

    python tests/rehearsal/check.py           # compare; exits 1 where they differ
    python tests/rehearsal/check.py --write   # write what the real CuPy has

CuPy can be imported without a GPU. Signatures are those that `inspect` finds, else the first line
of the docstring, which Cython writes. Of ufuncs the numbers of arguments are compared, of constants
and attributes the names.
"""

import argparse
import ast
import importlib
import inspect
import re
import sys
import warnings
from pathlib import Path

TABLE = Path(__file__).parent / "packages" / "cupy" / "_signatures.txt"
_OWNER = re.compile(r"^\[(.+)\]$")


def read(path=TABLE):
    """``{owner: {name: line}}`` of the table: an owner is a module or a class."""
    found, owner = {}, None
    for line in path.read_text().splitlines():
        if match := _OWNER.match(line):
            owner = found.setdefault(match[1], {})
        elif line and not line.startswith("#"):
            owner[re.match(r"\w+", line)[0]] = line
    return found


def write(table, path=TABLE):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    blocks = ["\n".join(head)]
    for owner, names in table.items():
        blocks.append("\n".join([f"[{owner}]", *(names[name] for name in sorted(names))]))
    path.write_text("\n\n".join(blocks) + "\n")


def line_of(owner, name):
    """The line of the table for an attribute of the real CuPy."""
    value = getattr(owner, name)
    if type(value).__name__ == "ufunc":
        return f"{name} ufunc {value.nin} {value.nout}"
    if not callable(value) or (isinstance(value, type) and not hasattr(value, "__module__")):
        return name
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        first = (value.__doc__ or "").strip().partition("\n")[0]
        match = re.search(r"\w\((.*)\)", first)
        text = f"({match[1]})" if match else None
    return name if text is None else f"{name}{normal(text)}"


def normal(text):
    """A signature without annotations, types of C and results.

    Defaults that are no literals become ``...``.
    """
    text = re.sub(r"\s*->.*$", "", text)
    text = re.sub(r"<[^<>]*>", "...", text)
    parts = []
    for part in split(text[1:-1]):
        name, _, default = part.partition("=")
        name = name.partition(":")[0].strip()
        if name not in ("/", "*"):
            name = name.split()[-1]
        if default:
            try:
                value = ast.literal_eval(default.strip())
            except (ValueError, SyntaxError):
                value = ...
            default = "..." if value is ... else repr(value)
            name = f"{name}={default}"
        parts.append(name)
    return f"({', '.join(parts)})"


def split(text):
    """At commas outside of brackets and quotes."""
    parts, depth, quoted, part = [], 0, "", ""
    for c in text:
        quoted = "" if c == quoted else (c if c in "'\"" and not quoted else quoted)
        depth += 0 if quoted else (c in "([{") - (c in ")]}")
        if c == "," and depth == 0 and not quoted:
            parts.append(part)
            part = ""
        else:
            part += c
    return [p for p in [*parts, part] if p.strip()]


def found_in(owner):
    """The module or class of the real CuPy of this dotted name."""
    try:
        return importlib.import_module(owner)
    except ModuleNotFoundError:
        parent, _, name = owner.rpartition(".")
        return getattr(found_in(parent), name)


def arrays():
    """Real arrays that no device has: their memory is never read."""
    import cupy
    import numpy as np

    memory = cupy.cuda.UnownedMemory(1 << 20, 1 << 16, None, 0)
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    shapes = {"x": ((4, 6), "f4"), "two": ((), "i8"), "stack": ((0, 4, 4), "f8")}
    made = {name: cupy.ndarray(*form, memptr=pointer) for name, form in shapes.items()}
    return {"np": np, "cupy": cupy, "cupyx": importlib.import_module("cupyx"), **made}


def otherwise():
    """What of ``behaviour.py`` is not so, of what needs no device."""
    import behaviour

    for expression, expected in behaviour.WITHOUT_DEVICE.items():
        found = behaviour.outcome(expression, arrays())
        if found != expected:
            yield f"{expression} gives {found}, not {expected}"
    print(f"{len(behaviour.WITHOUT_DEVICE)} expressions compared")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write what the real CuPy has")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    here = str(TABLE.parent.parent)
    sys.path[:] = [path for path in sys.path if path != here]
    table, real, missing = read(), {}, []
    for owner, names in table.items():
        real[owner] = {}
        for name in names:
            try:
                real[owner][name] = line_of(found_in(owner), name)
            except AttributeError:
                missing.append(f"{owner}.{name} does not exist")
    differ = [
        f"{owner}: {table[owner][name]} is {line}"
        for owner, names in real.items()
        for name, line in names.items()
        if table[owner][name] != line
    ]
    if args.write:
        write(real)
        print(*missing, f"{len(differ)} lines changed", sep="\n")
        return
    differ += otherwise()
    count = sum(map(len, table.values()))
    version = importlib.import_module("cupy").__version__
    print(*missing, *differ, f"{count} names compared with CuPy {version}", sep="\n")
    sys.exit(1 if missing or differ else 0)


if __name__ == "__main__":
    main()
