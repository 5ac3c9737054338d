import pytest

import kfac_xp


def test_options():
    with pytest.raises(ValueError, match="`pi_type` must be one of"):
        kfac_xp.FactorOptions(pi_type="spectral")
    with pytest.raises(ValueError, match="`damping_split` must be one of"):
        kfac_xp.FactorOptions(damping_split="both")
    with pytest.raises(TypeError, match="unknown option 'debias'; the options are zero_debias"):
        kfac_xp.LayerCollection(debias=False)
