"""Ensembles of reward models, trained on the same pairs: members differ in head and data order."""

import copy
import logging
from pathlib import Path

from align.errors import ConfigError
from align.modeling.load import load_tokenizer
from reward_models.ensemble import save_ensemble
from reward_models.normalizer import FILE_NAME as NORMALIZER_FILE
from trainers.base import finish_tracking
from trainers.reward import RewardConfig, RewardTrainer, tokenized_pairs

logger = logging.getLogger(__name__)


def train_reward_ensemble(
    model: str | Path,
    args: RewardConfig,
    train_dataset,
    eval_dataset=None,
    processing_class=None,
    *,
    members: int = 5,
    peft_config=None,
    callbacks=None,
    resume: bool = False,
) -> Path:
    """Train `members` reward models on the same pairs, tokenised once; member i has seed `args.seed + i`.

    The seed draws the head and the order of the data, nothing else (Coste et al. 2023). Saves
    `args.output_dir/member_<i>` and ensemble.json, and returns that folder, for `load_ensemble` or a reward of type
    ensemble. With `resume` a member that is already saved whole is kept, whatever settings it was trained with.
    """
    if members < 1:
        raise ConfigError(f"an ensemble needs at least one member, got {members}")
    processing_class = processing_class or load_tokenizer(model)
    train_dataset = tokenized_pairs(train_dataset, processing_class, args)
    if eval_dataset is not None:
        eval_dataset = tokenized_pairs(eval_dataset, processing_class, args)
    folder = Path(args.output_dir)
    for i in range(members):
        member = folder / f"member_{i}"
        if resume and (member / NORMALIZER_FILE).exists():
            logger.info("%s is there and kept", member)
            continue
        member_args = copy.deepcopy(args)
        member_args.output_dir = str(member)
        member_args.seed = member_args.data_seed = args.seed + i
        member_args.run_name = f"{args.run_name or folder.name}-member_{i}"
        trainer = RewardTrainer(
            str(model),
            member_args,
            train_dataset,
            eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        trainer.train()
        trainer.save_model()
        finish_tracking(member_args)
    if args.process_index == 0:
        save_ensemble(folder, [f"member_{i}" for i in range(members)])
    return folder
