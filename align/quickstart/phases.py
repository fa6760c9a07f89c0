"""The quickstart's phases. Each reads files of the earlier ones, writes its own, and returns what the report shows."""

import json
import random
from functools import partial
from pathlib import Path

import align
from align.data import toy
from align.quickstart.progress import PhaseHandle
from align.quickstart.settings import Settings
from align.quickstart.workspace import Workspace

RUNS: dict[str, dict] = {
    "single proxy": {"members": 1, "aggregation": "mean"},
    "worst case": {"aggregation": "wco"},
    "uncertainty-weighted": {"aggregation": "uwo"},
}
GOLD = {"type": "rule", "function": "align.data.toy:gold", "name": "gold"}


def _rows(path: Path):
    from align.data import load_rows

    return load_rows(path)


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _quiet(**options) -> dict:
    return {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1000, **options}


def make_policy(vocab_size: int, eos_token_id: int, pad_token_id: int, seed: int):
    """A two-layer Llama of about 100,000 parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # heads of 32: what vLLM's attention on CPUs supports
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def sft(space: Workspace, settings: Settings, seed: int, handle: PhaseHandle) -> dict:
    """A policy from scratch, by supervised fine-tuning on the reference text."""
    sizes = (settings.train_prompts, settings.eval_prompts)
    train, evaluation = toy.split_prompts(seed, *sizes, two_audiences=sum(sizes) > len(toy.prompts()))
    _write_rows(space.path("data", "train_prompts.jsonl"), train)
    _write_rows(space.path("data", "eval_prompts.jsonl"), evaluation)
    text = toy.reference_text(train, settings.sft_rows_per_prompt, seed)
    _write_rows(space.path("data", "reference_text.jsonl"), text)
    tokenizer = toy.tokenizer()
    args = align.SFTConfig(
        output_dir=str(space.path("sft")),
        num_train_epochs=1,
        per_device_train_batch_size=32,
        learning_rate=settings.sft_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        max_length=settings.max_prompt_length + settings.max_completion_length,
        seed=seed,
        **_quiet(),
    )
    trainer = align.SFTTrainer(
        make_policy(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed),
        args,
        _rows(space.path("data", "reference_text.jsonl")),
        processing_class=tokenizer,
        callbacks=[handle.callback()],
    )
    output = trainer.train()
    trainer.save_model()
    return {"steps": output.global_step, "loss": output.training_loss, "rows": len(text)}


def pairs(space: Workspace, settings: Settings, seed: int, handle: PhaseHandle) -> dict:
    """Preference pairs: two answers of the policy, labelled by the gold reward, a fixed share of the labels flipped."""
    from align.data import tokenize_prompts
    from align.data.noise import flip_labels, save_flips
    from align.modeling.load import load_policy, load_tokenizer

    model, tokenizer = load_policy(space.path("sft")), load_tokenizer(space.path("sft"))
    engine = align.make_engine(
        model,
        tokenizer,
        backend=settings.backend,
        max_model_len=settings.max_prompt_length + settings.max_completion_length,
        seed=seed,
    )
    counts = {}
    try:
        for part, wanted in (("train", settings.pairs), ("eval", settings.eval_pairs)):
            prompts = tokenize_prompts(
                _rows(space.path("data", f"{part}_prompts.jsonl")),
                tokenizer,
                max_prompt_length=settings.max_prompt_length,
            )
            drawn = random.Random(f"pairs {part} {seed}").choices(range(len(prompts)), k=3 * wanted // 2)  # some tie
            chosen_rows = [prompts[i] for i in drawn]
            rollouts = engine.generate(
                [row["prompt_ids"] for row in chosen_rows],
                align.SamplingParams(max_tokens=settings.max_completion_length, n=2),
            )
            rows = []
            for row, rollout in zip(chosen_rows, rollouts, strict=True):
                answers = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in rollout.completions]
                answers.sort(key=partial(toy.gold_score, row["topic"]))
                scores = [toy.gold_score(row["topic"], answer) for answer in answers]
                if answers[0] and answers[1] and scores[0] < scores[1]:  # a tie has no better answer
                    rows.append(
                        {"prompt": row["prompt"], "topic": row["topic"], "chosen": answers[1], "rejected": answers[0]}
                    )
            rows = rows[:wanted]
            path = space.path("data", f"{part}_pairs.jsonl")
            _write_rows(path, rows)
            counts[part] = len(rows)
            handle.update(0.5 if part == "train" else 0.9)
    finally:
        engine.close()
    clean = _rows(space.path("data", "train_pairs.jsonl"))
    noisy, flipped = flip_labels(clean, settings.label_noise, seed)
    noisy.to_json(space.path("data", "train_pairs_noisy.jsonl"))
    save_flips(space.path("data", "flipped_labels.json"), flipped, share=settings.label_noise, seed=seed)
    return {"pairs": counts["train"], "eval_pairs": counts["eval"], "flipped": len(flipped)}


def reward_model(index: int, space: Workspace, settings: Settings, seed: int, handle: PhaseHandle) -> dict:
    """A member of the ensemble, on top of the fine-tuned policy; its accuracy is on pairs without label noise."""
    args = align.RewardConfig(
        output_dir=str(space.path("reward_models")),
        num_train_epochs=settings.reward_epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=settings.reward_learning_rate,
        lr_scheduler_type="linear",
        score_l2_coefficient=0.001,
        max_length=settings.max_prompt_length + settings.max_completion_length,
        batching="padded",  # with prompts of six words nothing is gained by sharing them
        seed=seed * 100,
        **_quiet(),
    )
    evaluation = _rows(space.path("data", "eval_pairs.jsonl"))
    rows = _rows(space.path("data", "train_pairs_noisy.jsonl"))
    if settings.own_pairs:
        rows = rows.select(range(index, len(rows), settings.members))
    folder = align.train_reward_ensemble(
        space.path("sft"),
        args,
        rows,
        evaluation,
        members=settings.members,
        member=index,
        callbacks=[handle.callback()],
    )
    reward = align.build_reward({"type": "classifier", "path": str(folder / f"member_{index}")})
    better, worse = (
        reward.score(align.RewardBatch(prompts=evaluation["prompt"], completions=evaluation[side])).scores
        for side in ("chosen", "rejected")
    )
    return {"name": f"member {index}", "accuracy": (better > worse).float().mean().item(), "pairs": len(rows)}


def ensemble_spec(space: Workspace, settings: Settings, aggregation: str, members: int | None = None) -> dict:
    """The reward of a run: a saved ensemble, or its first member alone."""
    folder = space.path("reward_models")
    if members == 1:
        return {"type": "classifier", "path": str(folder / "member_0"), "name": "proxy"}
    spec = {"type": "ensemble", "path": str(folder), "aggregation": aggregation, "name": "proxy"}
    return {**spec, "lambda": settings.uncertainty_weight} if aggregation == "uwo" else spec


def best_of_n(space: Workspace, settings: Settings, seed: int, handle: PhaseHandle) -> dict:
    """`bon_n` answers per prompt, scored by every member and the gold reward: one table, from which all curves come."""
    from align.evaluation.scoring import sample_table

    def rewards(tokenizer) -> dict:
        members = {
            f"member_{i}": align.build_reward(
                {"type": "classifier", "path": str(space.path("reward_models", f"member_{i}")), "name": f"member_{i}"},
                tokenizer=tokenizer,
            )
            for i in range(settings.members)
        }
        return {**members, "gold": align.build_reward(GOLD)}

    path = sample_table(
        str(space.path("sft")),
        str(space.path("data", "eval_prompts.jsonl")),
        rewards,
        space.path("best_of_n", "answers.parquet"),
        n=settings.bon_n,
        num_prompts=settings.bon_prompts,
        max_prompt_length=settings.max_prompt_length,
        max_completion_length=settings.max_completion_length,
        backend=settings.backend,
        seed=seed,
    )
    return {"answers": settings.bon_prompts * settings.bon_n, "table": path.name}


def remax(name: str, space: Workspace, settings: Settings, seed: int, handle: PhaseHandle) -> dict:
    """One ReMax run against a proxy, the gold reward scored beside it."""
    folder = space.path("remax", name.replace(" ", "_"))
    args = align.ReMaxConfig(
        output_dir=str(folder),
        run_name=name,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts_per_step,
        per_device_eval_batch_size=128,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        beta=settings.beta,
        max_prompt_length=settings.max_prompt_length,
        max_completion_length=settings.max_completion_length,
        rollout=settings.backend,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        num_eval_prompts=settings.eval_prompts,
        eval_num_generations=settings.eval_samples,
        seed=seed,
        **_quiet(save_strategy="steps", save_steps=settings.eval_every, save_total_limit=1, save_only_model=False),
    )
    from align.distributed.checkpoints import newest_whole

    trainer = align.ReMaxTrainer(
        str(space.path("sft")),
        ensemble_spec(space, settings, **RUNS[name]),
        args,
        _rows(space.path("data", "train_prompts.jsonl")),
        _rows(space.path("data", "eval_prompts.jsonl")),
        gold_reward=GOLD,
        callbacks=[handle.callback()],
    )
    try:
        trainer.train(resume_from_checkpoint=folder.exists() and newest_whole(folder) is not None)
        trainer.save_model()
    finally:
        trainer.close()
    return {"run": str(folder.relative_to(space.folder)), "steps": settings.steps}
