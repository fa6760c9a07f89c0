"""The world and methods of benchmarks/modpo_front.py: policies, pairs of two objectives, and what trains on them."""

import random
import time
from pathlib import Path

import numpy as np
from datasets import Dataset

import align
from align.data import tokenize_prompts, toy
from align.evaluation.front import Front, Point, write_front
from align.modeling.load import load_policy, load_tokenizer
from align.quickstart.phases import make_policy
from align.reward_models.build import build_reward
from align.trainers.sweeps.front import point_name
from align.trainers.sweeps.loss_weighting import LossWeightingConfig, LossWeightingTrainer, soup_front

MAX_PROMPT, MAX_COMPLETION = 12, 17
BETA = 0.1
PAIRS = 4000
BATCH, EPOCHS, LEARNING_RATE = 64, 2, 2.5e-4  # the best of 2.5e-4 to 5e-4 and one to two passes, seeds 100 to 102
SOUPS = 3  # between neighbours of the sweep
# RL at its best, found with seed 100 and weights of one half (docs/modpo.md): with which rewards, and which settings
RM_LEARNING_RATE, RM_EPOCHS = 1e-3, {"helpful": 4, "short": 1}
RL_PROMPTS, RL_LEARNING_RATES, RL_ENGINE = 64, (1e-3, 2e-3), "transformers"  # the faster rate is less stable
RL_STEPS = PAIRS // RL_PROMPTS  # as many prompts as there are pairs
RL_EVERY, RL_MOST_STEPS = 4, 4 * RL_STEPS
NAMES = ("helpful", "short")


def helpful(completions, topic, **_) -> list[float]:
    return [toy.helpfulness(t, text) for t, text in zip(topic, completions, strict=True)]


def short(completions, **_) -> list[float]:
    return [-0.5 * len(text.split()) for text in completions]


def rewards() -> dict:
    return {"helpful": build_reward(helpful), "short": build_reward(short)}


def quiet(folder: Path, **options) -> dict:
    return {
        "output_dir": str(folder),
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "use_cpu": True,
        **options,
    }


def preference_options(folder: Path, seed: int) -> dict:
    return quiet(
        folder,
        beta=BETA,
        max_length=MAX_PROMPT + MAX_COMPLETION,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        precompute_ref_log_probs=True,
        seed=seed,
    )


# ---- the world ------------------------------------------------------------------------------------------------------


def make_world(folder: Path, seed: int) -> dict:
    """The reference policy, pairs labelled by each objective, and prompts for training and for judging."""
    train, evaluation = toy.split_prompts(seed, 256, 128)
    tokenizer = toy.tokenizer()
    args = align.SFTConfig(
        **quiet(folder / "sft", num_train_epochs=1, per_device_train_batch_size=32, learning_rate=5e-3, seed=seed),
        lr_scheduler_type="cosine",
        max_length=MAX_PROMPT + MAX_COMPLETION,
    )
    model = make_policy(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed)
    text = Dataset.from_list(toy.reference_text(train, 32, seed))
    trainer = align.SFTTrainer(model, args, text, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    answers = draw_pairs(folder / "sft", train, seed)
    return {"policy": str(folder / "sft"), "train": train, "eval": evaluation, "answers": answers}


def draw_pairs(policy: Path, prompts: list[dict], seed: int) -> list[dict]:
    """Two different answers to prompts drawn with replacement."""
    tokenizer = load_tokenizer(policy)
    tokenized = tokenize_prompts(Dataset.from_list(prompts), tokenizer, max_prompt_length=MAX_PROMPT)
    drawn = random.Random(f"pairs {seed}").choices(range(len(prompts)), k=2 * PAIRS)
    engine = align.make_engine(
        load_policy(policy), tokenizer, backend="transformers", max_model_len=MAX_PROMPT + MAX_COMPLETION, seed=seed
    )
    params = align.SamplingParams(max_tokens=MAX_COMPLETION, n=2)
    rollouts = engine.generate([tokenized[i]["prompt_ids"] for i in drawn], params)
    engine.close()
    rows = []
    for i, rollout in zip(drawn, rollouts, strict=True):
        a, b = (tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in rollout.completions)
        if a and b and a != b:
            rows.append({**prompts[i], "answers": [a, b]})
    assert len(rows) >= PAIRS, f"only {len(rows)} pairs of different answers"
    return rows[:PAIRS]


def label(rows: list[dict], objective: str, seed: int) -> Dataset:
    """Preference pairs: the first answer wins with probability sigmoid(r(first) - r(second))."""
    rng = random.Random(f"labels {objective} {seed}")
    score = {"helpful": toy.helpfulness, "short": lambda topic, text: short([text])[0]}[objective]
    pairs = []
    for row in rows:
        a, b = row["answers"]
        wins = 1 / (1 + np.exp(score(row["topic"], b) - score(row["topic"], a)))
        chosen, rejected = (a, b) if rng.random() < wins else (b, a)
        pairs.append({"prompt": row["prompt"], "topic": row["topic"], "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(pairs)


# ---- methods --------------------------------------------------------------------------------------------------------


def dpo(world: dict, objective: str, folder: Path, seed: int) -> Path:
    args = align.DPOConfig(**preference_options(folder, seed))
    trainer = align.DPOTrainer(world["policy"], args, world["pairs"][objective])
    trainer.train()
    trainer.save_model()
    return folder


def modpo(world: dict, margin: Path, folder: Path, seed: int) -> Path:
    """The sweep of `align modpo`: its last point is the margin policy, and soups lie between neighbours."""
    options = {**preference_options(folder, seed), "objective": "helpful", "weights": "sweep", "interpolate": SOUPS}
    spec = {"type": "implicit", "path": str(margin), "reference": world["policy"], "beta": BETA, "name": "short"}
    return align.train_front(world["policy"], spec, align.MODPOConfig(**options), world["pairs"]["helpful"])


def loss_weighting(world: dict, ends: dict[str, Path], vectors: list[dict], folder: Path, seed: int) -> Path:
    """As many steps as the others, each on twice as many pairs: every pair comes with both labels. With all weight on
    one objective it is DPO on that, which is there already."""
    points = []
    for weights in vectors:
        name = point_name(weights)
        (only,) = [n for n, weight in weights.items() if weight == 1] or [None]
        point = Point(name, str(ends[only].absolute()), weights) if only else Point(name, name, weights)
        points.append(point)
        if only is None:
            options = preference_options(folder / name, seed) | {"per_device_train_batch_size": 2 * BATCH}
            args = LossWeightingConfig(**options, objective="helpful", weights=weights)
            trainer = LossWeightingTrainer(world["policy"], args, world["pairs"])
            trainer.train()
            trainer.save_model()
    write_front(Front("dpo_lw", world["policy"], list(NAMES), points), folder)
    return folder


def soups(world: dict, policies: dict[str, Path], vectors: list[dict], folder: Path) -> Path:
    return soup_front(policies, vectors, folder, world["policy"])


def reward_model(world: dict, objective: str, folder: Path, seed: int) -> Path:
    """A classifier of the pairs of one objective, on top of the policy."""
    options = quiet(
        folder,
        max_length=MAX_PROMPT + MAX_COMPLETION,
        learning_rate=RM_LEARNING_RATE,
        lr_scheduler_type="cosine",
        num_train_epochs=RM_EPOCHS[objective],
        per_device_train_batch_size=BATCH,
        seed=seed,
    )
    trainer = align.RewardTrainer(world["policy"], align.RewardConfig(**options), world["pairs"][objective])
    trainer.train()
    trainer.save_model()
    return folder


def reinforce(
    world: dict,
    weights: dict,
    reward: list,
    rate: float,
    target: float,
    steps: tuple[int, int],
    folder: Path,
    seed: int,
) -> list[dict]:
    """ReMax on the weighted rewards, until an evaluation finds the target in the gold w . r - beta KL, within the
    least and the most steps. At every evaluation: the step, the weighted gold reward, the KL, and the seconds
    since training began, without those of the evaluations (and of the engine's start, which falls into the first)."""
    history, evaluating = [], np.zeros(2)

    def gold(completions, topic, **_) -> list[float]:
        columns = [helpful(completions, topic), short(completions)]
        return [sum(w * x for w, x in zip(weights.values(), row, strict=True)) for row in zip(*columns, strict=True)]

    def now() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    class Timed(align.ReMaxTrainer):
        def evaluate(self, *args, **kwargs):
            nonlocal evaluating
            before = now()
            wall, cpu = before - started - evaluating
            metrics = super().evaluate(*args, **kwargs)
            entry = {"step": self.state.global_step, "reward": metrics["eval_gold"], "kl": metrics["eval_kl"]}
            history.append({**entry, "wall": wall, "cpu": cpu})
            reached = any(objective(entry) >= target for entry in history)
            self.control.should_training_stop |= reached and self.state.global_step >= steps[0]
            evaluating = evaluating + now() - before
            return metrics

    args = align.ReMaxConfig(
        **quiet(folder, max_steps=steps[1], per_device_train_batch_size=RL_PROMPTS, learning_rate=rate),
        seed=seed,
        lr_scheduler_type="constant",
        beta=BETA,
        reward_weights=list(weights.values()),
        max_prompt_length=MAX_PROMPT,
        max_completion_length=MAX_COMPLETION,
        rollout=RL_ENGINE,
        per_device_eval_batch_size=256,
        eval_strategy="steps",
        eval_steps=RL_EVERY,
        eval_num_generations=4,
    )
    started = now()
    prompts = [Dataset.from_list(world[name]) for name in ("train", "eval")]
    trainer = Timed(world["policy"], reward, args, *prompts, gold_reward=gold)
    try:
        trainer.train()
        trainer.save_model()
    finally:
        trainer.close()
    return history


def objective(entry: dict) -> float:
    """w . r - beta KL of an evaluation of RL: what RL and MODPO both maximise."""
    return entry["reward"] - BETA * entry["kl"]
