"""What a checkpoint holds beyond transformers' files, and which one a run resumes from.

A checkpoint is transformers' folder `checkpoint-<step>`, a file of each process with what its method keeps, and the
manifest that declares it whole (`align.distributed.checkpoints`).
"""

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer_callback import TrainerState

from align.distributed.checkpoints import damage, newest_whole
from align.distributed.ranks import by_first, shared
from align.errors import TrainingError
from align.trainers.core.identity import check_same_run, read_identity
from align.trainers.core.resumed import check_optimizer_change
from align.trainers.core.zero import LATEST, check_processes

logger = logging.getLogger(__name__)

EXTRA_STATE = "align_state_{rank}.pt"
# The file or folder of the optimiser's state that transformers and accelerate write, and what a run trains with then:
# one kind cannot read another's.
LAYOUTS = {
    "optimizer.pt": "neither FSDP nor DeepSpeed",
    "optimizer.bin": "FSDP (FULL_STATE_DICT)",
    "optimizer_0": "FSDP (SHARDED_STATE_DICT)",
    LATEST: "DeepSpeed",
}


@dataclass
class Resumed:
    """The checkpoint that a run resumes from. state: what the method's `extra_state` returned, on this process."""

    folder: Path
    step: int
    state: dict


@functools.cache
def let_torch_load_to_numbered_cpus() -> None:
    """With several processes on CPUs, transformers loads the optimiser's state to the device "cpu:0", which
    `torch.load` does not know."""
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


def write_extra_state(folder: Path, state: dict, *, rank: int, processes: int, model_only: bool) -> None:
    """Write what this process's method keeps: tensors and plain values."""
    content = {"model_only": model_only, "processes": processes, "method": state}
    torch.save(content, folder / EXTRA_STATE.format(rank=rank))


def layout_of(trainer: Trainer) -> str:
    """What this run trains with, of `LAYOUTS`."""
    if trainer.is_deepspeed_enabled:
        return LAYOUTS[LATEST]
    if not trainer.is_fsdp_enabled:
        return LAYOUTS["optimizer.pt"]
    return f"FSDP ({trainer.accelerator.state.fsdp_plugin.state_dict_type.name})"


def _check_layout(folder: str, layout: str) -> None:
    found = next((LAYOUTS[name] for name in LAYOUTS if (Path(folder) / name).exists()), layout)  # none: save_only_model
    if found != layout:
        raise TrainingError(
            f"{folder} was written with {found}, and this run trains with {layout}, which cannot read the optimiser's "
            "state: resume with what wrote it (--setup of align launch, fsdp_state_dict_type of accelerate), or begin "
            "a new run, in another output_dir, from its weights"
        )


def read_checkpoint(folder: str | Path, *, rank: int, processes: int) -> Resumed:
    """This process's part of a checkpoint. Raises `TrainingError` where this number of processes cannot resume it."""
    path = Path(folder) / EXTRA_STATE.format(rank=rank)
    if not path.exists():
        wrote = len(list(path.parent.glob(EXTRA_STATE.format(rank="*"))))
        raise TrainingError(
            f"{folder} was written by {wrote} processes, and {processes} cannot go on from it ({path.name} is "
            f"missing): resume with {wrote}"
        )
    content = torch.load(path, weights_only=True)
    if content["model_only"]:
        raise TrainingError(
            f"{folder} was written with save_only_model: it has no optimiser state to resume with. It can be "
            "the model of a new run"
        )
    check_processes(folder, content["processes"], processes)
    if content["processes"] != processes:
        logger.warning(
            "%s was written by %d processes, and %d go on from it: the run is the same, up to rounding, only if a "
            "step's batch is, and without dropout",
            folder,
            content["processes"],
            processes,
        )
    let_torch_load_to_numbered_cpus()
    step = TrainerState.load_from_json(Path(folder) / "trainer_state.json").global_step
    return Resumed(Path(folder), step, content["method"])


def choose_checkpoint(
    wanted: str | bool | None, output_dir: str | Path, identity: dict, changes: list[str], layout: str
) -> str | None:
    """The folder to resume from, checked by the main process for all; None to start from the beginning.

    wanted: a folder; True for the newest whole one below `output_dir`; "auto" for that or, if there is none, for none;
    None or False for none. identity: of this run; changes: names of settings in which the checkpoint's may differ;
    layout: of the optimiser's state, of `LAYOUTS`.
    """
    return shared(by_first(lambda: _chosen(wanted, output_dir, identity, changes, layout)))


def _chosen(
    wanted: str | bool | None, output_dir: str | Path, identity: dict, changes: list[str], layout: str
) -> str | None:
    if wanted in (True, "auto"):
        newest = newest_whole(output_dir)
        if newest is None and wanted is True:
            raise TrainingError(f"nothing to resume: {output_dir} holds no undamaged checkpoint-<step>")
        if newest is None:
            logger.info("resuming from the beginning: %s holds no whole checkpoint yet", output_dir)
            return None
        folder = str(newest)
    elif wanted:
        folder = str(wanted)
        problem = damage(folder)
        if problem:
            raise TrainingError(f"cannot resume from {folder}: {problem}")
    else:
        old = sorted(path.name for path in Path(output_dir).glob("checkpoint-*"))
        if old:
            logger.warning(
                "training starts from the beginning, and %s holds %s of an earlier run: resuming later could take "
                "them for this run's. Delete them, or use another output_dir",
                output_dir,
                ", ".join(old),
            )
        return None
    _check_layout(folder, layout)
    before = read_identity(folder)
    if before is None:
        logger.warning("%s does not say which run it is of: nothing can be compared", folder)
    else:
        changed = check_same_run(before, identity, changes, folder)
        check_optimizer_change(changed, folder, deepspeed=layout == LAYOUTS[LATEST])
        for name, (old_value, new_value) in changed.items():
            logger.warning("going on from %s with %s %r instead of %r", folder, name, new_value, old_value)
    logger.info("resuming from %s", folder)
    return folder
