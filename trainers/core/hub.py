"""Pushes to the hub, which may not be there any more after hours of training: what was trained is kept, and said."""

import logging
from concurrent.futures import Future
from typing import Any

from align.errors import AlignError, ConfigError, TrainingError, one_line
from align.trainers.core.hooks import TrainerHooks

logger = logging.getLogger(__name__)


class PushesToHub(TrainerHooks):
    """Of every trainer."""

    args: Any
    hub_model_id: str | None
    push_in_progress: Any
    _saving = False

    def init_hf_repo(self, token: str | None = None) -> None:
        """As transformers', which asks the hub for a repository as the trainer is made."""
        try:
            super().init_hf_repo(token)
        except Exception as error:  # the hub's own, httpx's, or the system's
            raise ConfigError(
                f"push_to_hub: the hub gives no repository {self.args.hub_model_id or self.args.output_dir}: "
                f"{one_line(error)}. Check hub_model_id and the token's rights, or leave push_to_hub out",
                key="push_to_hub",
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        before, self._saving = self._saving, not _internal_call
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._saving = before

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Where the hub does not take the model: TrainingError, which says how to push it later; of
        the push that `save_model` makes after a save an error in the log alone, as a run has more to do."""
        saving = self._saving
        try:
            return super().push_to_hub(*args, **kwargs)
        except AlignError:  # of the save before it
            raise
        except Exception as error:
            problem = self._not_pushed("the model", error)
            if not saving:
                raise TrainingError(problem) from error
            logger.error("%s", problem)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`_save` has written one."""

    def _finish_current_push(self) -> None:
        """Also says which pushes of checkpoints failed, of which transformers says nothing."""
        super()._finish_current_push()
        jobs: list[Future] = self.push_in_progress.jobs if getattr(self, "push_in_progress", None) else []
        errors = [job.exception() for job in jobs if job.done()]
        for error in filter(None, errors):
            logger.error("%s", self._not_pushed("a checkpoint", error))

    def _not_pushed(self, what: str, error: BaseException) -> str:
        folder = self.args.output_dir
        return (
            f"the hub did not take {what}: {type(error).__name__}: {error}. What was trained is in {folder}; "
            f"to push it: hf upload {self.hub_model_id or 'NAME'} {folder} --exclude 'checkpoint-*'"
        )
