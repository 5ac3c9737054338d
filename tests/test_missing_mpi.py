"""What `MpiCommunicator` says where there is no MPI."""

import sys

import pytest

import kfac_xp


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_the_error_says_what_to_install(monkeypatch, error):
    """Without mpi4py it is an ImportError; its wheel without a library raises RuntimeError."""

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("mpi4py"):
                raise error("cannot load\nlibmpi.so")

    for name in [name for name in sys.modules if name.startswith("mpi4py")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"kfac-xp\[mpi\].*cannot load libmpi.so"):
        kfac_xp.MpiCommunicator()
