"""Files with any damage load as what was saved, or are refused: nothing else happens."""

import io
import random
import re
import zipfile

import numpy as np
import pytest

import kfac_xp


def small_optimizer(rng):
    """An optimizer of one small layer that has it all: statistics, powers, velocity, damping."""
    w, x = rng.normal(size=(1, 2)), rng.normal(size=(4, 1))
    layers = kfac_xp.LayerCollection(posdef_inv_method="newton_schulz")
    layers.register_fully_connected("fc", w, approx="kron_in_diag")
    optimizer = kfac_xp.KfacOptimizer(
        layers, 0.1, 0.1, adapt_damping=True, damping_adaptation_interval=1
    )
    params, _ = optimizer.step(
        {"fc": w},
        statistics={"fc": (x, rng.normal(size=(4, 2)))},
        grads={"fc": w},
        loss=1.0,
        loss_fn=lambda params: np.sum(params["fc"] ** 2),
    )
    return optimizer, params


def flipped(content, draw):
    """Some bits, anywhere: anywhere in a file is mostly in its many headers."""
    for _ in range(draw.choice([1, 1, 2, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def overwritten(content, draw):
    """Numbers as they stand in headers, small, huge and negative, over what was there."""
    at = draw.randrange(len(content) - 8)
    size = draw.choice([1, 2, 4, 8])
    content[at : at + size] = draw.choice([0, 1, 2**31, 2**63 - 1, -1, -2]).to_bytes(
        9, "little", signed=True
    )[:size]
    return content


def cut(content, draw):
    """The end, the start or a part of the middle gone."""
    a, b = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return draw.choice([content[:a], content[a:], content[:a] + content[b:]])


def spliced(content, draw):
    """Parts of the file copied to other places of it, over what is there or between."""
    a, b = sorted(draw.randrange(len(content)) for _ in range(2))
    at, over = draw.randrange(len(content)), draw.random() < 0.5
    piece = content[a : min(b, a + draw.choice([8, 64, 4096]))]
    return content[:at] + piece + content[at + len(piece) * over :]


def records(content):
    return [m.start() for m in re.finditer(rb"PK\x01\x02", bytes(content))]


def relinked(content, draw):
    """Two records of the directory exchange a field: sizes, checksums, the place of the data."""
    a, b = (draw.choice(records(content)) for _ in range(2))
    at, size = draw.choice([(10, 2), (16, 4), (20, 4), (24, 4), (42, 4), (16, 12), (8, 2)])
    a, b = slice(a + at, a + at + size), slice(b + at, b + at + size)
    content[a], content[b] = content[b], content[a]
    return content


def renamed(content, draw):
    """One entry takes the name of another of the same length, or any, in one header or in both."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
    old = draw.choice(names).encode()
    new = draw.choice([n.encode() for n in names if len(n) == len(old)] + [b"../" + old[3:]])
    return bytearray(bytes(content).replace(old, new, draw.choice([1, 2])))


def rezipped(content, draw):
    """A zip without fault of entries that were exchanged, edited, dropped or doubled."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [[i.filename, archive.read(i)] for i in archive.infolist()]
    for _ in range(draw.choice([1, 2])):
        i, j = draw.randrange(len(entries)), draw.randrange(len(entries))
        EDITS[draw.choice(list(EDITS))](entries, i, j, draw)
    file = io.BytesIO()
    names = set()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries:
            if name not in names:  # to write one twice would warn
                archive.writestr(zipfile.ZipInfo(name), bytes(data))
            names.add(name)
    return bytearray(file.getvalue())


def exchange_contents(entries, i, j, draw):
    entries[i][1], entries[j][1] = entries[j][1], entries[i][1]


def exchange_order(entries, i, j, draw):
    entries[i], entries[j] = entries[j], entries[i]


def drop(entries, i, j, draw):
    if len(entries) > 2:
        del entries[i]


def rename(entries, i, j, draw):
    entries[i][0] = draw.choice([entries[i][0][1:], "x/" + entries[i][0], "x.npy", entries[i][0]])


def edit_header(entries, i, j, draw):
    """Another dtype, shape, order or length of the header, of the same length."""
    old, new = draw.choice(
        [
            (b"<f8", b"<i8"),
            (b"<f8", b"<f4"),
            (b"<f8", b">f8"),
            (b"<f8", b"|O8"),
            (b"<i8", b"<m8"),
            (b"<i8", b"<u8"),
            (b"|b1", b"|u1"),
            (b"False", b"True "),
            (b"(2, 2)", b"(1, 4)"),
            (b"(1, 2)", b"(2, 1)"),
            (b"(2,)", b"(3,)"),
            (b"()", b"(1,)"),
            (b"(2, 2)", b"(2,-2)"),
            (b"(2, 2)", b"(9**9)"),
            (b"'shape'", b"'\\dape'"),
            (b"\x93NUMPY\x01", b"\x93NUMPY\x03"),
            (b"v\x00{", b"\x10\x00{"),
            (b"}", b")"),
        ]
    )
    entries[i][1] = entries[i][1].replace(old, new, 1)


def edit_data(entries, i, j, draw):
    data = bytearray(entries[i][1])
    data[-draw.randrange(1, min(17, len(data)))] ^= 1 << draw.randrange(8)
    entries[i][1] = data


EDITS = {
    f.__name__: f for f in (exchange_contents, exchange_order, drop, rename, edit_header, edit_data)
}
MUTATIONS = (flipped, overwritten, cut, spliced, relinked, renamed, rezipped)


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and np.array_equal(a[k], b[k])
        for k in a
    )


def test_damaged_files(rng, request):
    """As many as the option ``--damaged-files`` says; warnings are errors, as in every test."""
    optimizer, _ = small_optimizer(rng)
    file = io.BytesIO()
    kfac_xp.save_state(file, optimizer.state_dict())
    content, state = file.getvalue(), kfac_xp.flatten_state(optimizer.state_dict())
    draw = random.Random(5)
    refused = dict.fromkeys(MUTATIONS, 0)
    number = request.config.getoption("--damaged-files")
    for i in range(number):
        mutate = MUTATIONS[i % len(MUTATIONS)]
        message, loaded = outcome(bytes(mutate(bytearray(content), draw)))
        if message is None:
            assert equal(kfac_xp.flatten_state(loaded), state), (i, mutate)
        else:
            assert message.startswith("the file cannot be loaded: "), message
            assert "Load an earlier file" in message, message
            refused[mutate] += 1
    assert min(refused.values()) > number / 100, refused  # of each kind some
    assert 0 < number - sum(refused.values()) < number / 2, refused  # and some did no harm


def outcome(content):
    """What is said of a file, or what it holds."""
    try:
        return None, kfac_xp.load_state(io.BytesIO(content))
    except kfac_xp.StateError as error:
        return str(error), None


@pytest.mark.parametrize("seed", range(3))
def test_damaged_states_leave_no_trace(rng, seed):
    """Past the file: flat states whose entries were mixed up, which nothing but `load` can see."""
    optimizer, params = small_optimizer(rng)
    state = kfac_xp.flatten_state(optimizer.state_dict())
    draw = random.Random(seed)
    counts = {True: 0, False: 0}
    for _ in range(200):
        mixed = dict(state)
        for _ in range(draw.choice([1, 2])):
            a, b = draw.choice(list(mixed)), draw.choice(list(mixed))
            mixed[a], mixed[b] = draw.choice(
                [
                    (mixed[b], mixed[a]),
                    (np.asarray(draw.random()), mixed[b]),
                    (mixed[a].astype("f4") if mixed[a].dtype.kind != "U" else 1.5, mixed[b]),
                    (np.full_like(mixed[a], -1), mixed[b]),
                ]
            )
            mixed = {k: np.asarray(v) for k, v in mixed.items()}
        before = kfac_xp.flatten_state(optimizer.state_dict())
        try:
            optimizer.load_state_dict(kfac_xp.unflatten_state(mixed), params)
        except kfac_xp.StateError:
            counts[False] += 1
            after = kfac_xp.flatten_state(optimizer.state_dict())
            assert equal(before, after)
        else:
            counts[True] += 1
            after = kfac_xp.flatten_state(optimizer.state_dict())
            assert after.keys() == mixed.keys()
            # A number may be of another dtype: it is Python's afterwards.
            assert all(np.array_equal(after[k], mixed[k]) for k in mixed)
    assert min(counts.values()) > 5, counts
