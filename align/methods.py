"""The one table of training methods, read by the command line, the configs and `align.__getattr__`.

Trainers are named as strings, so that nothing is imported before it is used. A new method is one entry.
"""

import difflib
from dataclasses import dataclass

from align.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """One training method.

    trainer, config: `"module:Class"`. data: what rows are made into, `"prompts"`, `"completions"`, `"pairs"`,
    `"ranked"` or `"unpaired"` (the functions `align.data.tokenize_*`). model: `"policy"` (a causal language model) or
    `"classifier"` (one score).
    rewards: whether the file has `rewards:`; gold: whether it may have `gold_reward:` then. offline_pairs: whether the
    rows to train on are pairs, whose prompts are completed beside. ensemble: what trains several models, for a method
    that has the key `ensemble`. sweep: what trains one policy per weight vector, for a method that has the key
    `weights`.
    """

    name: str
    trainer: str
    config: str
    data: str
    help: str
    model: str = "policy"
    rewards: bool = False
    gold: bool = True
    offline_pairs: bool = False
    ensemble: str | None = None
    sweep: str | None = None


METHODS = {
    method.name: method
    for method in (
        Method(
            "sft",
            trainer="align.trainers.sft:SFTTrainer",
            config="align.trainers.sft:SFTConfig",
            data="completions",
            help="supervised fine-tuning on demonstrations",
        ),
        Method(
            "reward",
            trainer="align.trainers.reward:RewardTrainer",
            config="align.trainers.reward:RewardConfig",
            data="pairs",
            model="classifier",
            ensemble="align.trainers.sweeps.ensemble:train_reward_ensemble",
            help="a reward model from preference pairs (Bradley-Terry)",
        ),
        Method(
            "dpo",
            trainer="align.trainers.dpo:DPOTrainer",
            config="align.trainers.dpo:DPOConfig",
            data="pairs",
            help="preference optimisation without a reward model: the losses of DPO, IPO, SimPO, ORPO, TDPO and others",
        ),
        Method(
            "kto",
            trainer="align.trainers.kto:KTOTrainer",
            config="align.trainers.kto:KTOConfig",
            data="unpaired",
            help="preference optimisation on answers that are labelled good or bad on their own (KTO)",
        ),
        Method(
            "listwise_dpo",
            trainer="align.trainers.listwise_dpo:ListwiseDPOTrainer",
            config="align.trainers.listwise_dpo:ListwiseDPOConfig",
            data="ranked",
            help="preference optimisation on ranked lists of answers (DPO under Plackett-Luce)",
        ),
        Method(
            "srpo",
            trainer="align.trainers.srpo:SRPOTrainer",
            config="align.trainers.srpo:SRPOConfig",
            data="pairs",
            help="a policy that answers, and improves answers that it is shown, from pairs (SRPO)",
        ),
        Method(
            "modpo",
            trainer="align.trainers.modpo:MODPOTrainer",
            config="align.trainers.modpo:MODPOConfig",
            data="pairs",
            help="preference optimisation of a weighted sum of objectives, or of the whole front (MODPO)",
            rewards=True,
            gold=False,
            sweep="align.trainers.sweeps.front:train_front",
        ),
        Method(
            "sparsepo",
            trainer="align.trainers.sparsepo:SparsePOTrainer",
            config="align.trainers.sparsepo:SparsePOConfig",
            data="pairs",
            help="preference optimisation with a weight per token, learned or from activations (SparsePO, MaPO)",
        ),
        Method(
            "remax",
            trainer="align.trainers.remax:ReMaxTrainer",
            config="align.trainers.remax:ReMaxConfig",
            data="prompts",
            help="policy gradient on rewards, with the greedy completion as baseline (ReMax)",
            rewards=True,
        ),
        Method(
            "ppo",
            trainer="align.trainers.ppo:PPOTrainer",
            config="align.trainers.ppo:PPOConfig",
            data="prompts",
            help="clipped policy gradient with a critic (PPO)",
            rewards=True,
        ),
        Method(
            "rloo",
            trainer="align.trainers.rloo:RLOOTrainer",
            config="align.trainers.rloo:RLOOConfig",
            data="prompts",
            help="policy gradient on rewards, against the mean of the prompt's other samples (RLOO)",
            rewards=True,
        ),
        Method(
            "grpo",
            trainer="align.trainers.grpo:GRPOTrainer",
            config="align.trainers.grpo:GRPOConfig",
            data="prompts",
            help="policy gradient on rewards relative to the prompt's group (GRPO, Dr. GRPO, DAPO)",
            rewards=True,
        ),
        Method(
            "reinforce_pp",
            trainer="align.trainers.reinforce_pp:ReinforcePPTrainer",
            config="align.trainers.reinforce_pp:ReinforcePPConfig",
            data="prompts",
            help="policy gradient on rewards whitened over the batch (REINFORCE++)",
            rewards=True,
        ),
        Method(
            "online_dpo",
            trainer="align.trainers.online_dpo:OnlineDPOTrainer",
            config="align.trainers.online_dpo:OnlineDPOConfig",
            data="prompts",
            help="preference optimisation on pairs that the policy writes and rewards rank (online DPO)",
            rewards=True,
        ),
        Method(
            "d2po",
            trainer="align.trainers.d2po:D2POTrainer",
            config="align.trainers.d2po:D2POConfig",
            data="prompts",
            rewards=True,
            help="online DPO whose reward model learns from a few gold labels as it goes (D2PO)",
        ),
        Method(
            "metaapo",
            trainer="align.trainers.metaapo:MetaAPOTrainer",
            config="align.trainers.metaapo:MetaAPOConfig",
            data="prompts",
            rewards=True,
            offline_pairs=True,
            help="DPO on offline pairs and on ones that the policy writes, mixed by a learned weight (MetaAPO)",
        ),
    )
}


def get_method(name: str) -> Method:
    """The method called `name`; ConfigError naming the valid ones otherwise."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        nearest = f"nearest: {near[0]}; " if near else ""
        raise ConfigError(f"there is no method {name!r}; {nearest}the methods are {', '.join(METHODS)}")
    return METHODS[name]
