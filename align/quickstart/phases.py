"""The phases on the toy world. Each reads files of the earlier ones, writes its own, and returns what the report
shows."""

import random
from collections.abc import Callable
from functools import partial

import align
from align.data import toy
from align.quickstart.parts import quiet, read_rows, remax_run, scored_answers, train_member, write_rows
from align.quickstart.progress import PhaseHandle
from align.quickstart.settings import Settings
from align.quickstart.workspace import Workspace

GOLD = {"type": "rule", "function": "align.data.toy:gold", "name": "gold"}


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
    write_rows(space.path("data", "train_prompts.jsonl"), train)
    write_rows(space.path("data", "eval_prompts.jsonl"), evaluation)
    text = toy.reference_text(train, settings.sft_rows_per_prompt, seed, settings.longest_text)
    write_rows(space.path("data", "reference_text.jsonl"), text)
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
        **quiet(),
    )
    trainer = align.SFTTrainer(
        make_policy(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed),
        args,
        read_rows(space.path("data", "reference_text.jsonl")),
        processing_class=tokenizer,
        callbacks=[handle.callback()],
    )
    output = trainer.train()
    trainer.save_model()
    return {"steps": output.global_step, "loss": output.training_loss, "rows": len(text)}


def pairs(space: Workspace, settings: Settings, seed: int, handle: PhaseHandle) -> dict:
    """Preference pairs: two answers of the policy each. Those to train on are judged by annotators in turn, and a fixed
    share of their labels is flipped; those to evaluate on are judged by gold."""
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
    words = toy.favourite_words(settings.members, seed)
    judges: dict[str, list[Callable[[str, str], float]]] = {
        "train": [partial(toy.annotator_score, word=word, fondness=settings.fondness) for word in words],
        "eval": [toy.gold_score],
    }
    counts = {}
    try:
        for part, wanted in (("train", settings.pairs), ("eval", settings.eval_pairs)):
            prompts = tokenize_prompts(
                read_rows(space.path("data", f"{part}_prompts.jsonl")),
                tokenizer,
                max_prompt_length=settings.max_prompt_length,
            )
            drawn = random.Random(f"pairs {part} {seed}").choices(range(len(prompts)), k=3 * wanted // 2)  # some tie
            chosen_rows = [prompts[i] for i in drawn]
            rollouts = engine.generate(
                [row["prompt_ids"] for row in chosen_rows],
                align.SamplingParams(max_tokens=settings.max_completion_length, n=2),
            )
            answers = [
                [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in rollout.completions]
                for rollout in rollouts
            ]
            rows = judged(chosen_rows, answers, judges[part])[:wanted]
            write_rows(space.path("data", f"{part}_pairs.jsonl"), rows)
            counts[part] = len(rows)
            handle.update(0.5 if part == "train" else 0.9)
    finally:
        engine.close()
    clean = read_rows(space.path("data", "train_pairs.jsonl"))
    noisy, flipped = flip_labels(clean, settings.label_noise, seed)
    noisy.to_json(space.path("data", "train_pairs_noisy.jsonl"))
    save_flips(space.path("data", "flipped_labels.json"), flipped, share=settings.label_noise, seed=seed)
    return {"pairs": counts["train"], "eval_pairs": counts["eval"], "flipped": len(flipped), "words": words}


def judged(prompts: list[dict], answers: list[list[str]], judges: list[Callable[[str, str], float]]) -> list[dict]:
    """Pairs of the two answers to each prompt; row i is by judge i mod their number, a function of topic and answer.
    Empty answers and ties, which have no better answer, are left out."""
    rows: list[dict] = []
    for prompt, (one, other) in zip(prompts, answers, strict=True):
        judge, topic = judges[len(rows) % len(judges)], prompt["topic"]
        worse, better = sorted((one, other), key=partial(judge, topic))
        if worse and better and judge(topic, worse) < judge(topic, better):
            rows.append({"prompt": prompt["prompt"], "topic": topic, "chosen": better, "rejected": worse})
    return rows


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
        **quiet(),
    )
    evaluation = read_rows(space.path("data", "eval_pairs.jsonl"))
    rows = read_rows(space.path("data", "train_pairs_noisy.jsonl"))
    if settings.own_pairs:
        rows = rows.select(range(index, len(rows), settings.members))
    return train_member(index, space.path("sft"), args, rows, evaluation, settings.members, handle)


def best_of_n(space: Workspace, settings: Settings, seed: int, handle: PhaseHandle) -> dict:
    return scored_answers(space.path("sft"), GOLD, space, settings, seed)


def remax(name: str, space: Workspace, settings: Settings, seed: int, handle: PhaseHandle) -> dict:
    return remax_run(name, space.path("sft"), GOLD, space, settings, seed, handle)
