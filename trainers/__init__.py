"""Training methods, one file each. What dependencies would report to their makers is off, as `import align` says, also
for those that were imported before."""

import os

from huggingface_hub import constants

import align  # noqa: F401  (sets the variable)

if os.environ["HF_HUB_DISABLE_TELEMETRY"].upper() in ("1", "ON", "YES", "TRUE"):
    constants.HF_HUB_DISABLE_TELEMETRY = True
