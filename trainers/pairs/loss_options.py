"""`loss_type` and the options of the preference losses: which loss of the table is trained (docs/losses.md)."""

from dataclasses import dataclass, field

from align.errors import ConfigError
from align.lazy import imported
from align.objectives.preference import LOSSES, register_loss
from align.objectives.preference_objective import PreferenceObjective, preference_objective
from align.trainers.core.hooks import TrainingSettings


def loss_option(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass
class PairLossOptions(TrainingSettings):
    """Mixed into the configuration of a method that trains on pairs. An option that is not set has the default of its
    loss, and one that no loss of `loss_type` uses is an error."""

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "One loss or several (docs/losses.md): sigmoid, ipo, robust, cdpo, simpo, orpo, tdpo2 ..., or "
            "path/file.py:function of your own."
        },
    )
    loss_weights: list[float] | None = loss_option("One weight per loss of loss_type. Default: 1 each.")
    beta: float | None = loss_option("Strength of the KL constraint. Default: the loss's, for sigmoid 0.1.")
    label_smoothing: float | None = loss_option(
        "Probability that a label is flipped: cdpo, robust, exo_pair, aot, aot_unpaired, cpo."
    )
    discopop_tau: float | None = loss_option("Temperature of discopop.")
    simpo_gamma: float | None = loss_option("Margin of simpo, simpo_hinge and alphapo (itself, not divided by beta).")
    cpo_alpha: float | None = loss_option("Weight of the negative log-likelihood in cpo.")
    alphapo_alpha: float | None = loss_option("Shape of alphapo's reward; 0 is simpo.")
    rpo_eta: float | None = loss_option("Weight of the negative log-likelihood in rpo_sum, multiplied by beta.")
    rpo_coef: float | None = loss_option("Weight of the mean negative log-likelihood in rpo_mean.")
    tdpo_alpha: float | None = loss_option("Weight of tdpo2's difference of KLs.")
    beta_dpo_alpha: float | None = loss_option("How strongly beta_dpo's beta follows the batch; 0: not at all.")
    beta_dpo_filter: float | None = loss_option("Share of the pairs that beta_dpo drops.")
    beta_dpo_momentum: float | None = loss_option("Of beta_dpo's running mean and deviation.")
    beta_dpo_preset: str | None = loss_option("corrected, or released: what the authors' code does.")
    f_divergence_type: str | None = loss_option(
        "reverse_kl (default), forward_kl, js_divergence or alpha_divergence, for losses of the reward difference."
    )
    f_alpha_divergence_coef: float | None = loss_option("Coefficient of alpha_divergence.")
    ld_alpha: float | None = loss_option("Weight in [0, 1] of the tokens beyond the shorter completion (LD-DPO).")
    use_weighting: bool = loss_option("Weigh pairs by how likely the policy would have written them (WPO).", False)
    loss_options: dict[str, float] | None = loss_option("Options of losses of your own (`register_loss`), by name.")

    def __post_init__(self):
        super().__post_init__()
        self.objective()

    def objective(self) -> PreferenceObjective:
        """A new objective; ConfigError for options that do not fit its losses."""
        names = [name for name in OPTIONS if name != "loss_options"]
        options = {name: getattr(self, name) for name in names}
        twice = sorted(set(names) & set(self.loss_options or ()))
        if twice:
            raise ConfigError(f"loss_options: {', '.join(twice)} are keys of their own", key="loss_options")
        return preference_objective(
            [known_name(name) for name in self.loss_type],
            self.loss_weights,
            {**options, **(self.loss_options or {})},
            seed=self.seed,
        )


def known_name(loss_type: str) -> str:
    """The name in the table of losses of one that may be named by its place ("package.module:function" or
    "path/file.py:function"): the function's own, under which it is added if it was not registered there."""
    if ":" not in loss_type:
        return loss_type
    function = imported(loss_type, "loss_type")
    for name, loss in LOSSES.items():
        if loss.function is function:
            return name
    name = getattr(function, "__name__", loss_type)
    register_loss(name, function)
    return name


OPTIONS = tuple(name for name in PairLossOptions.__annotations__ if name not in ("loss_type", "loss_weights"))
