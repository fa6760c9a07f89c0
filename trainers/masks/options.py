"""Options of the weights of tokens, learned (SparsePO) or from activations (MaPO)."""

from dataclasses import dataclass, field

from align.errors import ConfigError
from align.modeling.activation_masks import groups_of
from align.modeling.token_masks import INITS
from align.trainers.core.hooks import TrainingSettings

VARIANTS = ("common", "independent", "mapo")
LEARNED = {  # options of the mask networks and what they are by default; none of them means anything to mapo
    "mask_layers": "all",
    "mask_mlp_size": None,
    "mask_init": "unit",
    "mask_dropout": 0.01,
    "mask_l1_reward": 0.0,
    "mask_l1_kl": 0.0,
    "mask_weight_decay": 0.01,
    "mask_learning_rate": None,
}


@dataclass
class MaskOptions(TrainingSettings):
    """Mixed into a config. The options of learned masks are errors with `variant: mapo`, and the other way round."""

    variant: str = field(
        default="common",
        metadata={
            "help": "common: one learned mask for both terms. independent: one each. mapo: from the reference's "
            "activations, nothing learned.",
            "choices": list(VARIANTS),
        },
    )
    mask_on_reward: bool = field(default=True, metadata={"help": "Weigh the log-ratios; false: weight 1."})
    mask_on_kl: bool = field(default=True, metadata={"help": "Weigh the KL; false: weight 1."})
    mask_layers: str | None = field(
        default=None,
        metadata={"help": "all: a mask reads the states after every layer (the default). last: after the last one."},
    )
    mask_mlp_size: int | None = field(
        default=None, metadata={"help": "Width of a further linear layer (released: 200). Default: none."}
    )
    mask_init: str | None = field(
        default=None,
        metadata={
            "help": "unit: masks start near 1, as TDPO1 (the default). released: near 0, as in the authors' code."
        },
    )
    mask_dropout: float | None = field(
        default=None, metadata={"help": "Dropout in the masks, apart from disable_dropout. Default: 0.01."}
    )
    mask_l1_reward: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the reward mask's L1 norm, summed over tokens. Halved, as released, where one "
            "common mask is both. Default: 0."
        },
    )
    mask_l1_kl: float | None = field(default=None, metadata={"help": "The same for the divergence mask. Default: 0."})
    mask_weight_decay: float | None = field(
        default=None, metadata={"help": "AdamW's decay of the masks' weights (not biases and norms). Default: 0.01."}
    )
    mask_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the masks. Default: learning_rate."}
    )
    mask_activations: str | None = field(
        default=None, metadata={"help": "Of mapo: mlp, attn, resid, logits or all (the default)."}
    )

    def __post_init__(self):
        super().__post_init__()
        foreign = LEARNED if self.variant == "mapo" else ("mask_activations",)
        ignored = [name for name in foreign if getattr(self, name) is not None]
        if ignored:
            raise ConfigError(f"{', '.join(ignored)}: variant {self.variant} would ignore this; leave it out")
        if not (self.mask_on_reward or self.mask_on_kl):
            raise ConfigError("mask_on_reward and mask_on_kl are both false: that is TDPO1, loss_type tdpo1 of dpo")
        if self.variant == "mapo":
            self.mask_activations = self.mask_activations or "all"
            groups_of(self.mask_activations)
        else:
            self._check_learned()

    def _check_learned(self) -> None:
        if self.variant == "independent" and not (self.mask_on_reward and self.mask_on_kl):
            raise ConfigError("variant independent has a mask for either term; with one of them alone use common")
        for name, default in LEARNED.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        for name, choices in (("mask_layers", ("all", "last")), ("mask_init", INITS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.mask_dropout is not None and not 0 <= self.mask_dropout < 1:
            raise ConfigError(f"mask_dropout is a share in [0, 1), got {self.mask_dropout}")
        if self.mask_mlp_size is not None and self.mask_mlp_size < 1:
            raise ConfigError(f"mask_mlp_size counts from 1, got {self.mask_mlp_size}")
        for name in ("mask_l1_reward", "mask_l1_kl", "mask_weight_decay", "mask_learning_rate"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for term in ("reward", "kl"):
            if not getattr(self, f"mask_on_{term}") and getattr(self, f"mask_l1_{term}"):
                raise ConfigError(f"mask_l1_{term}: mask_on_{term} is false, so there is no such mask")

    @property
    def l1(self) -> dict[str, float]:
        """lambda_u and lambda_d of the loss. One common mask has both norms, so that each counts half."""
        if self.variant == "mapo":
            return {}
        share = 0.5 if self.variant == "common" and self.mask_on_reward and self.mask_on_kl else 1.0
        return {"l1_u": share * (self.mask_l1_reward or 0.0), "l1_d": share * (self.mask_l1_kl or 0.0)}
