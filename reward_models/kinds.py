"""What a kind of reward is in a configuration, and the table of kinds."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field

from align.config.sections import Kinds, Section
from align.errors import ConfigError
from align.lazy import defined_again

if TYPE_CHECKING:
    from align.reward_models.base import Reward

PathText = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
# torch.bfloat16 and torch.device("cpu") as well as their names
TorchName = Annotated[str, BeforeValidator(lambda value: torch_name(value))]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"], BeforeValidator(lambda value: torch_name(value))
]
Count = Annotated[int, Field(ge=1)]

REWARDS = Kinds("reward", {})


def torch_name(value: Any) -> Any:
    """The name of one of torch's own objects; anything else as it is."""
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" or isinstance(value, str) else value


class RewardSpec(Section):
    """The options of one kind of reward. A subclass declares them as fields, says in `build` what they make, and is
    registered with `register_reward`.

    nested: names of the fields that hold further specs. `check` and `models` are for --dry-run.
    """

    kind: ClassVar[str]
    nested: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def build(self, tokenizer=None, device=None) -> "Reward":
        """The reward. tokenizer: the policy's, so that its token ids can be scored. device: for models; default: a GPU
        if there is one."""

    def check(self) -> None:
        """Raise what `build` would, as far as that can be told without loading a model or asking a server."""
        for spec in self.parts():
            if isinstance(spec, RewardSpec):
                spec.check()

    def models(self) -> dict[str, bool]:
        """Folders and hub names of the models that it needs, each once; True for those with a score head."""
        paths: dict[str, bool] = {}
        for spec in self.parts():
            paths |= spec.models() if isinstance(spec, RewardSpec) else {}
        return paths

    @property
    def model_ranks(self) -> list[int] | None:
        """The ranks of the run that alone load its own models, None for all."""
        return None

    def parts(self) -> list:
        """The rewards that it is made of."""
        return [spec for name in self.nested for spec in getattr(self, name) or []]

    @property
    def stated_name(self) -> str | None:
        """The name that the reward will have, where the options alone tell it."""
        return getattr(self, "name", None)

    def options(self, *without: str) -> dict[str, Any]:
        """What was set, as keyword arguments."""
        return {name: getattr(self, name) for name in self.model_fields_set if name not in without}

    def given(self) -> dict[str, Any]:
        return {"type": self.kind, **super().given()}


Spec = TypeVar("Spec", bound=type[RewardSpec])


def register_reward(name: str) -> Callable[[Spec], Spec]:
    """Class decorator: `{type: name, ...}` in a configuration is this kind of reward."""

    def register(cls: Spec) -> Spec:
        if name in REWARDS.kinds and not defined_again(REWARDS.kinds[name], cls):
            raise ConfigError(f"there is a reward of type {name!r} already: {REWARDS.kinds[name].__qualname__}")
        cls.kind, cls.label = name, f"{'an' if name[0] in 'aeiou' else 'a'} {name} reward"
        REWARDS.kinds[name] = cls
        return cls

    return register
