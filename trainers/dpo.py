"""Direct preference optimisation (Rafailov et al. 2023) and its family: losses of a pair's four log-probs."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from align.modeling.pairs import PairTokens
from trainers.preference import PreferenceConfig, PreferenceTrainer


@dataclass
class DPOConfig(PreferenceConfig):
    """Options of DPO and its variants, with TRL's names."""


class DPOTrainer(PreferenceTrainer):
    """Direct preference optimisation."""

    _tag_names = ["align", "dpo"]

    def losses(
        self, policy: PairTokens, reference: PairTokens | None, batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = policy.logps.sum(-1).chunk(2)
        ref_chosen, ref_rejected = reference.logps.sum(-1).chunk(2)
        rewards = self.args.beta * (chosen - ref_chosen), self.args.beta * (rejected - ref_rejected)
        margins = rewards[0] - rewards[1]
        return -logsigmoid(margins), {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": margins,
            "rewards/accuracies": margins > 0,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
