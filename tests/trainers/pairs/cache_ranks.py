"""A cache of reference log-probs by two processes, on one disk or on one each. Run as a script: folder, rows, disks."""

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset

from align.trainers.pairs import reference_file
from align.trainers.pairs.reference_cache import ReferenceCache
from align.trainers.pairs.reference_file import COLUMNS


def rows(count: int) -> Dataset:
    """Of several lengths, none of which says which row it is."""
    made = [
        {"prompt_ids": [1], "chosen_ids": [2] * (1 + i % 3), "rejected_ids": [3] * (1 + i % 4)} for i in range(count)
    ]
    return Dataset.from_list(made)


def logps(row: dict, number: int) -> tuple[np.ndarray, np.ndarray]:
    chosen, rejected = (np.arange(len(row[f"{name}_ids"]), dtype=np.float32) for name in ("chosen", "rejected"))
    return number + chosen / 8, -number - rejected / 8


if __name__ == "__main__":
    state = PartialState(cpu=True)
    folder, data = Path(sys.argv[1]), rows(int(sys.argv[2]))
    reference_file.SENT = 1000  # a file is sent in many pieces
    own = folder / (str(state.process_index) if sys.argv[3] == "two" else "both")
    computed = []

    def compute(shards) -> None:
        there = shards.find()
        for number in range(state.process_index, len(data), 2):
            if not there[number]:
                shards.append(number, *logps(data[number], number))
                computed.append(number)
        shards.close()

    cache = ReferenceCache(own, "weights", "float32")
    first = cache.add_to(data, "train", compute)
    again = cache.add_to(data, "train", compute)
    expected = [[column.tolist() for column in logps(row, number)] for number, row in enumerate(data)]
    found = {
        "right": [[row[column] for column in COLUMNS] for row in first] == expected and again[:] == first[:],
        "computed": len(computed),
        "left": sorted(path.name for path in own.iterdir()),
        "mapped": len(first.cache_files),
    }
    (folder / f"{state.process_index}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
