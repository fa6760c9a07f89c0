"""Ensembles: one reward made of several (Coste et al. 2023)."""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.distributed.checkpoints import file_crc32, flush
from align.distributed.disk import write_whole
from align.errors import ConfigError, RewardError
from align.lazy import imported
from align.objectives.ensemble import Rule, aggregate, check_rule, rule_name
from align.reward_models.base import Reward, RewardBatch, RewardOutput, Steps, joined, together
from align.reward_models.classifier import ClassifierReward
from align.reward_models.early import Early, begin_parts
from align.reward_models.joint import JointMembers, check_tokenizers, load_joint
from align.reward_models.normalizer import FILE_NAME as NORMALIZER_FILE
from align.reward_models.repeats import warn_of_repeats
from align.reward_models.vllm_server import VllmReward

FILE_NAME = "ensemble.json"
FORMAT = "align.reward_ensemble/2"
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
KINDS = ("separate", "lora", "shared_trunk")


class RewardEnsemble(Reward):
    """One score from those of several members (`align.objectives.ensemble.aggregate`).

    The extras of each score are `member/<i>`, `members_mean` and, with two members or more, `variance`; those of a
    member itself are `member/<i>/<extra>`.

    Args:
        members: rewards of any kind, or `JointMembers`. Classifiers among them may have any vocabulary and chat
            template: each reads the same messages in its own way.
        aggregation: "mean", "wco", "uwo", "lcb", "quantile", or a function of the members' scores [K, B] that returns
            [B], or where it is ("path/file.py:function").
        lambda_: of uwo (its unit is 1/score) and lcb, required there and refused elsewhere. quantile: likewise.
        ddof: 0 is the paper's population variance, 1 the unbiased one of their released PPO code.
        normalize: classifiers trained on pairs have arbitrary offset and scale, so every rule but the mean refuses a
            classifier without a normaliser, and the mean some with and some without; within a composite too. False
            lifts this, for members on one scale by other means.
    """

    partial_extras = True  # those of a composite among the members

    def __init__(
        self,
        members: Sequence[Reward] | JointMembers,
        aggregation: Rule = "uwo",
        *,
        lambda_: float | None = None,
        ddof: int = 0,
        quantile: float | None = None,
        name: str = "ensemble",
        normalize: bool = True,
    ):
        self.name = name
        self.members = members if isinstance(members, JointMembers) else list(members)
        self.aggregation = aggregation = found_rule(aggregation)
        self.options: dict[str, Any] = {"lambda_": lambda_, "ddof": ddof, "quantile": quantile}
        try:
            check_rule(aggregation, len(self.members), **self.options)
            raw, normalised = by_normalizer(self.members)
        except (RewardError, ConfigError) as error:
            raise RewardError(f"reward {name!r}: {error}") from error
        if raw and normalize and aggregation != "mean":
            raise RewardError(
                f"reward {name!r}: {rule_name(aggregation)} compares the members' scores, and {', '.join(raw)} have no "
                "normaliser, so their offsets would decide. Fit one (RewardTrainer does), or set normalize: false if "
                "they share a scale."
            )
        if raw and normalised and normalize:
            raise RewardError(
                f"reward {name!r}: {', '.join(normalised)} have a normaliser and {', '.join(raw)} have none, so their "
                "mean is of two scales. Fit the others (RewardTrainer does), or set normalize: false for raw scores."
            )

    def parts(self) -> Sequence[Reward]:
        return [self.members.classifier] if isinstance(self.members, JointMembers) else self.members

    def _score(self, batch: RewardBatch) -> RewardOutput:
        if isinstance(self.members, JointMembers):
            return self._combined(self.members.scores(batch))
        return self._of_members([member.score(batch, partial=True) for member in self.members], batch)

    def begin(self, batch: RewardBatch, *, user_code: bool) -> Early | None:
        if isinstance(self.members, JointMembers):
            return None
        of_members = functools.partial(self._of_members, batch=batch)
        return begin_parts(self, batch, of_members, user_code=user_code, partial=True)

    def _steps(self, batch: RewardBatch) -> Steps[RewardOutput]:
        if isinstance(self.members, JointMembers):
            scores = yield from self.members.steps(batch)
            return self._combined(scores) if len(batch) else RewardOutput(torch.empty(0))
        outputs = yield from together(self.members, batch, partial=True)
        return self._of_members(outputs, batch) if len(batch) else RewardOutput(torch.empty(0))

    def _of_members(self, outputs: Sequence[RewardOutput], batch: RewardBatch) -> RewardOutput:
        """A completion that a member failed for (`on_error: mask`) has no score. What members log beside their scores
        stays: under `member/<i>`, as two of them may have one name."""
        for member, output in zip(self.parts(), outputs, strict=True):
            if output.absent is not None:
                rows = batch.row_names(torch.nonzero(output.absent).flatten().tolist())
                raise RewardError(
                    f"reward {self.name!r}: its member {member.name!r} does not apply to {rows} (None), and an "
                    "ensemble needs the score of every member"
                )
        scores = _rows(outputs)
        failed = scores.isnan().any(0)
        combined = self._combined(scores.nan_to_num(0.0))
        if failed.any():
            columns = {name: values.masked_fill(failed, float("nan")) for name, values in combined.extras.items()}
            missing = combined.scores.masked_fill(failed, float("nan"))
            combined = RewardOutput(missing, columns, failed=failed)
        combined.metrics = {f"member/{i}/{key}": v for i, one in enumerate(outputs) for key, v in one.metrics.items()}
        combined.given = joined(one.given for one in outputs)
        combined.columns = {f"member/{i}/{key}": v for i, one in enumerate(outputs) for key, v in one.columns.items()}
        combined.extras |= {f"member/{i}/{key}": v for i, one in enumerate(outputs) for key, v in one.extras.items()}
        return combined

    def _combined(self, scores: Tensor) -> RewardOutput:
        """scores: [members, B]."""
        result = aggregate(scores, self.aggregation, **self.options)
        extras = {**{f"member/{i}": row for i, row in enumerate(scores)}, "members_mean": result.mean}
        if result.variance is not None:
            extras["variance"] = result.variance
        return RewardOutput(result.scores, extras)


def found_rule(aggregation: Rule) -> Rule:
    """The rule; where a text is the place of a function ("path/file.py:function"), that function."""
    if isinstance(aggregation, str) and ":" in aggregation:
        return imported(aggregation, "aggregation")
    return aggregation


def _rows(outputs: Iterable[RewardOutput]) -> Tensor:
    return torch.stack([output.scores.float() for output in outputs])


def by_normalizer(members: Sequence[Reward] | JointMembers) -> tuple[list[str], list[str]]:
    """Names of the classifiers without and with a normaliser, those in composites and ensembles among the members
    too."""
    if isinstance(members, JointMembers):
        return ([], members.names) if members.normalizers is not None else (members.names, [])
    raw: list[str] = []
    normalised: list[str] = []
    for member in members:
        if isinstance(member, ClassifierReward | VllmReward):
            (normalised if member.normalized else raw).append(member.name)
            continue
        more = by_normalizer(member.members if isinstance(member, RewardEnsemble) else member.parts())
        raw, normalised = raw + more[0], normalised + more[1]
    return raw, normalised


def save_ensemble(
    folder: str | Path, members: Sequence[str], *, kind: str = "separate", upper_layers: int | None = None
) -> Path:
    """Write ensemble.json, which names the members' folders relative to `folder`, and how they are held: `separate`
    models, `lora` adapters on one model, or a `shared_trunk` with `upper_layers` layers per member."""
    path = Path(folder) / FILE_NAME
    absent = [member for member in members if not (path.parent / member).is_dir()]
    if absent:
        raise RewardError(f"{path.parent} has no folder {', '.join(absent)}")
    saved: dict[str, Any] = {"format": FORMAT, "kind": kind, "members": list(members)}
    saved |= {"upper_layers": upper_layers} if upper_layers else {}
    files = _model_files(path.parent, members)
    saved["files"] = {str(name.relative_to(path.parent)): file_crc32(name) for name in files}
    for name in files:  # a joint ensemble that has this file is taken for whole
        flush(name)
    write_whole(path, [json.dumps(saved, indent=2) + "\n"])
    return path


def _model_files(folder: Path, members: Sequence[str]) -> list[Path]:
    """What scores follow from, but the normalisers, which may be fitted again and have checksums of their own."""
    places = [folder, *(folder / member for member in members)]
    found = {file for place in places for pattern in MODEL_FILES for file in place.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in (FILE_NAME, NORMALIZER_FILE))


def _check_files(path: Path, files: Any) -> None:
    """`RewardError` unless the files of the members are those that were saved. An ensemble that was put together by
    hand names none."""
    if files is None:
        return
    if not isinstance(files, dict):
        raise RewardError(f"{path}: files must be checksums by name, got {files!r:.80}")
    for name, crc32 in files.items():
        file = path.parent / name
        try:
            same = file_crc32(file) == crc32
        except (OSError, ValueError) as error:
            raise RewardError(f"{file} cannot be read ({error}), and {path} names it: copy it again") from error
        if not same:
            raise RewardError(
                f"{file} is not what was saved: copy it again, or delete `files` in {path} if you changed it"
            )


def read_ensemble(folder: str | Path) -> tuple[dict, list[Path]]:
    """The content of ensemble.json, and the members' folders. Raises `RewardError` for what is none, or not whole."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise RewardError(f"{folder} is not a saved ensemble: it has no {FILE_NAME}")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise RewardError(f"{path} is damaged ({error}): copy it again, or train the ensemble again") from error
    saved = saved if isinstance(saved, dict) else {}
    named = saved.get("members")
    if not isinstance(named, list) or not all(isinstance(member, str) for member in named):
        raise RewardError(f"{path}: expected a list of members, got {named!r:.80}")
    if saved.get("format") != FORMAT or saved.get("kind") not in KINDS or not saved.get("members"):
        raise RewardError(f"{path}: expected format {FORMAT!r}, kind {', '.join(KINDS)}, and a list of members")
    members = [path.parent / member for member in saved["members"]]
    absent = [str(member) for member in members if not member.is_dir()]
    if absent:
        raise RewardError(f"{path} names members that are not there: {', '.join(absent)}")
    return saved, members


def ensemble_members(folder: str | Path) -> list[Path]:
    """The members' folders of a saved ensemble."""
    return read_ensemble(folder)[1]


def models_held(folder: str | Path) -> list[Path]:
    """The folders of the models that a saved ensemble loads: one where its members share a model."""
    saved, members = read_ensemble(folder)
    return {"separate": members, "lora": members[:1], "shared_trunk": [Path(folder)]}[saved["kind"]]


def load_ensemble(
    folder: str | Path,
    aggregation: Rule = "uwo",
    *,
    lambda_: float | None = None,
    ddof: int = 0,
    quantile: float | None = None,
    name: str | None = None,
    normalize: bool = True,
    **classifier_options,
) -> RewardEnsemble:
    """The ensemble saved in `folder` (`train_reward_ensemble` makes one), however its members are held.

    With `normalize` every member must have its normaliser; without, the members' raw scores are combined.
    classifier_options: of `ClassifierReward`, for every member (device, batch_tokens, policy_tokenizer, ranks ...).
    """
    saved, folders = read_ensemble(folder)
    _check_files(Path(folder) / FILE_NAME, saved.get("files"))
    if saved["kind"] != "shared_trunk":  # whose members are told by their number; their folders hold normalisers alone
        warn_of_repeats(folders)
    name = name or Path(folder).name
    members: list[ClassifierReward] | JointMembers
    if saved["kind"] == "separate":
        members = [ClassifierReward(m, name=m.name, normalize=normalize, **classifier_options) for m in folders]
        # trained as one, so that another tokenizer is a mistake; members of a list may be of any families
        check_tokenizers([m.name for m in members], [m.tokenizer for m in members])
    else:
        members = load_joint(Path(folder), saved, folders, name=name, normalize=normalize, **classifier_options)
    return RewardEnsemble(
        members, aggregation, lambda_=lambda_, ddof=ddof, quantile=quantile, name=name, normalize=normalize
    )
