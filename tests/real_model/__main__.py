"""`python -m tests.real_model [FOLDER]`: makes the model of the real-model tests, unless it is there."""

import sys
from pathlib import Path

from align.quickstart.real.model import make
from tests.real_model.make import real_model_folder

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else real_model_folder()
print(make(folder))
