"""What a push of weights costs with its proof, in seconds of processor time: all weights, and an adapter alone.

    python benchmarks/push_cost.py [--backend vllm] [--pushes 5] [--output FILE]

A Llama of the shape of SmolLM2-135M (random weights, tied embeddings), which every push finds changed. Each push ends
with the comparison of every tensor in the engine's own memory. `packing`: the part of each push in which vLLM packs the
weights as its CPU kernels read them.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from align.rollout import make_engine

RESULT = Path(__file__).parent / "results" / "push_cost.json"
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def packing_clock() -> list[float]:
    """One number: the seconds of processor time that packing takes from now on, added up."""
    from align.rollout import vllm_weights

    pack, spent = vllm_weights.dispatch_cpu_unquantized_gemm, [0.0]

    def clocked(module, remove_weight):
        start = time.process_time()
        pack(module, remove_weight=remove_weight)
        spent[0] += time.process_time() - start

    vllm_weights.dispatch_cpu_unquantized_gemm = clocked
    return spent


def measure(backend: str, lora: bool, pushes: int) -> dict:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None))
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    engine = make_engine(model, backend=backend, max_model_len=192, max_num_seqs=4)
    seconds, packing = [], []
    clock = packing_clock() if backend == "vllm" else [0.0]
    for version in range(1, pushes + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1e-4)
        start, clock[0] = time.process_time(), 0.0
        report = engine.push(model, version)
        seconds.append(round(time.process_time() - start, 4))
        packing.append(round(clock[0], 4))
    engine.close()
    return {
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
        "packing": packing,
        "proved_tensors": report.proved_tensors,
        "arrived_share": report.arrived_share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    load = [round(os.getloadavg()[0], 1)]
    all_weights, adapter = (measure(args.backend, lora, args.pushes) for lora in (False, True))
    report = {
        "backend": args.backend,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "load_average": [*load, round(os.getloadavg()[0], 1)],  # before and after
        "all_weights": all_weights,
        "adapter": adapter,
        "model": SHAPE,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
