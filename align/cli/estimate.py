"""A memory estimate from the model's config alone: no weight is loaded, and none needs to exist on this machine.

It says whether a run is near or far from fitting, not how many bytes it will take. Counted exactly: weights, gradients
and optimiser states. Rough: activations. A layer with h hidden and i inner units keeps about 16 h + 4 i numbers per
token for its backward pass: norms 6 h, projections and rotary embedding 10 h, gated MLP 4 i (counted in Qwen2 and Llama
layers with fused attention, which keeps no scores). Under 16-bit autocast the norms stay in 32 bits.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

GIB = 2**30
LOGITS_CHUNK_BYTES = 4 * (1 << 26)  # align.modeling.logprobs bounds a chunk of float32 logits by this


@dataclass
class Part:
    """One line of the estimate: what, how many bytes, and how they were counted. split: FSDP2 and ZeRO-3 split it.
    ranks: that alone hold it, None for all processes."""

    name: str
    bytes: int
    formula: str
    split: bool = False
    ranks: tuple[int, ...] | None = None


@dataclass
class Shape:
    """What the estimate needs to know of a model, all from its config.

    parameters, trainable: counts. weights: bytes of all, and how they come about. trained: (count, bytes of each) of
    the trained ones. cast: parameters that autocast casts (packed ones are unpacked and given back). layers, hidden,
    inner (of the MLP), vocab: sizes. bytes_per_weight: of the dtype it is loaded in.
    """

    parameters: int
    trainable: int
    weights: tuple[int, str]
    trained: list[tuple[int, int]]
    cast: int
    layers: int
    hidden: int
    inner: int
    vocab: int
    bytes_per_weight: int


@dataclass(frozen=True)
class Packed:
    """bitsandbytes' linear layers of 4 or 8 bits. nested: the scales of 4 bits (one per 64 weights) are packed too."""

    bits: int
    nested: bool = False

    @property
    def bytes(self) -> float:
        """Of one weight, its share of the scales included."""
        scales = 0.0 if self.bits == 8 else (1 + 4 / 256) / 64 if self.nested else 4 / 64
        return self.bits / 8 + scales


@dataclass
class Estimate:
    """Bytes of one process on one device, not split by FSDP or ZeRO."""

    parts: list[Part] = field(default_factory=list)

    def add(
        self, name: str, size: float, formula: str, *, split: bool = False, ranks: tuple[int, ...] | None = None
    ) -> None:
        self.parts.append(Part(name, round(size), formula, split, ranks))

    @property
    def total(self) -> int:
        """Of what all processes hold."""
        return sum(part.bytes for part in self.parts if part.ranks is None)

    def split(self, processes: int) -> int:
        """Bytes of one of so many processes whose model FSDP2 or ZeRO-3 splits; one layer at a time is whole, which is
        not counted."""
        held = [part for part in self.parts if part.ranks is None]
        return sum(part.bytes // processes if part.split else part.bytes for part in held)

    def placed(self) -> dict[str, int]:
        """The bytes that some ranks hold beside these, by the words for the ranks."""
        of_rank = {
            rank: sum(part.bytes for part in self.parts if rank in (part.ranks or ()))
            for rank in sorted({rank for part in self.parts for rank in part.ranks or ()})
        }
        sizes = dict.fromkeys(of_rank.values())
        return {on_ranks([rank for rank in of_rank if of_rank[rank] == size]): size for size in sizes}

    def lines(self, processes: int = 1) -> list[str]:
        rows = [(part.name, part.bytes, part.formula) for part in self.parts]
        placed, there = self.placed(), "with the reward models there"
        who = "per other process" if placed else "per process"
        rows.append(("total", self.total, f"{who}, before FSDP or ZeRO split anything"))
        rows += [(f"total {ranks}", self.total + size, there) for ranks, size in placed.items()]
        if processes > 1:
            parts, split = ", ".join(part.name for part in self.parts if part.split), self.split(processes)
            words = f"{who} with fsdp2 or zero3: 1/{processes} of {parts}"
            rows.append((f"split over {processes}", split, words))
            rows += [(f"split {ranks}", split + size, there) for ranks, size in placed.items()]
        return [f"  {name:<20} {_size(size):>10}   {words}" for name, size, words in rows]


def on_ranks(ranks: Sequence[int]) -> str:
    return f"on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.2f} MiB"


def model_shape(
    config, *, dtype: str | None, classifier: bool = False, peft_config=None, packed: Packed | None = None
) -> Shape:
    """Counts from a transformers config; the model is built on the meta device, without storage.

    classifier: with one score in the place of the language-model head. dtype: "float32", "bfloat16", "float16", or
    "auto" for the dtype the config names. packed: how bitsandbytes holds the linear layers; None: as the others.
    """
    from transformers import AutoModelForSequenceClassification

    from align.modeling.load import load_policy, load_sequence_classifier
    from align.modeling.pretrained import causal_class
    from align.modeling.text_part import freeze_unreached

    with torch.device("meta"):
        if classifier:
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = causal_class(config).from_config(config)
        named = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype or "float32")
        held = _packed_weights(model) if packed else {}
        model = model.requires_grad_(False).to(named).requires_grad_(True)
        freeze_unreached(model)
        if peft_config is not None:
            load_model = load_sequence_classifier if classifier else load_policy
            model = load_model(model, peft_config=peft_config)
    text = config.get_text_config()
    sizes = {p: p.dtype.itemsize for p in model.parameters() if id(p) not in held}
    parts = _by_width(sizes)
    words = [f"{count:,} parameters x {width} bytes" for count, width in parts]
    unpacked, size = sum(count for count, _ in parts), sum(count * width for count, width in parts)
    if packed is not None:
        count = sum(held.values())
        size, words = size + round(count * packed.bytes), [f"{count:,} parameters in {packed.bits} bits", *words]
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        weights=(size, ", ".join(words)),
        trained=_by_width({p: p.dtype.itemsize for p in model.parameters() if p.requires_grad}),
        cast=unpacked,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,  # GPT-2 has no such key
        vocab=text.vocab_size,
        bytes_per_weight=named.itemsize,
    )


def members_shape(
    config,
    members: int,
    *,
    dtype: str = "float32",
    peft_config=None,
    upper_layers: int = 0,
    train_trunk: bool = False,
) -> Shape:
    """Of a classifier that holds all members of an ensemble: an adapter and a head each, on weights in dtype, or
    (without peft_config, all in float32) the upper layers and what follows them. Every member's rows go through its
    layers; where the trunk is frozen nothing is kept of it."""
    from transformers import AutoModelForSequenceClassification

    from align.modeling.members import layer_list

    one = model_shape(config, dtype="float32" if peft_config is None else dtype, classifier=True)
    if peft_config is not None:
        trained = members * model_shape(config, dtype="float32", classifier=True, peft_config=peft_config).trainable
        count, layers = one.parameters + trained, members * one.layers
    else:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layer_list(model)]
        after = one.parameters - sum(sizes) - model.get_input_embeddings().weight.numel()
        own = sum(sizes[-upper_layers:]) + after
        count, trained = one.parameters + (members - 1) * own, members * own
        layers = members * upper_layers
        if train_trunk:
            trained, layers = count, layers + one.layers - upper_layers
    width = one.bytes_per_weight  # of what is not trained
    parts = [(count, 4)] if width == 4 else [(one.parameters, width), (count - one.parameters, 4)]
    words = [f"{number:,} parameters x {size} bytes" for number, size in parts]
    weights = (sum(number * size for number, size in parts), ", ".join(words))
    return replace(
        one, parameters=count, trainable=trained, weights=weights, trained=[(trained, 4)], cast=count, layers=layers
    )


def _by_width(sizes: dict[torch.nn.Parameter, int]) -> list[tuple[int, int]]:
    return [(sum(p.numel() for p in sizes if sizes[p] == width), width) for width in sorted({*sizes.values()})]


def _packed_weights(model) -> dict[int, int]:
    """Counts of the weights that bitsandbytes packs, by id: of linear layers, but of the head."""
    last = [name for name, _ in model.named_parameters()][-1]
    head = model.get_output_embeddings()
    return {
        id(module.weight): module.weight.numel()
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head and f"{name}.weight" != last
    }


def optimizer_bytes(optim: str, width: int) -> tuple[int, str]:
    """Bytes of optimiser state per trained parameter whose weight has `width` bytes, and in words."""
    if "8bit" in optim:
        return 2, "two states of 1 byte"
    if optim.startswith(("adafactor", "sgd", "galore", "apollo", "lomo", "adalomo")):
        return 0, "little or no state, counted as none"
    return 2 * width, f"two states of {width} bytes"


def estimate(
    shape: Shape,
    *,
    optim: str,
    mixed: bool,
    checkpointing: bool,
    tokens: int,
    logits: bool,
    reference: bool = False,
    reference_width: int | None = None,
    engine_width: int | None = None,
    engine_ranks: int = 1,
    critic: Shape | None = None,
    rewards: dict[str, Shape] | None = None,
    learning: Collection[str] = (),
    ranks: Mapping[str, tuple[int, ...]] | None = None,
) -> Estimate:
    """Memory of one training process.

    tokens: of one micro-batch, padding counted. mixed: 16-bit autocast. logits: there is a language-model head; it
    runs in chunks. reference: there is a second, frozen copy of the model; reference_width: bytes of each of its
    weights, None: as the model's. engine_width: the rollout engine has a copy of its own, of so many bytes a weight,
    and shares it with engine_ranks - 1 other processes. critic: a network that AdamW trains in float32 on the same
    micro-batches, while the model's activations are kept. rewards: reward models by name. learning: those that AdamW
    trains beside the policy. ranks: that alone hold some of the rewards.
    """
    out = Estimate()
    count, width = shape.parameters, shape.bytes_per_weight
    out.add("weights", *shape.weights, split=True)
    gradients = sum(number * size for number, size in shape.trained)
    words = ", ".join(f"{number:,} trained x {size} bytes" for number, size in shape.trained)
    out.add("gradients", gradients, words, split=True)
    states = [(number, *optimizer_bytes(optim, size)) for number, size in shape.trained]
    words = ", ".join(dict.fromkeys(words for _, _, words in states))
    out.add("optimiser states", sum(number * size for number, size, _ in states), f"{optim}: {words}", split=True)
    if mixed and width == 4:
        words = "autocast keeps the cast weights during a forward and backward pass"
        out.add("16-bit copies", shape.cast * 2, words, split=True)
    kept, how = _kept_per_token(shape, mixed=mixed, checkpointing=checkpointing)
    out.add("activations (rough)", tokens * kept, f"{tokens:,} tokens x {how}")
    if logits:
        chunk = min(4 * tokens * shape.vocab, LOGITS_CHUNK_BYTES)
        out.add("logits", 3 * chunk, "at most one chunk in float32, its softmax and its gradient")
    if critic is not None:
        out.add("critic", 4 * critic.weights[0], f"{critic.weights[1]}, gradient and AdamW's two states", split=True)
        if mixed:
            out.add("its 16-bit copies", critic.cast * 2, "as the policy's", split=True)
        kept, how = _kept_per_token(critic, mixed=mixed, checkpointing=checkpointing)
        out.add("its activations", tokens * kept, f"{tokens:,} tokens x {how}")
    if reference:
        out.add("reference model", count * (reference_width or width), "a frozen copy of the weights", split=True)
    if engine_width is not None:
        part = "its own copy of the weights" if engine_ranks == 1 else f"1/{engine_ranks} of a copy of the weights"
        words = f"{part} x {engine_width} bytes; its KV cache comes on top"
        out.add("rollout engine", count * engine_width // engine_ranks, words)
    _add_rewards(out, rewards or {}, learning, ranks or {})
    return out


def _add_rewards(
    out: Estimate, rewards: Mapping[str, Shape], learning: Collection[str], ranks: Mapping[str, tuple[int, ...]]
) -> None:
    for name, reward in rewards.items():
        size, words = reward.weights
        where = ranks.get(name)
        words = words if where is None else f"{words}, {on_ranks(where)} alone"
        out.add("reward model", size, f"{name}: {words}", ranks=where)
        if name in learning:
            size = sum(3 * number * width for number, width in reward.trained)
            out.add("its training", size, f"{reward.trainable:,} trained x gradient and AdamW's two states")


def _kept_per_token(shape: Shape, *, mixed: bool, checkpointing: bool) -> tuple[int, str]:
    """Bytes that the backward pass needs of each token, and how they come about."""
    number = 2 if mixed or shape.bytes_per_weight == 2 else 4
    norms = (4 if mixed else number) * 6 * shape.hidden
    layer = number * (10 * shape.hidden + 4 * shape.inner) + norms
    if checkpointing:
        return shape.layers * number * shape.hidden + layer, f"{shape.layers} layer inputs and one layer"
    return shape.layers * layer, f"{shape.layers} layers x {layer:,} bytes"
