"""What launchers (torchrun, mpirun, srun) tell the processes that they start, by the environment. Imports no torch."""

import os

OF_A_PROCESS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun gives each process beside LOCAL_RANK."""
OF_SLURM = "SLURM_STEP_NUM_TASKS"
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", OF_SLURM)
"""Where launchers say how many processes they have started: torchrun's, those of MPI, and srun's."""


def forget() -> None:
    """This process is not one of a run: a server on each node is started by a launcher too, and has no ranks."""
    for name in {"LOCAL_RANK", *OF_A_PROCESS, *COUNTS}:
        os.environ.pop(name, None)
