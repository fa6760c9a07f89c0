"""Where the model of the real-model tests is; `align.quickstart.real.model` makes it."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def real_model_folder() -> Path:
    """Where the model is: ALIGN_REAL_MODEL, else .cache/real_model of the repository. It may not have been made yet."""
    return Path(os.environ.get("ALIGN_REAL_MODEL") or ROOT / ".cache" / "real_model")
