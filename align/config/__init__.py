"""Configuration: YAML files and command-line overrides become typed configs. Nothing else knows about files and flags.

`source` reads files and overrides and remembers the line of every key; `resolve` checks keys and types and builds the
dataclasses; `help` prints the options of a method.
"""

import sysconfig
from pathlib import Path

from align.errors import ConfigError


def configs_dir() -> Path:
    """The folder of the recipes and launch files: `configs/` of a clone, `<prefix>/share/align/configs` installed."""
    places = [
        Path(__file__).resolve().parents[2] / "configs",
        Path(sysconfig.get_path("data")) / "share" / "align" / "configs",
        Path(sysconfig.get_path("data", sysconfig.get_preferred_scheme("user"))) / "share" / "align" / "configs",
    ]
    for place in places:
        if (place / "accelerate" / "ddp.yaml").is_file():
            return place
    raise ConfigError(f"the recipes of align are in none of {', '.join(map(str, places))}; reinstall align-rlhf")
