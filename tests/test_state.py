"""State as nested dicts, flat arrays and files."""

import io
import json
import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest

import kfac_xp
from kfac_xp.state import files


def example(xp=np):
    return {
        "counter": 3,
        "rate": 0.5,
        "on": True,
        "mode": "adam",
        "blocks": {"conv/1": {"total": xp.asarray([[1.0, 2.0]])}, "a~b": {"0": xp.asarray(1)}},
    }


def written(state):
    file = io.BytesIO()
    kfac_xp.save_state(file, state)
    return file


def equal(a, b):
    a, b = kfac_xp.flatten_state(a), kfac_xp.flatten_state(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


def test_nested_state_there_and_back(xp, tmp_path):
    state = example(xp)
    flat = kfac_xp.flatten_state(state)
    names = {"counter", "rate", "on", "mode", "blocks/conv~11/total", "blocks/a~0b/0"}
    assert set(flat) == names
    assert all(isinstance(a, np.ndarray) for a in flat.values())
    kfac_xp.save_state(tmp_path / "state.npz", state)
    back = kfac_xp.load_state(tmp_path / "state.npz")
    assert back["counter"] == 3
    assert back["on"]
    assert back["mode"] == "adam"
    assert np.array_equal(back["blocks"]["conv/1"]["total"], [[1.0, 2.0]])
    assert back["blocks"]["a~b"]["0"] == 1
    assert all(a.flags.writeable for a in kfac_xp.flatten_state(back).values())


def test_the_copy_is_not_the_original():
    array = np.zeros(2)
    flat = kfac_xp.flatten_state({"a": array})
    array[0] = 1
    assert flat["a"][0] == 0


def test_what_a_state_may_hold(tmp_path):
    with pytest.raises(TypeError, match="`a` is a list"):
        kfac_xp.flatten_state({"a": [1]})
    with pytest.raises(TypeError, match="keys of a state must be strings"):
        kfac_xp.flatten_state({1: 1})
    for bad, message in [
        (np.asarray([None]), "'a' has dtype object"),
        (np.zeros(2, [("x", "f4")]), "'a' has dtype"),
        (np.zeros(2, np.complex128), "'a' has dtype complex128"),
        (np.zeros(2, "M8[s]"), "'a' has dtype datetime64"),
    ]:
        with pytest.raises(TypeError, match=message):
            kfac_xp.save_state(tmp_path / "state.npz", {"a": bad})
    with pytest.raises(TypeError, match="is the file's own"):
        kfac_xp.save_state(tmp_path / "state.npz", {files.HEADER: 1})
    assert list(tmp_path.iterdir()) == []
    for flat in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}):
        with pytest.raises(kfac_xp.StateError, match=r"goes through an array|has others below it"):
            kfac_xp.unflatten_state(flat)


AWKWARD = {
    "": {"": np.zeros((0, 3))},
    "..": {"/etc/passwd": 1, ".": 2},
    'a\\b:*?"<>|\0c': {"%2E": 1, "%": 2, "file": 3, "é\n": np.float32(4)},
    "large": 2**200,
    "small": -(2**70),
    "big endian": np.asarray([1.5, 2.0], dtype=">f4"),
    "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "half": np.asarray([1, 2], dtype=np.float16),
    "bytes": np.arange(3, dtype=np.uint8)[::2],
    "infinite": [np.inf, -np.inf][1],
}


def test_awkward_names_and_values(tmp_path):
    path = tmp_path / "state.npz"
    kfac_xp.save_state(path, AWKWARD)
    back = kfac_xp.load_state(path)
    assert equal(back, kfac_xp.load_state(written(back)))
    assert int(str(back["large"])) == 2**200
    assert int(str(back["small"])) == -(2**70)
    assert np.array_equal(back["by columns"], np.arange(6.0).reshape(2, 3))
    assert np.array_equal(back["big endian"], [1.5, 2])
    assert back[".."]["/etc/passwd"] == 1
    assert back[""][""].shape == (0, 3)
    for name in zipfile.ZipFile(path).namelist():  # none leads out of a folder, on any system
        assert ".." not in name.split("/")
        assert not name.startswith("/")
        assert "//" not in name
        assert not set(name) & set('\\:*?"<>|\0')
    with np.load(path, allow_pickle=False) as stored:  # it is an `.npz` for everyone
        assert np.array_equal(stored["by columns"], AWKWARD["by columns"])


def test_equal_states_make_equal_files():
    assert written(example()).getvalue() == written(example()).getvalue()


# ---------------------------------------------------------------------------------------------
# Whole or not at all


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("stage", ["write_array", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, exists, stage, error):
    path = tmp_path / "state.npz"
    if exists:
        kfac_xp.save_state(path, example())
    before = path.read_bytes() if exists else None
    count = 0

    def fail(*arguments, **keywords):
        nonlocal count
        count += 1
        if count > (stage == "write_array"):  # an entry is there by then
            raise error
        return original(*arguments, **keywords)

    module = np.lib.format if stage == "write_array" else os
    original = getattr(module, stage)
    with monkeypatch.context() as patch:
        patch.setattr(module, stage, fail)
        with pytest.raises(type(error)):
            kfac_xp.save_state(path, {"other": 1})
    assert [p.name for p in tmp_path.iterdir()] == (["state.npz"] if exists else [])
    if exists:
        assert path.read_bytes() == before


def test_the_name_is_taken_when_all_is_on_the_disk(tmp_path, monkeypatch):
    calls = []

    def watch(module, name):
        original = getattr(module, name)

        def called(*arguments):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, name, called)

    watch(os, "fsync")
    watch(os, "replace")
    kfac_xp.save_state(tmp_path / "state", example())
    assert calls[:2] == ["fsync", "replace"]
    assert [p.name for p in tmp_path.iterdir()] == ["state"]  # as it was given, without ".npz"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_and_modes_are_ordinary(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "state.npz")
    kfac_xp.save_state(link, example())
    assert link.is_symlink()
    assert equal(kfac_xp.load_state(link), kfac_xp.load_state(tmp_path / "there" / "state.npz"))
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    assert stat.S_IMODE(link.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_names_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kfac_xp.save_state("state.npz", example())
    assert equal(kfac_xp.load_state("state.npz"), kfac_xp.load_state(Path("state.npz")))


# ---------------------------------------------------------------------------------------------
# Files that are none, or dangerous


def refused(file, message, name="the file"):
    with pytest.raises(kfac_xp.StateError, match=message) as raised:
        kfac_xp.load_state(file)
    assert str(raised.value).startswith(f"{name} cannot be loaded: ")
    assert "Nothing has been changed. Load an earlier file" in str(raised.value)


def rewritten(change, *, header=True, **options):
    """The example's file with its entries, ``[(name, bytes)]``, changed, and in order otherwise."""
    with zipfile.ZipFile(written(example())) as archive:
        entries = [(i.filename, archive.read(i)) for i in archive.infolist()]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in change(entries[0 if header else 1 :]):
            archive.writestr(name, content)
    return file


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def test_files_that_are_no_states(tmp_path):
    path = tmp_path / "foreign"
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    for content, message in [
        (b"", "no `.npz` file"),
        (b"x" * 1000, "no `.npz` file"),
        (npy(np.zeros(3)), "no `.npz` file"),
        ((tmp_path / "other.npz").read_bytes(), "a zip, but no state written by `save_state`"),
        (written(example()).getvalue()[:-30], "no `.npz` file, or damaged"),
    ]:
        path.write_bytes(content)
        refused(path, message, str(path))
    with pytest.raises(FileNotFoundError):
        kfac_xp.load_state(tmp_path / "nowhere")


def test_entries_that_are_dangerous():
    array = npy(np.arange(6.0).reshape(2, 3))
    objects = io.BytesIO()
    np.lib.format.write_array(objects, np.asarray([print], dtype=object))  # a pickle
    bomb = npy(np.zeros((2, 3))).replace(b"(2, 3), }            ", b"(99999999999, 3), }  ")
    assert len(bomb) == len(array)
    for name, content, message in [
        ("objects.npy", objects.getvalue(), "a header that `save_state` never writes"),
        ("../up.npy", array, "'../up.npy' is not named as"),
        ("/root.npy", array, "'/root.npy' is not named as"),
        ("a//b.npy", array, "not named as"),
        ("a\\b.npy", array, "not named as"),
        ("plain", array, "'plain' is not named as"),
        ("bomb.npy", bomb, r"promises 2399999999976 bytes of shape \(99999999999, 3\)"),
        ("bomb.npy", bomb.replace(b"(99999999999, 3)", b"(0, 99999999999)"), "promises 0 bytes"),
        ("cut.npy", array[:-8], "promises 48 bytes .* and the entry holds 40"),
        ("long.npy", array + b"\0", "promises 48 bytes .* and the entry holds 49"),
        ("short.npy", array[:7], "a header that"),
        ("counter.npy", array, "'counter.npy' is there twice"),
        ("one more.npy", array, "the digest differs"),
    ]:
        with pytest.warns() if name == "counter.npy" else nothing():
            file = rewritten(lambda entries, add=(name, content): [*entries, add])
        refused(file, message)
    refused(rewritten(lambda entries: entries[:-1]), "the digest differs")
    refused(rewritten(lambda entries: entries, header=False), "no state written by")
    refused(rewritten(lambda e: e, compression=zipfile.ZIP_DEFLATED), "is compressed")

    def exchanged(entries):
        (a, x), (b, y) = entries[-2:]
        return [*entries[:-2], (a, y), (b, x)]

    refused(rewritten(exchanged), "the digest differs")
    assert kfac_xp.load_state(rewritten(lambda entries: entries))["counter"] == 3


def nothing():
    return io.BytesIO()  # any context that does nothing


def test_entries_whose_sizes_lie():
    """The directory of a zip is believed by nobody: sizes are those of what is there."""
    content = bytearray(written(example()).getvalue())
    at = content.rindex(b"PK\x01\x02")  # the last entry's record in the directory
    for size in (0, 100, 2**31):
        lying = content.copy()
        lying[at + 20 : at + 28] = size.to_bytes(4, "little") * 2
        with pytest.raises(kfac_xp.StateError):
            kfac_xp.load_state(io.BytesIO(lying))


def test_other_versions_are_named_before_anything_else_is_read():
    newer = json.dumps({"version": files.VERSION + 1})

    def change(entries):
        header = npy(np.asarray(newer))
        return [(entries[0][0], header), ("what.ever", b"")]

    refused(rewritten(change), "version 2 of the format, and this kfac_xp reads version 1")
