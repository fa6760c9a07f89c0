"""A tiny policy, rows of every kind, reward models, and the commands of every method on them."""

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data import toy

STEPS = 6
COMMON = (
    f"--max_steps {STEPS} --save_strategy steps --save_steps 2 --logging_steps 1 --learning_rate 5e-3 --report_to none "
    "--use_cpu --disable_tqdm true --per_device_train_batch_size 4"
)
PAIRS = "--max_length 32 --dataset_name {world}/pairs.jsonl"
PROMPTS = (
    "--dataset_name {world}/prompts.jsonl --max_prompt_length 16 --max_completion_length 6 --rollout.backend "
    "transformers --eval_strategy steps --eval_steps 2 --eval_on_start false "
    "--eval_dataset_name {world}/eval_prompts.jsonl --dataset_test_split train"
)
GOLD = ["--gold_reward", '{"type": "rule", "function": "align.data.toy:gold"}']
REWARDS = ["--rewards", '[{"type": "rule", "function": "align.data.toy:gold"}]']
HELD = [
    "--rewards",
    '[{"type": "rule", "function": "align.data.toy:gold_helpfulness"}, '
    '{"type": "rule", "function": "align.data.toy:gold_courtesy"}]',
    "--constraints",
    '[{"reward": "gold_courtesy", "direction": "at_least", "threshold": 0.3}]',
]
LORA = "--use_peft --lora_r 4 --lora_dropout 0.1 --lora_target_modules all-linear"
SEVERAL = "--num_mini_batches 2 --num_iterations 2"
VLLM = "--rollout.backend vllm"
FSDP2: Any = {"processes": 2, "setup": "fsdp2", "area": "fsdp2"}


@dataclass(frozen=True)
class Run:
    """One line of the kills: a method's command. processes: more than one run under gloo. setup: of `align launch`.
    area: of the campaign that kills it."""

    method: str
    options: str
    tokens: list[str] = field(default_factory=list)
    processes: int = 1
    setup: str = "ddp"
    area: str = "kills"


RUNS = {
    "sft": Run("sft", "--max_length 32 --dataset_name {world}/completions.jsonl"),
    "sft, LoRA": Run("sft", f"--max_length 32 --dataset_name {{world}}/completions.jsonl {LORA}"),
    "sft, two processes": Run("sft", "--max_length 32 --dataset_name {world}/completions.jsonl", processes=2),
    "sft, selected tokens": Run(
        "sft",
        "--max_length 32 --dataset_name {world}/completions.jsonl --selective_tokens 0.5 "
        "--ref_model_name_or_path {world}/reference",
    ),
    "sft, implicit rewards, LoRA": Run(
        "sft", f"--max_length 32 --dataset_name {{world}}/completions.jsonl --implicit_reward_beta 0.1 {LORA}"
    ),
    "reward": Run("reward", PAIRS),
    "reward, three members": Run("reward", f"{PAIRS} --ensemble 3 --max_steps 4"),
    "reward, three adapters": Run("reward", f"{PAIRS} --ensemble 3 --ensemble_kind lora --use_peft --lora_r 4"),
    "dpo, cached reference": Run("dpo", f"{PAIRS} --precompute_ref_log_probs"),
    "dpo, LoRA": Run("dpo", f"{PAIRS} {LORA}"),
    "dpo, two processes": Run("dpo", PAIRS, processes=2),
    "kto": Run("kto", "--max_length 32 --dataset_name {world}/labelled.jsonl"),
    "kto, LoRA, cached reference": Run(
        "kto", f"--max_length 32 --dataset_name {{world}}/labelled.jsonl --precompute_ref_log_probs {LORA}"
    ),
    "listwise_dpo": Run("listwise_dpo", "--max_length 32 --dataset_name {world}/rankings.jsonl"),
    "dpo, two datasets, a reference that follows": Run(
        "dpo",
        "--max_length 32 --sync_ref_model --ref_model_sync_steps 2",
        ["--datasets", "[{path: {world}/pairs.jsonl}, {path: {world}/further.jsonl, weight: 0.5}]"],
    ),
    "sparsepo": Run("sparsepo", PAIRS),
    "srpo": Run("srpo", PAIRS),
    "modpo": Run("modpo", f"{PAIRS} --objective better", [*REWARDS, "--weights", "{better: 0.5, gold: 0.5}"]),
    "modpo, a sweep": Run(
        "modpo", f"{PAIRS} --objective better --weights sweep --sweep_points 2 --max_steps 4 {LORA}", REWARDS
    ),
    "remax": Run("remax", PROMPTS, [*REWARDS, *GOLD]),
    "ppo": Run("ppo", f"{PROMPTS} {SEVERAL}", REWARDS),
    "ppo, two processes": Run("ppo", f"{PROMPTS} {SEVERAL}", REWARDS, processes=2),
    "rloo, constrained": Run("rloo", f"{PROMPTS} --num_generations 2 --beta 0.1 {SEVERAL}", HELD),
    "grpo": Run("grpo", f"{PROMPTS} --num_generations 2", [*REWARDS, *GOLD]),
    "reinforce_pp": Run("reinforce_pp", PROMPTS, REWARDS),
    "online_dpo": Run("online_dpo", f"{PROMPTS} --num_generations 3 {SEVERAL}", [*REWARDS, *GOLD]),
    "d2po": Run(
        "d2po",
        f"{PROMPTS} --num_generations 2 --gold_labels 4 --gold_label_every 1 {SEVERAL}",
        ["--rewards", '[{"type": "classifier", "path": "{world}/discriminator"}]', *GOLD],
    ),
    "metaapo": Run(
        "metaapo",
        f"{PROMPTS} --num_generations 2 --meta_every 3 --dataset_name {{world}}/pairs.jsonl {SEVERAL}",
        [*REWARDS, *GOLD],
    ),
    "remax, vLLM": Run("remax", f"{PROMPTS} {VLLM}", [*REWARDS, *GOLD], area="vllm"),
    "ppo, vLLM": Run("ppo", f"{PROMPTS} {VLLM} {SEVERAL}", REWARDS, area="vllm"),
    "grpo, LoRA, vLLM": Run("grpo", f"{PROMPTS} {VLLM} --num_generations 2 {LORA}", REWARDS, area="vllm"),
    "sft, FSDP2": Run("sft", "--max_length 32 --dataset_name {world}/completions.jsonl", **FSDP2),
    "dpo, FSDP2": Run("dpo", PAIRS, **FSDP2),
    "ppo, FSDP2": Run("ppo", f"{PROMPTS} {SEVERAL}", REWARDS, **FSDP2),
    "quickstart": Run("quickstart", "", area="quickstart"),
}


def command(name: str, world: Path, output: Path, *further: str) -> list[str]:
    """`align ...` of a line of the table."""
    run = RUNS[name]
    if run.method == "quickstart":
        return ["quickstart", "--small", "--output_dir", str(output), *further]
    words = f"{COMMON} --model_name_or_path {world}/policy {run.options}".format(world=world).split()
    found: dict[str, list[str]] = {}  # a later option replaces an earlier one
    for word in [*words, *(token.replace("{world}", str(world)) for token in run.tokens)]:
        if word.startswith("--"):
            found[word] = []
            last = word
        else:
            found[last].append(word)
    options = [word for key, values in found.items() for word in (key, *values)]
    return [run.method, *options, "--output_dir", str(output), "--resume_from_checkpoint", "auto", *further]


def train(argv: list[str]) -> int:
    """What `align ...` does, but that an AlignError comes out of it."""
    from align.cli.main import build_parser

    args, extra = build_parser().parse_known_args(argv)
    return args.run(args, extra)


def make(folder: Path, seed: int) -> Path:
    """The policy, the rows, and a saved ensemble of two reward models, in `folder`."""
    from align.modeling.load import load_sequence_classifier
    from align.quickstart.phases import make_policy

    tokenizer = toy.tokenizer()
    for number, name in enumerate(("policy", "reference")):
        made = make_policy(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=number)
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    classifier = load_sequence_classifier(str(folder / "policy"), head_seed=0, pad_token_id=tokenizer.pad_token_id)
    classifier.save_pretrained(folder / "discriminator")
    tokenizer.save_pretrained(folder / "discriminator")
    train_rows, test_rows = toy.split_prompts(seed, 24, 5)
    demonstrations, others = toy.reference_text(train_rows, 1, seed), toy.reference_text(train_rows, 1, seed + 1)
    pairs = [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"], "topic": a["topic"]}
        for a, b in zip(demonstrations, others, strict=True)
        if a["completion"] != b["completion"]
    ]
    labelled = [
        {
            "prompt": row["prompt"],
            "completion": row["completion"],
            "label": toy.gold_score(row["topic"], row["completion"]) > 1,
        }
        for row in (*demonstrations, *others)
    ]
    rankings = [
        {
            "prompt": pair["prompt"],
            "completions": [pair["rejected"], pair["chosen"], pair["chosen"][:9]],
            "scores": scores,
        }
        for pair, scores in zip(pairs, ([0, 2, 1], [1, 2, 0]) * len(pairs), strict=False)
    ]
    for name, rows in {
        "completions": demonstrations,
        "pairs": pairs,
        "further": pairs[::-2],
        "labelled": labelled,
        "rankings": rankings,
        "prompts": train_rows,
        "eval_prompts": test_rows,
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def draw(seed: int, area: str) -> random.Random:
    """The random numbers of an area: the same whatever else is tried."""
    return random.Random(f"{area} {seed}")
