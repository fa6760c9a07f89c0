"""What is tried of a model type: each stage trains as a user would, and measures what has to agree.

A stage returns what it measured, lets the `AlignError` of a refusal out, or raises `Unlike` for numbers that differ.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from align.data import toy
from align.modeling.load import load_policy
from align.modeling.logprobs import token_logps
from align.modeling.pretrained import causal_class, pretrained_config
from align.trainers.dpo import DPOTrainer
from align.trainers.reward import RewardTrainer
from align.trainers.rloo import RLOOTrainer
from align.trainers.sft import SFTTrainer
from benchmarks.tiny.configs import tiny_config, tiny_model
from tests.trainers import reward_runs
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import demonstrations, logged, on_policy, prompts, sft_config, wanted_words

IDS = torch.tensor([[5, 9, 14, 7, 3, 11, 20, 4], [6, 8, 13, 7, 0, 0, 0, 0]])
LENGTHS = (8, 4)
EXACT = 1e-4
"""Nats of a token's log-prob by which float32 may round one and the same model."""


class Unlike(Exception):
    """Two numbers that should be one."""


class Warnings(logging.Handler):
    """Keeps what the library warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        logging.getLogger("align").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def why_padded(self) -> str | None:
        start, end = "prompts are computed once per completion: ", " (`batching: padded`"
        found = (text.partition(start)[2].partition(end)[0] for text in self.said if start in text)
        return next(found, None)


def tokenizer() -> Any:
    """The toy world's, with a token for the start, which some configurations must have."""
    made = toy.tokenizer()
    made.bos_token = made.convert_ids_to_tokens(1)
    return made


def agree(what: str, found: Tensor, wanted: Tensor, allowed: float = EXACT) -> float:
    """Their largest difference."""
    if not (found.isfinite().all() and wanted.isfinite().all()):
        raise Unlike(f"{what}: not all are finite")
    difference = (found - wanted).abs().max().item()
    if difference > allowed:
        raise Unlike(f"{what} differ by {difference:.2g}, and {allowed:.1g} is allowed")
    return difference


@torch.no_grad()
def alone(model: Any) -> Tensor:
    """Log-probs of the tokens of `IDS` as transformers computes each row by itself, [10]."""
    model.eval()
    found = []
    for row, length in zip(IDS, LENGTHS, strict=True):
        logps = model(row[None, :length]).logits.float().log_softmax(-1)
        found.append(logps[0, :-1].gather(-1, row[1:length, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def padded(model: Any) -> Tensor:
    """The same as the library computes both rows in one batch."""
    mask = torch.tensor([[int(i < length) for i in range(IDS.shape[1])] for length in LENGTHS])
    logps = token_logps(model.eval(), IDS, mask)
    return torch.cat([row[: length - 1] for row, length in zip(logps, LENGTHS, strict=True)])


# ---- stages ---------------------------------------------------------------------------------------------------------


def make_model(kind: str, folder: str) -> dict[str, Any]:
    """A folder of the model, which our loader reads as it was."""
    config = tiny_config(kind)
    model = tiny_model(config, causal_class(config), **_with_soft_caps(config))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    loaded = load_policy(folder)
    agree("log-probs of the model and of what is loaded from its folder", alone(loaded), alone(model))
    agree("log-probs of rows alone and padded", padded(loaded), alone(loaded))
    return {"class": type(loaded).__name__, "parameters": sum(p.numel() for p in loaded.parameters())}


def sft(model: str, out: Path) -> dict[str, Any]:
    trainer = SFTTrainer(model, sft_config(out), demonstrations(16), processing_class=tokenizer())
    return _trained(trainer, model, out)


def dpo(model: str, out: Path, *, lora: bool = False, **options: Any) -> dict[str, Any]:
    heard = Warnings()
    peft = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear") if lora else None
    args = dpo_config(out, **({"learning_rate": 1e-2} if lora else {}), **options)
    trainer = DPOTrainer(model, args, toy_pairs(16), processing_class=tokenizer(), peft_config=peft)
    found = _trained(trainer, model, out) | {
        "gradients": logged(trainer, "grad_norm"),
        "chosen": logged(trainer, "logps/chosen"),
        "why padded": heard.why_padded(),
        "warnings": [text.split(".")[0] for text in heard.said if "got no gradient" in text],
    }
    if lora:
        adapted = (name for name, _ in trainer.model.named_modules() if name.endswith(".lora_A"))
        found["adapted"] = sorted(
            {name.removesuffix(".lora_A").removesuffix(".base_layer").rpartition(".")[2] for name in adapted}
        )
    return found


def reward(model: str, out: Path, **options: Any) -> dict[str, Any]:
    heard = Warnings()
    args = reward_runs.config(out, max_steps=2, logging_steps=1, learning_rate=1e-3, max_length=32, **options)
    trainer = RewardTrainer(model, args, toy_pairs(16), processing_class=tokenizer())
    trainer.train()
    trainer.save_model()
    capped = _with_soft_caps(trainer.model.config)
    with torch.no_grad():
        live = trainer.model.eval()(IDS[:1]).logits
        loaded = AutoModelForSequenceClassification.from_pretrained(out, **capped).eval()(IDS[:1]).logits
    gap = agree("scores of what was trained and of what was saved", loaded, live)
    return {"losses": logged(trainer, "loss"), "saved": gap, "why padded": heard.why_padded()}


def rloo(model: str, out: Path) -> dict[str, Any]:
    _, args = on_policy("rloo", out, rollout={"backend": "transformers"})
    trainer = RLOOTrainer(model, wanted_words, args, prompts(16), processing_class=tokenizer())
    trainer.train()
    trainer.close()
    gaps = logged(trainer, "rollout/mean_abs_logp_diff")
    agree("log-probs of rollouts and of the trainer", torch.tensor(gaps), torch.zeros(len(gaps)))
    return {"losses": logged(trainer, "loss"), "engine": max(gaps)}


def _with_soft_caps(config: Any) -> dict[str, str]:
    """Options with which transformers computes Gemma 2's soft caps, which its own SDPA leaves out."""
    capped = vars(config.get_text_config()).get("attn_logit_softcapping")
    return {} if capped is None else {"attn_implementation": "eager"}


def _trained(trainer: Any, model: str, out: Path) -> dict[str, Any]:
    """Train and save; the folder, loaded by transformers (and PEFT) and by us, has the log-probs of what is trained."""
    before = alone(load_policy(model))
    trainer.train()
    trainer.save_model()
    # without the autocast of mixed precision
    live = alone(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    if not (live - before).abs().max() > EXACT:
        raise Unlike("two steps have not changed its log-probs")
    config = pretrained_config(model, "model")
    auto = partial(causal_class(config).from_pretrained, **_with_soft_caps(config))
    adapter = (out / "adapter_config.json").exists()
    theirs = PeftModel.from_pretrained(auto(model), out) if adapter else auto(out)
    gaps = [
        agree(f"log-probs of what was trained and of what {who} loads", alone(loaded), live)
        for who, loaded in (("transformers or PEFT", theirs), ("align", load_policy(out)))
    ]
    return {"losses": logged(trainer, "loss"), "saved": max(gaps)}


# ---- stages against each other --------------------------------------------------------------------------------------


def same_steps(one: dict, other: dict) -> dict[str, float]:
    """Losses and gradient norms of the same two steps: those of the first but for rounding, of the second but for what
    Adam makes of it."""
    found = {}
    for name in ("losses", "gradients"):
        if name in one:
            a, b = torch.tensor(one[name]), torch.tensor(other[name])
            relative = (a - b) / b.abs().clamp(min=1.0)
            for step, allowed in ((0, 5e-5), (1, 2e-3)):
                what = f"{name} of step {step + 1}, shared prompts against padded pairs,"
                found[f"{name}, step {step + 1}"] = agree(what, relative[step], torch.zeros(()), allowed)
    return found


def close_in_bfloat16(found: dict, float32: dict) -> dict[str, float]:
    """Before the first step: the log-probs of the chosen answers."""
    a, b = torch.tensor(found["chosen"][0]), torch.tensor(float32["chosen"][0])
    return {"logps": agree("log-probs of answers in bfloat16 and in float32, relative,", a / b, torch.ones(()), 0.02)}
