"""Tokenising many pairs: pairs per second with one process and with several, the second start, and peak memory.

    python benchmarks/tokenising.py [--pairs 100000] [--processes 2] [--out benchmarks/results/tokenising.json]

Synthetic conversational pairs (one prompt and two answers of some 40 words each, drawn from a small vocabulary, every
row different) in a Parquet file; a byte-level BPE of 16 000 tokens, trained on such texts. Each measurement is a
process of its own that reads the file and calls `tokenize_pairs`, once: with an empty cache and one process (the
tokenizer's own threads work there), with an empty cache and several, and again with what the last one left. Beside it
the raw tokenizer on the same texts: prompt and answers in batches of 1000, nothing kept. Memory is the largest resident
size of the process above what it had when the file was opened; pages of memory-mapped files count, and the system may
take these back. The file is made before, and not measured. With a load average above the number of CPUs, other work ran
beside it, and only ratios mean something.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "WHAT"), help="for the processes that this one starts")
    args = parser.parse_args()
    if args.one:
        folder, what = args.one
        print(json.dumps(measure(Path(folder), what, args.processes)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), args.pairs)
        found = {}
        for what in ("raw", "one process", "several processes", "second start"):
            if what != "second start":
                clear(Path(folder))
            found[what] = start(folder, what, args.processes)
            print(what, found[what], flush=True)
    load, cpus = round(os.getloadavg()[2], 1), len(os.sched_getaffinity(0))
    result = {"pairs": args.pairs, "processes": args.processes, "cpus": cpus, "load_average_15min": load, **found}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def start(folder: str, what: str, processes: int) -> dict:
    env = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--one", folder, what, "--processes", str(processes)]
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def clear(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / "cache" / "align_tokenised", ignore_errors=True)


def make_files(folder: Path, pairs: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters, range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(20_000)]

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(15, 60)))

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<pad>"]
    raw.train_from_iterator(
        (text() for _ in range(2000)),
        trainers.BpeTrainer(vocab_size=16_000, special_tokens=special, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    writer = None
    for start in range(0, pairs, 1000):
        count = min(1000, pairs - start)
        columns = {name: [[{"role": role, "content": text()}] for _ in range(count)] for name, role in ROLES.items()}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(folder / "pairs.parquet", table.schema)
        writer.write_table(table)
    writer.close()


ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def measure(folder: Path, what: str, processes: int) -> dict:
    import logging

    from transformers import AutoTokenizer

    from align.data import load_rows, tokenize_pairs

    logging.disable(logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = load_rows(folder / "pairs.parquet")
    before, began = resident(), time.perf_counter()
    if what == "raw":
        for batch in rows.iter(1000):
            for name in ROLES:
                tokenizer([messages[0]["content"] for messages in batch[name]], add_special_tokens=False)
        count = len(rows)
    else:
        done = tokenize_pairs(rows, tokenizer, max_length=1024, num_proc=processes if what != "one process" else None)
        count = len(done)
    seconds = time.perf_counter() - began
    peak = int(next(line for line in status() if line.startswith("VmHWM")).split()[1]) / 1024
    return {
        "seconds": round(seconds, 2),
        "pairs_per_second": round(count / seconds),
        "peak_mib_above_start": round(peak - before),
    }


def status() -> list[str]:
    return Path("/proc/self/status").read_text().splitlines()


def resident() -> float:
    """MiB."""
    return int(next(line for line in status() if line.startswith("VmRSS")).split()[1]) / 1024


if __name__ == "__main__":
    main()
