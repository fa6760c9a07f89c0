"""Which prompts a rollout takes, and what an on-policy run keeps beyond model and optimiser."""

import logging

from align.errors import ConfigError, TrainingError
from align.trainers.on_policy.buffer import BlockSampler, RolloutBuffer

logger = logging.getLogger(__name__)


class OnPolicyState:
    """Of an on-policy trainer."""

    def prompts_per_rollout(self) -> int:
        args = self.args
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return per_step * args.num_mini_batches

    def _get_train_sampler(self, train_dataset=None):
        if self.args.steps_per_rollout == 1:
            return super()._get_train_sampler(train_dataset)
        rows, block = len(self.train_dataset), self.prompts_per_rollout()
        steps_per_epoch = rows // block * self.args.steps_per_rollout
        return BlockSampler(
            rows, block, self.args.num_iterations, self.args.seed, lambda: self.state.global_step // steps_per_epoch
        )

    def check_arithmetic(self) -> None:
        """Say what a rollout is made of; raises `ConfigError` when there are fewer prompts than one takes."""
        args, prompts = self.args, self.prompts_per_rollout()
        if len(self.train_dataset) < prompts:
            times = f" x num_mini_batches {args.num_mini_batches}" if args.num_mini_batches > 1 else ""
            raise ConfigError(
                f"{len(self.train_dataset)} prompts are fewer than the {prompts} of one step "
                f"(per_device_train_batch_size {args.train_batch_size} x gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps} x {args.world_size} processes{times}): lower one of them"
            )
        if self.is_world_process_zero():
            steps = args.steps_per_rollout
            logger.info(
                "each %s: %d prompts x %d samples -> %d sequences -> %d optimiser step%s",
                "step" if steps == 1 else "rollout",
                prompts,
                args.num_generations,
                prompts * args.num_generations,
                steps,
                "" if steps == 1 else "s",
            )

    def extra_state(self) -> dict:
        inside = self.buffer is not None and self.state.global_step % self.args.steps_per_rollout != 0
        return {
            "reference": self.reference_probe(),
            "weighting": self.weighting.state_dict(),
            "kl_controller": None if self.kl_controller is None else self.kl_controller.state_dict(),
            "search": None if self.search is None else self.search.state_dict(),
            "buffer": self.buffer.state_dict() if inside else None,
        }

    def load_state(self, state: dict) -> None:
        """Go on with what a checkpoint holds beyond model and optimiser."""
        self.weighting.load_state_dict(state["weighting"])
        if self.kl_controller is not None:
            self.kl_controller.load_state_dict(state["kl_controller"])
        if self.search is not None:
            self.search.load_state_dict(state["search"])
        if state["buffer"] is not None:
            self.buffer = RolloutBuffer.from_state(state["buffer"], self.args.seed)
        if (self.buffer is not None) != bool(self.state.global_step % self.args.steps_per_rollout):
            raise TrainingError(
                "the checkpoint was written with other num_mini_batches or num_iterations: its rollout cannot be "
                "gone on with. Resume with the settings of the run"
            )
