"""The rollout engine of a trainer: made when it is first needed, and given the weights of every rollout."""

from align.rollout import make_engine
from align.rollout.engine import RolloutEngine


class EngineSync:
    """Of an on-policy trainer: `engine`, `sync_engine` and `close`."""

    engine: RolloutEngine | None
    owns_engine: bool
    engine_step: int | None  # whose weights the engine has, as far as the trainer knows

    def sync_engine(self) -> None:
        """Make the engine, if there is none yet, and give it the weights of this step."""
        step = self.state.global_step
        if self.engine is not None and self.engine_step == step:
            return
        model = self.accelerator.unwrap_model(self.model)
        with self.phase("sync"):
            if self.engine is None:
                self.engine = make_engine(
                    model,
                    self.processing_class,
                    backend=self.args.rollout_backend,
                    max_model_len=self.args.max_prompt_length + self.args.max_completion_length,
                    seed=self.args.seed,
                    max_num_seqs=self.args.max_num_seqs,
                    kv_cache_gib=self.args.vllm_kv_cache_gib,
                    gpu_memory_utilization=self.args.vllm_gpu_memory_utilization,
                    sync_tolerance=self.args.sync_tolerance,
                )
                self.engine.weight_version = step
            else:
                report = self.engine.push(model, step)
                self.record("rollout/probe_max_abs_diff", report.probe_max_abs_diff)
        self.engine_step = step

    def close(self) -> None:
        """Free the rollout engine that the trainer made. It can go on: it makes a new one when it needs it."""
        if self.engine is not None and self.owns_engine:
            self.engine.close()
            self.engine = self.engine_step = None
