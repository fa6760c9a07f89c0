"""TRL's own trainer tests with align's trainers and configs in the place of TRL's.

    git clone https://github.com/huggingface/trl ../trl
    python benchmarks/trl_suite.py --trl ../trl [--suites dpo sft reward rloo grpo] [--tests EXPRESSION] [--output FILE]

The clone's tests run against the installed TRL package, so their versions may differ. Nothing is downloaded: the models
are local ones of the same architectures, the data sets are made by TRL's own scripts (`worlds.trl_models`). Which tests
are left out is in `worlds.trl_plugin`. Takes about half an hour on one core.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from worlds.trl_models import make_world

SUITES = ("dpo", "sft", "reward", "rloo", "grpo")
HERE = Path(__file__).resolve().parent


def run_suite(suite: str, clone: Path, world: Path, tests: str | None, timeout: float) -> dict:
    """Passed, failed, skipped and deselected tests of one suite; failed with the last line of the error."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(world / "datasets"),
            "CUDA_VISIBLE_DEVICES": "",
            "TRL_SUITE_RESULT": str(result),
        }
        command = [
            sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "worlds.trl_plugin", "-p", "no:cacheprovider",
            "--basetemp", str(Path(folder) / "runs"), "--rootdir", str(clone), "-m", "not slow",
            *(["-k", tests] if tests else []), str(clone / "tests" / f"test_{suite}_trainer.py"),
        ]  # fmt: skip
        # the world's folder is the working directory: its names are those of the hub's models
        subprocess.run(command, cwd=world, env=environment, timeout=timeout, check=False)
        return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="a clone of TRL's repository")
    parser.add_argument("--world", type=Path, help="folder for the models and data, kept between runs")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--tests", help="pytest's -k")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one suite")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(args.trl.resolve(), (args.world or Path(folder)).resolve())
        found = {s: run_suite(s, args.trl.resolve(), world, args.tests, args.timeout) for s in args.suites}
    for suite, result in found.items():
        passed, failed = len(result["passed"]), len(result["failed"])
        print(f"{suite}: {passed} of {passed + failed} pass, {len(result['skipped'])} skipped by TRL's own conditions")
        for name, error in result["failed"].items():
            print(f"    {name}: {error}")
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
