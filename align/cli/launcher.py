"""`python -m align.cli.launcher ...`: accelerate's launcher, which takes the same arguments.

A process of the run that fails has said why, last of all. PyTorch's launcher would add a traceback of its own and a
table, and end with status 1 whatever the process ended with; here one line names the process, and its status is passed
on.
"""

import subprocess
import sys


def main() -> int:
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return ended(f"process {rank} of the run", failure.exitcode)
    except subprocess.CalledProcessError as error:  # of a run of one process
        return ended("the run", error.returncode)
    return 0


def ended(who: str, code: int) -> int:
    """Say so, and the status to end with: as shells have it, 128 + N after signal N."""
    how = f"signal {-code}" if code < 0 else f"status {code}"
    print(f"align launch: {who} ended with {how}; its own words are above", file=sys.stderr)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
