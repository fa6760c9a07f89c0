"""The comparison of benchmarks/dpo_vs_trl.py on a GPU: bfloat16 mixed precision, half a billion parameters.

    python benchmarks/gpu/dpo_vs_trl.py [--data FILE] [--pairs 64] [--steps 10] [--repetitions 3] [--checkpointing]

Ours runs shared prefixes through FlexAttention, TRL's padded batches through SDPA. Wall time decides here; the result
also has the peak memory of each side. In bfloat16 the losses agree to about 1e-2 (relative), which is checked.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from dpo_vs_trl import HERE, arguments, main

if __name__ == "__main__":
    parser = arguments()
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.set_defaults(
        pairs=64, steps=10, hidden=896, layers=24, vocabulary=32768, max_length=1024, tolerance=3e-2,
        output=HERE / "results" / "gpu_dpo_vs_trl.json",
    )  # fmt: skip
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; benchmarks/dpo_vs_trl.py runs on processors")
    args.device_options = {"bf16": True, "gradient_checkpointing": args.checkpointing}
    main(args)
