"""The lines of `align check`: short runs of a config that must agree with each other, and what they leave."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from align.data.limits import positions
from align.doctor.lines import Line, attempt
from align.doctor.short_runs import Checker, Result, free
from align.errors import ConfigError, TrainingError

BATCHES = {"1 x 4 accumulated": (1, 4), "2 x 2 accumulated": (2, 2)}
RANKS_SECONDS = 1800  # for two processes to load the model and train one step
ENDING = 60  # seconds that a command has to end what it has started
BOUNDS = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""Of losses and gradient norms of the same step computed in other portions, relative to the larger (or to 1): orders of
summation differ, and nothing else does. A step's loss in bfloat16 differs by its 8 bits."""
STEP_0 = 1e-3
"""Of log-prob differences to the reference before the first step, in nats per sequence, in float32; in half precision
they are of the rounding, which the trainers measure and refuse themselves."""


def lines(config: str, options: list[str], rows: int, folder: str | None = None) -> Iterator[Line]:
    """All lines. The first makes the run that the others are compared with. folder: in which the runs' folders are
    made, and deleted; default: the system's temporary one."""
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"--folder {folder} is not a folder")
    with tempfile.TemporaryDirectory(prefix="align-check-", dir=folder) as work:
        checker = Checker(config, options, rows, Path(work))
        if checker.run.ensemble is not None and checker.run.ensemble.several:
            raise ConfigError(
                "an ensemble's members are runs of their own: check with --set ensemble=1 ensemble_kind=separate"
            )
        first = attempt(
            "two steps, saved and read back", lambda: _first(checker), "see the error; `--dry-run` shows the rows"
        )
        yield first
        if first.state == "failed":
            return
        for what, stage, remedy in stages(checker):
            yield attempt(what, partial(stage, checker), remedy)
            free()


def stages(checker: Checker) -> list[tuple[str, Any, str]]:
    """(what, a function of the checker, the remedy) of each further line."""
    issue = "report this with the line and the model's name: numbers would depend on how batches are cut"
    policy = checker.run.method.model == "policy"
    found: list[tuple[str, Any, str]] = [
        ("batch and accumulation", _accumulation, issue),
        (
            "two processes = one",
            _ranks,
            "see the end of the two processes' output; `align doctor` checks that they can talk",
        ),
        (
            "policy = reference at step 0",
            _step_0,
            "the reference must be the model that training starts from, in its dtype",
        ),
        ("shared prefixes = padded rows", _layouts, "set batching: padded, and report this with the model's name"),
        (
            "cached = live reference",
            _cached,
            "set precompute_ref_log_probs: false, and report this with the model's name",
        ),
        (
            "resumed = not stopped",
            _resumed,
            "a reward that draws at random, or a GPU's kernels, may differ: see full_determinism",
        ),
        (
            "exported and loaded again",
            _exported,
            "update transformers and peft to the tested versions (`align doctor`)",
        ),
    ]
    if policy:
        remedy = "set rollout.backend: transformers, and report this with the model's name"
        found.append(("trainer = engine at temperature 0.7 after a push", _engine, remedy))
    else:
        found.append(("scores without padding or neighbours", _own_scores, "report this with the model's name"))
    if checker.run.method.rewards:
        found.append(("rewards without padding or neighbours", _rewards, "report this with the reward model's name"))
    return found


# ---- the lines ------------------------------------------------------------------------------------------------------


def _first(checker: Checker) -> str:
    result = checker.whole()
    losses = ", ".join(f"{entry['loss']:.4g}" for entry in result.logs if "loss" in entry)
    return f"losses {losses} on {len(checker.rows)} rows, {result.dtype}"


def compared(a: Result, b: Result, steps: int | None = 1) -> str:
    """How far two runs' losses and gradient norms of the first steps are apart. TrainingError beyond the bound."""
    bound, worst = BOUNDS[a.dtype], 0.0
    for key in ("loss", "grad_norm"):
        ours, theirs = ([entry[key] for entry in run.logs if key in entry][:steps] for run in (a, b))
        if not ours or len(ours) != len(theirs):
            raise TrainingError(f"{key} was logged {len(ours)} and {len(theirs)} times")
        worst = max(worst, *(abs(x - y) / max(abs(x), abs(y), 1.0) for x, y in zip(ours, theirs, strict=True)))
    return bounded(worst, bound, a.dtype)


def bounded(found: float, bound: float, of: str) -> str:
    text = f"differ by {found:.2g}, at most {bound:.2g} ({of})"
    if not found <= bound:
        raise TrainingError(text)
    return text


def _accumulation(checker: Checker) -> str:
    found = []
    for name, (size, count) in BATCHES.items():
        other = checker.made(name, per_device_train_batch_size=size, gradient_accumulation_steps=count)
        found.append(f"{name} {compared(checker.whole(), other)}")
    return "; ".join(found)


def _ranks(checker: Checker) -> str | Line:
    import torch

    what, cuda = "two processes = one", torch.cuda.is_available() and not checker.run.training.use_cpu
    if cuda and torch.cuda.device_count() < 2:
        return Line(what, "skipped", "there is one GPU")
    output = checker.work / "two_processes"
    saved = {"save_strategy": "steps", "save_steps": 1, "save_only_model": "true"}  # for what the checkpoint says
    tokens = checker.tokens(output, per_device_train_batch_size=2, max_steps=1, **saved)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "align"]
    try:
        run_shown([*command, checker.method, "--config", checker.config, *tokens], RANKS_SECONDS)
        logs = json.loads((output / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return compared(checker.whole(), Result(logs, output, checker.whole().dtype))


def run_shown(command: list[str], seconds: float) -> None:
    """Run a command to its end, at most so many seconds. TrainingError with its error, or its last lines."""
    import psutil

    process = subprocess.Popen(
        command,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    late = False
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        started = psutil.Process(process.pid).children(recursive=True)  # each of them could hold our pipe open
        process.terminate()  # torchrun ends its processes, which have sessions of their own
        try:
            said, _ = process.communicate(timeout=ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
            for one in started:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            said, _ = process.communicate()
    if not late and not process.returncode:
        return
    print(said[-4000:], file=sys.stderr)
    errors = [line for line in said.splitlines() if "align: error" in line]
    last = errors[:1] or [line for line in said.splitlines() if line.strip()][-3:]
    why = f"not done after {seconds:g} s" if late else f"exit status {process.returncode}"
    raise TrainingError(f"{why}: {' | '.join(last) or 'nothing was printed'}")


def _step_0(checker: Checker) -> str | Line:
    if not checker.whole().from_reference:
        return Line(
            "policy = reference at step 0", "skipped", "this run has no reference, or names another model as it"
        )
    logs, margins = checker.whole().logs[0], checker.run.method.data == "pairs" and checker.run.method.rewards
    keys = ["kl"] if margins else ["kl", "rewards/chosen", "rewards/rejected", "rewards/margins"]
    found = {key: logs[key] for key in keys if key in logs}  # MODPO's implicit rewards have its margins in them
    if not found:
        return "every token within the bound of the trainer, which stops its first step otherwise"
    worst = max(map(abs, found.values()))
    bound = STEP_0 if checker.whole().dtype == "float32" else 50 * STEP_0
    return f"{', '.join(found)} {bounded(worst, bound, checker.made('4 at once').dtype)}"


def _layouts(checker: Checker) -> str | Line:
    from align.config.options import options_of

    if "batching" not in options_of(checker.method):
        return Line("shared prefixes = padded rows", "skipped", "this method has no shared prefixes")
    padded = checker.made("padded", batching="padded")
    try:
        shared = checker.made("shared", batching="shared_prefix")
    except ConfigError as error:
        return Line("shared prefixes = padded rows", "skipped", f"not used: {' '.join(str(error).split())[:300]}")
    # after a step that differs by a rounding the policy may draw something else
    return compared(padded, shared, steps=1 if checker.run.method.data == "prompts" else None)


def _cached(checker: Checker) -> str | Line:
    from align.config.options import options_of

    if "precompute_ref_log_probs" not in options_of(checker.method):
        return Line("cached = live reference", "skipped", "this method caches no reference")
    try:
        live = checker.made("live", precompute_ref_log_probs="false")
        cached = checker.made("cached", precompute_ref_log_probs="true")
    except ConfigError as error:
        return Line("cached = live reference", "skipped", f"not possible here: {' '.join(str(error).split())[:300]}")
    return compared(live, cached, steps=None)


def _resumed(checker: Checker) -> str:
    whole, folder = checker.whole(), checker.work / "resumed"
    try:
        half = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": "false"}
        checker.made("resumed", keep=True, **half)
        del checker.results["resumed"]
        again = checker.made("resumed", keep=True, resume_from_checkpoint="true")
        return same_weights(whole, again)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def same_weights(whole: Result, again: Result) -> str:
    import torch
    from safetensors.torch import load_file

    files = sorted(path.name for path in whole.folder.glob("*.safetensors"))
    for name in files:
        ours, theirs = load_file(whole.folder / name), load_file(again.folder / name)
        for key, value in ours.items():
            if not torch.equal(value, theirs[key]):
                gap = (value.float() - theirs[key].float()).abs().max()
                raise TrainingError(f"{key} differs by up to {gap:.2g} after resuming at step 1 of 2")
    return f"{len(files)} file{'s' if len(files) != 1 else ''} of weights the same bit by bit"


def _exported(checker: Checker) -> str:
    from align.modeling.export import export_model

    source = checker.whole().folder
    exported = export_model(source, checker.work / "exported")
    shutil.rmtree(checker.work / "exported")
    return f"as one model in {exported.dtype}, checked on fixed rows"


def _engine(checker: Checker) -> str:
    """An engine that starts from the model before training gets the trained weights."""
    import torch

    from align.modeling.load import load_policy, load_tokenizer
    from align.rollout import make_engine

    cuda = torch.cuda.is_available() and not checker.run.training.use_cpu
    device, dtype = ("cuda", "bfloat16" if checker.whole().dtype == "bfloat16" else None) if cuda else ("cpu", None)
    start = load_policy(checker.run.model.model_name_or_path, dtype=dtype).to(device)
    trained = load_policy(str(checker.whole().folder), dtype=dtype).to(device)
    tokenizer = load_tokenizer(checker.run.model.model_name_or_path)
    backend = getattr(getattr(checker.run.training, "rollout", None), "backend", "transformers")
    longest = positions(start.config.get_text_config()) or 256
    engine = make_engine(start, tokenizer, backend=backend, max_model_len=min(256, longest))
    try:
        report = engine.push(trained, 1)
        probe = report.probe or engine.probe(trained)
    finally:
        engine.close()
    proved = "" if report.proved_tensors is None else f", {report.proved_tensors} tensors the same bit by bit"
    gap = f"log-probs differ by {probe.mean_abs_diff:.2g} nats, rounding alone by {probe.rounding:.2g}"
    return f"{engine.name}: {gap}{proved}"


def _texts(checker: Checker, count: int = 6) -> tuple[list, list]:
    """Prompts of the rows, and texts of other lengths after each: what is scored here need not be good."""
    rows = checker.rows.select(range(count))
    columns = rows.column_names
    prompts = rows["prompt"][:] if "prompt" in columns else ["" for _ in range(len(rows))]
    answers = next((rows[name][:] for name in ("chosen", "completion") if name in columns), None)
    if answers is None:
        made = [" ".join(["and so on"] * (3 * i + 1)) for i in range(len(rows))]
        answers = [
            text if isinstance(p, str) else [{"role": "assistant", "content": text}]
            for p, text in zip(prompts, made, strict=True)
        ]
    return prompts, answers


def _invariant(reward, checker: Checker) -> str:
    """Scores of a batch against those of each completion alone, and of the batch turned round."""
    from align.reward_models.base import RewardBatch

    prompts, answers = _texts(checker)
    batch = RewardBatch(list(prompts), list(answers))
    together = reward.score(batch).scores
    alone = [reward.score(batch.select([i])).scores.item() for i in range(len(batch))]
    turned = reward.score(batch.select(range(len(batch))[::-1])).scores.flip(0)
    scale = max(together.abs().max().item(), 1.0)
    worst = max(
        *(abs(a - b) for a, b in zip(together.tolist(), alone, strict=True)), (together - turned).abs().max().item()
    )
    half = any(p.dtype.itemsize < 4 for p in _parameters(reward))
    kind = "bfloat16" if half else "float32"
    return f"{reward.name}: {bounded(worst / scale if math.isfinite(worst) else math.inf, BOUNDS[kind], kind)}"


def _parameters(reward) -> list:
    model = getattr(reward, "model", None)
    return [] if model is None else list(model.parameters())[:4]


def _own_scores(checker: Checker) -> str:
    from align.reward_models.classifier import ClassifierReward

    return _invariant(ClassifierReward(str(checker.whole().folder), normalize=False), checker)


def _rewards(checker: Checker) -> str | Line:
    from align.cli import build
    from align.reward_models.classifier import ClassifierReward
    from align.reward_models.ensemble import RewardEnsemble

    tokenizer = build.tokenizer(checker.run)
    models = [
        r for r in build.rewards(checker.run, "rewards", tokenizer) if isinstance(r, ClassifierReward | RewardEnsemble)
    ]
    if not models:
        return Line(
            "rewards without padding or neighbours", "skipped", "none is a model; a function may compare completions"
        )
    return "; ".join(_invariant(reward, checker) for reward in models)
