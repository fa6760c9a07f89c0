"""The estimate of `--dry-run` against the memory that runs on the pretrained model take, one of them in 4 bits."""

import json
import os
import re
import subprocess
import sys

import pytest

from align.cli.main import main
from tests.real_model.conftest import FILE

# What runs take, and no more: pages of the weights' file, mapped while it is read, are the system's to take back, so
# only the process's own memory counts (of which the kernel keeps no high-water mark); and blocks of 64 KiB and more are
# given back when they are freed, where glibc's moving threshold keeps, by chance, up to 250 MiB of what packing the
# weights has used.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
MEASURED = """
import gc, json, sys, threading
from pathlib import Path
import torch
from align.cli.main import main
import align.cli.train, align.trainers.dpo, peft, trl  # noqa

def own_memory():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024

def watch():
    while not ended.wait(0.01):
        seen.append(own_memory())

gc.collect()
before = own_memory()
seen, ended = [before], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
try:
    assert main(sys.argv[1:]) == 0
finally:
    ended.set()
watcher.join()
print(json.dumps({"peak": max(seen) - before}))
"""


FULL, QLORA = (), ("--use_peft", "--lora_target_modules", "all-linear", "--load_in_4bit")


@pytest.mark.parametrize("kind", [FULL, QLORA], ids=["full", "qlora"])
def test_the_estimate_is_near_the_peak(kind, real_model, tmp_path, capsys):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(FILE.read_text().splitlines(keepends=True)[:1]))
    files = [
        "--model_name_or_path",
        str(real_model),
        "--dataset_name",
        str(rows),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    options = "--max_steps 1 --per_device_train_batch_size 1 --max_length 512 --save_strategy no --verify_saved false"
    command = ["dpo", *files, *options.split(), "--report_to", "none", "--use_cpu", *kind]
    assert main([*command, "--dry-run"]) == 0
    found = re.search(r"total +([\d.]+) (GiB|MiB)", capsys.readouterr().out)
    estimated = float(found[1]) * 2 ** (30 if found[2] == "GiB" else 20)
    environment = os.environ | GIVEN_BACK
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = json.loads(done.stdout.splitlines()[-1])["peak"]
    print(f"estimate {estimated / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB, ratio {estimated / peak:.2f}")
    assert 0.7 < estimated / peak < 1.6
