"""MetaAPO's h: what an offline pair of the policy's counts against one that it writes now."""

from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from align.distributed.disk import open_to_others
from align.errors import TrainingError
from align.objectives.meta_apo import meta_mixture, meta_weight
from align.trainers.core.recorder import Recorder
from align.trainers.core.resumed import own_settings

FILE = "meta_learner.safetensors"
HIDDEN = 100
WEIGHT_DECAY = 1e-4  # of the weights, not of the biases: the authors' groups


class MetaLearner:
    """h, its optimiser, and the pairs since its last step.

    Every process has it in float32 on the CPU, and makes the same step from the pairs of all processes, which are
    gathered after every optimiser step: a run may go on with another number of them.

    Args:
        every: policy steps per step of h.
    """

    def __init__(self, *, learning_rate: float, every: int):
        self.every = every
        self.parameters = {
            "fc1_weight": torch.full((HIDDEN, 1), 0.1, requires_grad=True),
            "fc1_bias": torch.zeros(HIDDEN, requires_grad=True),
            "fc2_weight": torch.full((1, HIDDEN), 0.1, requires_grad=True),
            "fc2_bias": torch.zeros(1, requires_grad=True),
        }
        groups = [
            {"params": [p for name, p in self.parameters.items() if name.endswith(kind)], "weight_decay": decay}
            for kind, decay in (("weight", WEIGHT_DECAY), ("bias", 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate)
        self._own: list[Tensor] = []  # of this process and optimiser step
        self.pairs = torch.zeros(0, 3)  # of all processes since the last step of h

    def weights(self, offline_delta: Tensor) -> Tensor:
        """w of each prompt, [B], without gradient. offline_delta: Delta of its offline pair, [B]."""
        parameters = {name: p.detach().to(offline_delta.device) for name, p in self.parameters.items()}
        return meta_weight(offline_delta.detach().float(), **parameters)

    def keep(self, offline_delta: Tensor, offline: Tensor, online: Tensor) -> None:
        """The prompts of a micro-batch for the next step of h. offline, online: the losses of their two pairs, [B]."""
        self._own.append(torch.stack([offline_delta, offline, online], dim=-1).detach().float())

    def end_step(self, step: int) -> float | None:
        """After an optimiser step, on all processes together; step: how many there have been. The loss of h where it
        has made a step."""
        own = torch.cat(self._own).tolist() if self._own else []
        self._own = []
        self.pairs = torch.cat([self.pairs, torch.tensor(gather_object(own)).view(-1, 3)])
        return self.learn() if step % self.every == 0 and len(self.pairs) else None

    def learn(self) -> float:
        """One step on the mean of mixture losses over the pairs, which are forgotten."""
        delta, offline, online = self.pairs.unbind(-1)
        loss = meta_mixture(offline, online, meta_weight(delta, **self.parameters)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.pairs = self.pairs[:0].clone()
        return loss.item()

    # ---- files ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        weights = {name: p.detach() for name, p in self.parameters.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict(), "pairs": self.pairs}

    def load_state_dict(self, state: dict) -> None:
        self._set(state["weights"])
        with own_settings(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])
        self.pairs, self._own = state["pairs"], []

    def save(self, folder: Path) -> None:
        """h alone, for a run that goes on from the model in this folder (`load`)."""
        save_file({name: p.detach() for name, p in self.parameters.items()}, folder / FILE)
        open_to_others(folder)

    def load(self, folder: str | Path) -> None:
        """Begin with the h of a finished run. `TrainingError` where there is none, or none that is whole."""
        path = Path(folder) / FILE
        if not path.exists():
            raise TrainingError(f"meta_learner: {folder} has no {FILE}: name the output_dir of a finished MetaAPO run")
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"meta_learner: {path} is damaged ({error}): leave it out, and h begins anew"
            ) from error
        if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in self.parameters.items()}:
            raise TrainingError(f"meta_learner: {path} holds other weights than those of h")
        self._set(weights)

    def _set(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(weights[name])


class MetaStep(TrainerCallback):
    """Lets h learn after the policy's steps."""

    def __init__(self, learner: MetaLearner, recorder: Recorder):
        self.learner, self.recorder = learner, recorder

    def on_step_end(self, args, state, control, **kwargs):
        loss = self.learner.end_step(state.global_step)
        if loss is not None:
            self.recorder.record("meta/loss", loss)
