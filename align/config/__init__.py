"""Configuration: YAML files and command-line overrides become typed configs. Nothing else knows about files and flags.

`source` reads files and overrides and remembers the line of every key; `resolve` checks keys and types and builds the
dataclasses; `help` prints the options of a method.
"""

from pathlib import Path


def configs_dir() -> Path:
    """The folder of the ready configs and launch files (`configs/` of the repository)."""
    return Path(__file__).resolve().parents[1] / "configs"
