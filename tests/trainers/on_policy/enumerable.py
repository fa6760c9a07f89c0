"""A world of six words and two tokens at most, where the exact gradient is a sum over every completion."""

import itertools

import torch
from datasets import Dataset

from align.trainers.on_policy.batches import collate
from align.trainers.on_policy.streams import fill_advantages
from tests.trainers.tiny_runs import on_policy, tiny_model


def rolled_out(trainer, count: int = 4):
    """Samples and the completions of further requests of the first prompts, by the trainer's own loop."""
    trainer.sync_engine()
    return rolled_out_for(trainer, trainer.state.global_step, count)


def rolled_out_for(trainer, step: int, count: int):
    """The same for a step, whose draws are its own, with the weights that the engine has."""
    rows = [trainer.train_dataset[i] for i in range(count)]
    rollout = trainer.pipeline.run(rows, list(range(count)), step, weight_version=trainer.engine.step)
    samples = rollout.samples
    if trainer.args.beta:
        trainer.forward.fill([samples], "ref_logps", trainer.forward.reference_logps(trainer.reference))
    if trainer.critic is not None:
        trainer.forward.fill([samples], "values", trainer.critic.values)
    beta = trainer.kl.value if trainer.args.kl_in == "reward" else 0.0
    fill_advantages(rollout, trainer.estimator, trainer.weighting, trainer.ranks, beta)
    return samples, rollout.extra


def small_world(tmp_path, method: str = "remax", **options):
    """The method's trainer; 64 samples per prompt, the loss that is the policy gradient itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    rows = Dataset.from_dict({"prompt": ["a b ", "c d e "]})
    sizes = {"max_completion_length": 2, "num_generations": 64, "beta": 0.2, "loss_aggregation": "sequence_sum"}
    trainer_class, args = on_policy(method, tmp_path, **{**sizes, **options})
    model, reference = tiny_model(tokenizer, seed=3), tiny_model(tokenizer, seed=4)
    trainer = trainer_class(model, some_reward, args, rows, processing_class=tokenizer, ref_model=reference)
    trainer.model.eval()
    return trainer


def some_reward(prompt_ids, completion_ids, **columns):
    return [
        float((3 * p[0] + 5 * c[0] + 7 * c[-1] + 2 * len(c)) % 11) / 5
        for p, c in zip(prompt_ids, completion_ids, strict=True)
    ]


def exact_gradient(trainer) -> torch.Tensor:
    """Of -(E[r] - beta KL(pi || ref)), mean over prompts, by summing over all completions."""
    completions = [[0], *([x, y] for x, y in itertools.product(range(1, 6), range(6)))]
    objective = 0.0
    for row in trainer.train_dataset:
        prompt = row["prompt_ids"]
        for completion in completions:
            ids = torch.tensor([prompt + completion])
            models = (trainer.model, trainer.reference.model) if trainer.args.beta else (trainer.model,) * 2
            logps = [
                m(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
                for m in models
            ]
            value = some_reward([prompt], [completion])[0] - trainer.args.beta * (logps[0] - logps[1].detach())
            objective = objective + logps[0].exp() * value / len(trainer.train_dataset)
    return flat(torch.autograd.grad(-objective, list(trainer.model.parameters()), allow_unused=True), trainer)


def flat(gradients, trainer) -> torch.Tensor:
    parameters = trainer.model.parameters()
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gradients, parameters, strict=True)]
    )


def estimates(trainer, count: int = 40) -> torch.Tensor:
    """Gradients [count, parameters] from so many rollouts of the same weights, by the trainer's own loss."""
    trainer.sync_engine()
    found = []
    for step in range(1, count + 1):
        samples, _ = rolled_out_for(trainer, step, count=2)
        loss = trainer.compute_loss(trainer.model, collate(samples, 0), num_items_in_batch=torch.tensor(len(samples)))
        found.append(flat(torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True), trainer))
    return torch.stack(found).double()


def deviations(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Standard errors between the mean estimate and the exact gradient: in its direction, and in 50 random ones."""
    exact = exact.double()
    directions = torch.randn(50, len(exact), generator=torch.Generator().manual_seed(0)).double()
    directions = torch.cat([exact[None] / exact.norm(), directions / len(exact) ** 0.5])
    along = found @ directions.T
    return (along.mean(0) - directions @ exact) / (along.std(0) / len(found) ** 0.5)
