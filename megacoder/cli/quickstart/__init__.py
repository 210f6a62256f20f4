"""`megacoder quickstart`: the whole job on this machine, from sources found on it to infilled code.

Reading order: `options.py`, `stages.py` (each stage is a command of its own elsewhere), `recipe.py` (which model for
this machine and time), `report.py`.
"""

from megacoder.cli.quickstart.stages import main

__all__ = ["main"]
