"""Which compiled CPU kernels are used: only those of the sources that are installed."""

import importlib
import types

import pytest

from megacoder.core import native


@pytest.fixture(autouse=True)
def _asked_anew():
    native.native.cache_clear()
    yield
    native.native.cache_clear()


def pretend(monkeypatch, module):
    def import_module(name):
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_kernels_of_these_sources_are_used(monkeypatch):
    module = types.SimpleNamespace(interface=native.INTERFACE, isa=lambda: "avx2", has_amx=lambda: False)
    pretend(monkeypatch, module)
    assert native.native() is module
    assert native.native_state() == "avx2"


@pytest.mark.parametrize(
    ("module", "state"),
    [
        (ModuleNotFoundError("no"), "not built; the torch paths are used"),
        (ImportError("libx.so is missing"), "not loadable (libx.so is missing); the torch paths are used"),
        (types.SimpleNamespace(), "built from other sources (install again); the torch paths are used"),
        (types.SimpleNamespace(interface=0), "built from other sources (install again); the torch paths are used"),
    ],
)
def test_no_others_are(monkeypatch, module, state):
    pretend(monkeypatch, module)
    assert native.native() is None
    assert native.native_state() == state
