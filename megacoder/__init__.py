"""megacoder: from folders of repositories to a trained, evaluated and exported code model.

Packages, lowest first; each imports only from those before it (`tests/test_layering.py` holds this):
`core`, `ops`, `parallel`, `data` and `checkpoint`, `model` and `corpus`, `train` and `evaluate`, `cli`.
"""

from megacoder.version import __version__

__all__ = ["__version__"]
