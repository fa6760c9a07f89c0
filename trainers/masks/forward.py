"""The forward pass of policy and reference that also gives every token its weights."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from align.errors import TrainingError
from align.modeling.activation_masks import watch_activations
from align.modeling.load import Reference
from align.modeling.logprobs import language_model
from align.modeling.pairs import Completions, PairTokens, completions, pair_tokens_with_kl
from align.modeling.token_masks import TokenMasks, watch_states
from align.modeling.types import Model
from align.objectives.shapes import check_same

Seen = TypeVar("Seen")


@dataclass
class MaskedTokens(PairTokens):
    """The policy's tokens with their weights m_u and m_d, [2B, L] each; None is weight 1."""

    m_u: Tensor | None = None
    m_d: Tensor | None = None


@dataclass
class MaskedForward:
    """Gives the tokens of a batch of pairs under both models, with their KL and weights.

    reference: what the weights are read from while it runs.
    masks: the networks that make them of its hidden states (after each of `layers`); None: they are made of its
        activations in `groups`, and nothing is learned.
    on_reward, on_kl: which of the two terms is weighed.
    """

    reference: Reference
    masks: TokenMasks | None
    autocast: Callable[[], AbstractContextManager]
    layers: str = "all"
    groups: tuple[str, ...] = ()
    on_reward: bool = True
    on_kl: bool = True

    def __call__(
        self, model: nn.Module, inner: nn.Module, batch: dict[str, Tensor], *, chunk_size: int | None
    ) -> tuple[MaskedTokens, PairTokens]:
        """model: the policy as it is called; inner: the module within all wrappers, which holds the networks."""
        positions = completions(batch)
        m_u: Tensor | None
        m_d: Tensor | None
        if self.masks is None:
            active = WatchedReference(
                self.reference, lambda core: watch_activations(core, positions, self.groups), self.autocast
            )
            policy, reference = pair_tokens_with_kl(model, active, batch, chunk_size=chunk_size)
            mask = active.seen.mask()
            m_u, m_d = (mask if on else None for on in (self.on_reward, self.on_kl))
        else:
            states = WatchedReference(
                self.reference, lambda core: watch_states(core, positions, self.layers), self.autocast
            )
            with self._run_networks(self.masks, inner, states, positions) as weights:
                policy, reference = pair_tokens_with_kl(model, states, batch, chunk_size=chunk_size)
            m_u, m_d = weights["masks"]
        return MaskedTokens(**vars(policy), m_u=m_u, m_d=m_d), reference

    @contextmanager
    def _run_networks(
        self, masks: TokenMasks, inner: nn.Module, watched: "WatchedReference[list[Tensor]]", positions: Completions
    ) -> Iterator[dict[str, tuple[Tensor | None, Tensor | None]]]:
        """A dict that holds the weights once the policy has run. The networks run inside the policy's own forward pass
        and are part of its output: DDP takes parameters that it cannot reach from there for unused, and FSDP has their
        weights together only there."""
        kept: dict[str, tuple[Tensor | None, Tensor | None]] = {}

        def run(module, args, output):
            if watched.inside:  # an adapter's reference is the same module
                return
            with self.autocast():
                kept["masks"] = masks(watched.seen, positions.mask)
            output.hidden_states = tuple(m for m in kept["masks"] if m is not None)

        # prepended: the wrappers' own hooks must see the output with the weights
        hook = inner.register_forward_hook(run, prepend=True)
        try:
            yield kept
        finally:
            hook.remove()


class WatchedReference(Generic[Seen]):
    """A reference whose states are recorded while it runs. seen: what `watch` yielded. inside: whether it runs now."""

    def __init__(
        self,
        reference: Reference,
        watch: Callable[[Model], AbstractContextManager[Seen]],
        autocast: Callable[[], AbstractContextManager],
    ):
        self.reference = reference
        self.watch = watch
        self.autocast = autocast
        self.inside = False
        self._seen: Seen | None = None

    @property
    def seen(self) -> Seen:
        assert self._seen is not None  # the reference runs before the policy
        return self._seen

    @contextmanager
    def active(self) -> Iterator[Model]:
        with self.reference.active() as model, self.autocast(), self.watch(language_model(model)) as self._seen:
            self.inside = True
            try:
                yield model
            finally:
                self.inside = False


def own_weights(tokens: MaskedTokens, trainer: object) -> MaskedTokens:
    """The tokens with weights that `forward` of the trainer's class gives, as numbers: booleans too are weights.
    TrainingError for others than [2B, L], 0 or more."""
    here, real, found = f"{type(trainer).__name__}.forward", tokens.mask.bool(), {}
    for name in ("m_u", "m_d"):
        weights = getattr(tokens, name)
        if weights is None:
            continue
        if not isinstance(weights, Tensor):
            raise TrainingError(f"{here}: {name} must be a tensor of weights, [2B, L], or None; got {weights!r:.60}")
        check_same(2, mask=tokens.mask, **{name: weights})
        found[name] = weights if weights.is_floating_point() else weights.to(tokens.logps.dtype)
        if not (found[name][real] >= 0).all():
            raise TrainingError(
                f"{here}: {name} is below 0, or NaN, at some tokens: it is a weight, 0 or more (a KL with a weight "
                "below 0 would be rewarded)"
            )
    return replace(tokens, **found)


@torch.no_grad()
def masks_of_pairs(run: Callable[[nn.Module, dict], tuple], model: nn.Module, batch: dict) -> MaskedTokens:
    """The tokens of a batch in eval mode. run: a trainer's `forward`."""
    training = model.training
    model.eval()
    try:
        return run(model, batch)[0]
    finally:
        model.train(training)
