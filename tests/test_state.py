import numpy as np
import pytest

import kfac_xp


def test_nested_state_there_and_back(xp, tmp_path):
    state = {
        "counter": 3,
        "rate": 0.5,
        "on": True,
        "blocks": {"conv/1": {"total": xp.asarray([[1.0, 2.0]])}, "a~b": {"0": xp.asarray(1)}},
    }
    flat = kfac_xp.flatten_state(state)
    assert set(flat) == {"counter", "rate", "on", "blocks/conv~11/total", "blocks/a~0b/0"}
    assert all(isinstance(a, np.ndarray) for a in flat.values())
    kfac_xp.save_state(tmp_path / "state.npz", state)
    back = kfac_xp.load_state(tmp_path / "state.npz")
    assert back["counter"] == 3
    assert back["on"]
    assert np.array_equal(back["blocks"]["conv/1"]["total"], [[1.0, 2.0]])
    assert back["blocks"]["a~b"]["0"] == 1


def test_the_copy_is_not_the_original():
    array = np.zeros(2)
    flat = kfac_xp.flatten_state({"a": array})
    array[0] = 1
    assert flat["a"][0] == 0


def test_what_a_state_may_hold():
    with pytest.raises(TypeError, match="`a` is a list"):
        kfac_xp.flatten_state({"a": [1]})
    with pytest.raises(TypeError, match="keys of a state must be strings"):
        kfac_xp.flatten_state({1: 1})
