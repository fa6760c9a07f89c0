"""A trained model as one plain folder, for transformers, vLLM and converters, and the proof that it is the same."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.data.encode import render
from align.data.ending import generation_with_ends
from align.data.limits import positions
from align.distributed.checkpoints import whole_folder
from align.distributed.disk import open_to_others, writing
from align.errors import ConfigError, TrainingError
from align.modeling.adapters import CONFIG_FILE, adapter_base, is_adapter, task_of
from align.modeling.dequantize import dequantizing, stored_form
from align.modeling.load import load_tokenizer
from align.modeling.logprobs import language_model, token_logps
from align.modeling.merged import load_unmerged, merge
from align.modeling.padding import embeddings_of, padding_as_saved, take_batches, with_own_padding
from align.modeling.pretrained import from_pretrained, load_whole
from align.modeling.processor_files import keep_processor
from align.modeling.scores import sequence_scores
from align.modeling.types import Model
from align.rollout.probe import FAIL, FLOOR, rounded_layers

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TURNS = (
    ("What is the capital of France?", "The capital of France is Paris, a city on the river Seine."),
    ("Write a short poem about the sea.", "The sea rolls in,\nthe sea rolls out,\nand never says what it's about."),
    ("How do I boil an egg?", "Put it in boiling water for 7 to 10 minutes, then cool it under cold water."),
    ("Name three prime numbers.", "2, 3 and 5 are prime numbers."),
)
RANDOM_ROWS, MOST_TOKENS = 4, 48
LOST = 0.25  # of what an adapter changes


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from its source on the same tokens.

    Mean absolute differences of log-probs in nats (of scores, for a reward model), all computed in float32. merge: of
    the merged model to the adapter beside its base, before the cast. files: of the folder, as transformers loads it, to
    the model that was written. gap, largest, over the `compared` values of plain text: of the folder to the source, so
    of the cast to `dtype`, which may make `bound`. effect: what the adapter changes there; None for whole models and
    reward models.
    """

    folder: Path
    dtype: str
    merge: float
    files: float
    gap: float
    largest: float
    bound: float
    effect: float | None
    compared: int


def is_reward_model(source: str | Path) -> bool:
    """Whether a model's folder (an adapter's too) or hub name is a classifier. ConfigError if it holds no model."""
    from transformers import AutoConfig

    if is_adapter(source):
        return task_of(source) == "SEQ_CLS"
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").exists():
        found = sorted(
            path.parent.name for name in ("config.json", CONFIG_FILE) for path in folder.glob(f"*/{name}")
        )  # the members of an ensemble, the points of a front, the checkpoints of a run
        held = f"these folders in it do: {', '.join(found)}" if found else "nor does any folder in it"
        raise ConfigError(f"{source} holds no model (no config.json, no {CONFIG_FILE}); {held}")
    config = from_pretrained(AutoConfig, str(source), "model")
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def export_model(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: str = "auto",
    further: Callable[[Path], None] = lambda folder: None,
) -> Exported:
    """Write the policy or the reward model of `source` into `folder`, a new one, as one whole model with its tokenizer,
    chat template and generation config.

    An adapter (a stacked one too) is merged in float32, then all is cast. dtype: "float32", "bfloat16", "float16", or
    "auto": that of the base model, of a whole model its own. The merge and the files are checked on fixed rows, and
    must be exact but for float32's rounding; the cast may make eight times what rounding every layer to `dtype` does.
    further: writes what else belongs to the model, before the folder has its name.
    Raises `TrainingError` otherwise, and leaves nothing. Everything happens on the CPU.
    """
    source, folder = str(source), Path(folder)
    check_target(source, folder)
    reward_model = is_reward_model(source)
    target = DTYPES[saved_dtype(source) if dtype == "auto" else dtype]
    tokenizer = load_tokenizer(source)
    tokenizer = with_own_padding(tokenizer, embeddings_of(source)) if reward_model else tokenizer
    model = _source_model(source, reward_model, tokenizer)
    rows = probe_rows(tokenizer, language_model(model))
    before = _values(model, rows, reward_model)
    size = before[: len(TURNS)].abs().mean().item() if reward_model else 1.0  # scores have any scale
    floor = FLOOR * max(1.0, size)
    with rounded_layers(language_model(model), target):
        rounding = _mean_gap(_values(model, rows, reward_model), before)
    effect = None
    if is_adapter(source):
        if not reward_model:
            with model.disable_adapter():
                effect = _mean_gap(_values(model, rows, reward_model), before)
        model = merge(model)
    merged = (_values(model, rows, reward_model) - before).abs().mean().item()
    with writing(folder, "export again"), whole_folder(folder) as partial:
        for parameter in model.parameters():  # not the buffers, of which rotary frequencies must stay in float32
            parameter.data = parameter.data.to(target)
        _write(model, tokenizer, source, partial, reward_model)
        further(partial)
        written = _values(model.float(), rows, reward_model)
        del model
        read = _values(_as_others_load(partial, reward_model, tokenizer), rows, reward_model)
        found = Exported(
            folder,
            str(target).removeprefix("torch."),
            merge=merged,
            files=(read - written).abs().mean().item(),
            gap=_mean_gap(read, before),
            largest=(read - before).abs()[: len(TURNS)].max().item(),
            bound=max(FAIL * rounding, floor),
            effect=effect,
            compared=int((before[: len(TURNS)] != 0).sum()),
        )
        _check(found, source, "scores" if reward_model else "log-probs", floor)
    return found


def check_target(source: str, folder: Path) -> None:
    """ConfigError unless `folder` is new, or empty."""
    if Path(source).resolve() == folder.resolve():
        raise ConfigError(f"{source} would be overwritten by its own export: name another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: name a new folder, or delete it")


def saved_dtype(source: str | Path) -> str:
    """The dtype that a model was saved in; of an adapter that of the base at the bottom. ConfigError for quantised
    weights, into which nothing can be merged."""
    from transformers import AutoConfig

    while is_adapter(source):
        source = adapter_base(source)
    config = from_pretrained(AutoConfig, str(source), "model")
    if stored_form(config) and dequantizing(config) is None:
        raise ConfigError(f"the weights of {source} are quantised: an export needs the model as it was before that")
    name = str(config.get_text_config().dtype or config.dtype or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _source_model(source: str, reward_model: bool, tokenizer) -> Model:
    """In float32, an adapter beside its base."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto_class = AutoModelForSequenceClassification if reward_model else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": "float32", **({"num_labels": 1} if reward_model else {})}
    head: dict[str, Any] = {"head_seed": None} if reward_model else {}
    if is_adapter(source):
        model = load_unmerged(auto_class, source, options, **head)[0].eval()
    else:
        model = load_whole(auto_class, source, options, **head).eval()
    return take_batches(model, tokenizer) if reward_model else model


def _as_others_load(folder: Path, reward_model: bool, tokenizer) -> Model:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto_class = AutoModelForSequenceClassification if reward_model else AutoModelForCausalLM
    model = from_pretrained(auto_class, str(folder), "exported model", dtype="float32").eval()
    return take_batches(model, tokenizer) if reward_model else model


def _write(model: Model, tokenizer, source: str, folder: Path, reward_model: bool) -> None:
    if reward_model:
        with padding_as_saved(model, tokenizer):
            model.save_pretrained(folder)
    else:
        _set_generation(model, tokenizer, source)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keep_processor(model, folder)
    open_to_others(folder)


def _set_generation(model: Model, tokenizer, source: str) -> None:
    """The generation config of the run, with every token that ends an answer."""
    from transformers import GenerationConfig

    if (Path(source) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source)
    model.generation_config = generation_with_ends(model.generation_config, tokenizer)


# ---- the comparison -------------------------------------------------------------------------------------------------


def probe_rows(tokenizer, core: Model) -> tuple[Tensor, Tensor]:
    """input_ids, attention_mask [8, T]: four exchanges in the chat template (as plain text without one), and four rows
    of pseudo-random tokens, which reach all of the vocabulary."""
    texts = [f"{question}\n{answer}" for question, answer in TURNS]
    if tokenizer.chat_template:
        turns = [[("user", question), ("assistant", answer)] for question, answer in TURNS]
        texts = [render([{"role": r, "content": c} for r, c in turn], tokenizer, {}) for turn in turns]
    config = core.config.get_text_config()
    longest = min(MOST_TOKENS, positions(config) or MOST_TOKENS)
    rows = [ids[:longest] for ids in tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]]
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(len(tokenizer), config.vocab_size)
    rows += [torch.randint(vocabulary, (longest - 8 * i,), generator=generator).tolist() for i in range(RANDOM_ROWS)]
    width = max(map(len, rows))
    input_ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return input_ids, mask


@torch.no_grad()
def _values(model: Model, rows: tuple[Tensor, Tensor], reward_model: bool) -> Tensor:
    """Scores [8], or the log-probs [8, T-1], 0 where there is no token; float64."""
    input_ids, mask = rows
    return (sequence_scores if reward_model else token_logps)(model, input_ids, mask).double()


def _mean_gap(values: Tensor, others: Tensor) -> float:
    """Over the exchanges alone: a model is so surprised by pseudo-random tokens that rounding moves these most."""
    gaps, real = (values - others).abs()[: len(TURNS)], (others != 0)[: len(TURNS)]
    return gaps[real].mean().item()


def _check(found: Exported, source: str, what: str, floor: float) -> None:
    for part, gap, bound in (
        ("merging the adapter changed", found.merge, floor),
        ("the files read back do not give", found.files, floor),
        (f"the weights in {found.dtype} do not give", found.gap, found.bound),
    ):
        if not gap <= bound:  # a NaN must fail too
            raise TrainingError(
                f"the export of {source} was given up, nothing is left of it: {part} the {what} of the run. They "
                f"differ by {gap:.3g} on average, and {bound:.3g} may be rounding. "
                + ("Export with --dtype float32" if part.startswith("the weights") else "Load the run with PEFT")
            )
    if found.effect and found.gap > LOST * found.effect:
        logger.warning(
            "%s weights blur what the adapter changes: it moves the %s by %.3g on average, the rounding by %.3g. "
            "Export with --dtype float32, or serve the adapter beside its base (docs/serving.md)",
            found.dtype,
            what,
            found.effect,
            found.gap,
        )
