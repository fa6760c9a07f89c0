"""A file of prompts to a file of answers: drawn through the rollout engine, resumable, then scored."""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.distributed.disk import write_whole
from align.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SEQUENCES_AT_ONCE, SCORED_AT_ONCE = 256, 256
SLACK = 16  # an answer that is read back may have a few tokens more than it was drawn with
AGAIN = "start the command again: whole answers are kept"
OWN = ("row", "sample", "prompt", "completion", "finish_reason", "tokens")


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. n: of every prompt. seed: with the row's number it decides the row's draws, whatever else
    is drawn beside it, so that a resumed file holds what it would have held. temperature 0 is greedy, with n 1.
    chat_template_kwargs: variables of the chat template; a row's own, in a column of that name, come first.
    revisions: how often the model is shown each of its answers and asked for a better one (`align.data.revisions`, with
    revision_template)."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_prompt_length: int = 1024
    max_completion_length: int = 512
    seed: int = 0
    backend: str = "auto"
    revisions: int = 0
    revision_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def generate_answers(
    model: str,
    prompts: "Dataset",
    output: str | Path,
    drawing: Drawing,
    *,
    source: str = "",
    dtype: str | None = None,
    max_bad_share: float = 0.0,
) -> Path:
    """Draw `drawing.n` answers to every prompt and append them to `output` (.jsonl), one line per answer.

    A file that is there is resumed: rows that are complete are kept. It must come from the same weights, prompts and
    settings (`OUTPUT.identity.json`), or `ConfigError` says what differs. Columns: row, sample, prompt (text or
    messages), completion (text), finish_reason, tokens, and the others of the data; with revisions these are of the
    last one, and `earlier` has the answers before it. dtype: of the weights; None: as saved on a GPU, float32 on a CPU.
    """
    import torch

    from align.data import tokenize_prompts
    from align.data.limits import lengths_of, longest_input
    from align.data.sets import rows_of
    from align.modeling.load import load_policy, load_tokenizer
    from align.rollout import SamplingParams, make_engine

    output = Path(output)
    if output.suffix != ".jsonl":
        raise ConfigError(f"answers are written to a .jsonl file, not to {output}")
    tokenizer = load_tokenizer(model)
    dataset = tokenize_prompts(
        prompts,
        tokenizer,
        max_prompt_length=drawing.max_prompt_length,
        source=source,
        max_bad_share=max_bad_share,
        template_options=drawing.chat_template_kwargs,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("auto" if device == "cuda" else "float32")
    SamplingParams(drawing.max_completion_length, drawing.n, drawing.temperature, drawing.top_p, drawing.top_k)
    prompt_ids = (row["prompt_ids"] for row in rows_of(dataset, ["prompt_ids"]))
    identity = {**_identity(model, prompt_ids, drawing, dtype), **_model_settings(model, tokenizer)}
    done = _resume(output, identity, dataset["row"][:], drawing.n)
    _renew(output, dataset.select(range(done)), drawing.n)
    if done == len(dataset):
        logger.info("%s holds all %d answers: nothing is left to draw", output, done * drawing.n)
        return output
    policy = load_policy(model, dtype=dtype).to(device)
    lengths = lengths_of(dataset, "prompt_ids")
    longest = int(lengths.max()) + drawing.max_completion_length
    if drawing.revisions:
        row = dataset[int(lengths.argmax())]
        longest = max(longest, revision_room(row, tokenizer, drawing, longest_input(policy)))
    engine = make_engine(policy, tokenizer, backend=drawing.backend, max_model_len=longest, seed=drawing.seed)
    del policy
    try:
        _append(output, dataset.select(range(done, len(dataset))), engine, tokenizer, drawing)
    finally:
        engine.close()
    return output


def _append(output: Path, dataset: "Dataset", engine, tokenizer, drawing: Drawing) -> None:
    from tqdm import tqdm

    from align.data.ending import written_text
    from align.rollout import SamplingParams
    from align.rollout.seeds import derive_seed

    others = _others(dataset)
    at_once = max(1, SEQUENCES_AT_ONCE // drawing.n)
    with open(output, "a", encoding="utf-8") as file, tqdm(total=len(dataset), unit="prompt", desc="answers") as bar:
        for start in range(0, len(dataset), at_once):
            chunk = [dataset[index] for index in range(start, min(start + at_once, len(dataset)))]
            params = [
                SamplingParams(
                    drawing.max_completion_length,
                    drawing.n,
                    drawing.temperature,
                    drawing.top_p,
                    drawing.top_k,
                    seed=derive_seed("answers", drawing.seed, row["row"]),
                )
                for row in chunk
            ]
            lines: list[dict[str, Any]] = []
            for row, rollout in zip(chunk, engine.generate([row["prompt_ids"] for row in chunk], params), strict=True):
                for sample, drawn in enumerate(rollout.completions):
                    text = written_text(tokenizer, drawn.token_ids, drawn.finish_reason == "stop")
                    values = (row["row"], sample, row["prompt"], text, drawn.finish_reason, len(drawn.token_ids))
                    lines.append({**dict(zip(OWN, values, strict=True)), **{name: row[name] for name in others}})
            for number in range(drawing.revisions):
                revise(lines, engine, tokenizer, drawing, number)
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(chunk))


def revise(lines: list[dict[str, Any]], engine, tokenizer, drawing: Drawing, number: int) -> None:
    """A better answer in the place of each, which goes to `earlier`. number: of the revision, from 0."""
    from align.data.ending import written_text
    from align.rollout import SamplingParams
    from align.rollout.seeds import derive_seed

    prompts = _shown(lines, tokenizer, drawing, engine.max_model_len - drawing.max_completion_length)
    params = [
        SamplingParams(
            drawing.max_completion_length,
            1,
            drawing.temperature,
            drawing.top_p,
            drawing.top_k,
            seed=derive_seed("revisions", drawing.seed, line["row"], line["sample"], number),
        )
        for line in lines
    ]
    for line, rollout in zip(lines, engine.generate(prompts, params), strict=True):
        (drawn,) = rollout.completions
        line["earlier"] = [*line.get("earlier", []), line["completion"]]
        line["completion"] = written_text(tokenizer, drawn.token_ids, drawn.finish_reason == "stop")
        line |= {"finish_reason": drawn.finish_reason, "tokens": len(drawn.token_ids)}


def revision_room(row: dict[str, Any], tokenizer, drawing: Drawing, most: int | None) -> int:
    """Tokens of the longest sequence with revisions. row: of the longest prompt; ConfigError where the template is of
    another form than it. most: that the model takes, None if any number."""
    from align.data.revisions import TEXT, check_template

    conversational, template = not isinstance(row["prompt"], str), drawing.revision_template
    if template is not None:
        check_template(template, conversational=conversational)
    (ids,) = _shown([{**row, "completion": ""}], tokenizer, drawing)
    answers = 2 if conversational else 1 + (template or TEXT).count("{answer}")
    room = len(ids) + answers * drawing.max_completion_length + SLACK
    return room if most is None else min(room, most)


def _shown(lines: list[dict[str, Any]], tokenizer, drawing: Drawing, longest: int | None = None) -> list[list[int]]:
    """Tokens of the prompts that show the model its answers, with the variables of the chat template of each row."""
    from datasets import Dataset

    from align.data import tokenize_prompts
    from align.data.revisions import revision_prompt

    kept = [{name: line[name] for name in ("chat_template_kwargs",) if name in line} for line in lines]
    prompts = [revision_prompt(line["prompt"], line["completion"], drawing.revision_template) for line in lines]
    rows = Dataset.from_list([{"prompt": prompt, **own} for prompt, own in zip(prompts, kept, strict=True)])
    options: dict[str, Any] = {
        "source": "prompts that show an answer",
        "template_options": drawing.chat_template_kwargs,
    }
    return tokenize_prompts(rows, tokenizer, max_prompt_length=longest, **options)["prompt_ids"][:]


def _others(dataset: "Dataset") -> list[str]:
    return [name for name in dataset.column_names if name not in (*OWN, "prompt_ids", "chosen", "rejected")]


# ---- resuming -------------------------------------------------------------------------------------------------------


def _identity(model: str, prompt_ids, drawing: Drawing, dtype: str) -> dict[str, Any]:
    from align.modeling.weights_digest import named_digest
    from align.rollout.make import resolved_backend

    digest = hashlib.blake2b(digest_size=16)
    for ids in prompt_ids:
        digest.update(f"{ids}\n".encode())
    settings = {name: value for name, value in asdict(drawing).items() if name != "max_prompt_length"}
    settings["backend"] = resolved_backend(drawing.backend)
    if not drawing.revisions:
        del settings["revisions"], settings["revision_template"]
    if not drawing.chat_template_kwargs:
        del settings["chat_template_kwargs"]
    return {"model": model, "weights": named_digest(model), "dtype": dtype, "prompts": digest.hexdigest(), **settings}


def _model_settings(model: str, tokenizer, above: str = "adapter") -> dict[str, Any]:
    """What a folder says of a model beside its weights, from which its answers follow: its configuration, that of the
    adapter, and the tokens that end an answer. Of a hub name the tokens of the tokenizer alone."""
    from align.data.ending import end_ids
    from align.data.fingerprint import text_digest
    from align.modeling.adapter_names import NOT_OF_ADAPTER
    from align.modeling.adapters import CONFIG_FILE, adapter_base, is_adapter

    def read(name: str, leave_out: Collection[str]) -> dict[str, Any]:
        path = Path(model) / name
        content = _parsed(path.read_bytes(), str(path)) if path.is_file() else {}
        return {key: value for key, value in content.items() if key not in leave_out}

    if is_adapter(model):
        own = {f"{above}.{key}": value for key, value in read(CONFIG_FILE, NOT_OF_ADAPTER).items()}
        return {**own, **_model_settings(adapter_base(model), tokenizer, f"base.{above}")}
    ends = read("generation_config.json", ()).get("eos_token_id")
    ids = [*end_ids(tokenizer), *(ends if isinstance(ends, list) else [] if ends is None else [ends])]
    config = read("config.json", ("_name_or_path", "transformers_version", "use_cache"))
    return {"config": text_digest(config), "end_tokens": sorted(set(ids))}


def _resume(output: Path, identity: dict, rows: list[int], n: int) -> int:
    """How many of `rows` the file holds whole; what an interruption left of further ones is cut off."""
    beside = output.with_suffix(".identity.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        write_whole(beside, [json.dumps(identity, indent=2), "\n"], AGAIN)
        return 0
    if not beside.exists():
        raise ConfigError(f"{output} is there, and nothing says what it was drawn from ({beside.name} is missing)")
    before = _parsed(beside.read_bytes(), str(beside))
    differing = [
        f"{name} {before.get(name)!r}, now {identity.get(name)!r}"
        for name in {**before, **identity}
        if before.get(name) != identity.get(name) and name != "model"
    ]
    if differing:
        raise ConfigError(
            f"{output} holds answers of another drawing ({'; '.join(differing)}): name another file, or delete it"
        )
    lines, wanted = output.read_bytes().split(b"\n"), [(row, sample) for row in rows for sample in range(n)]
    kept = 0
    for line, (row, sample) in zip(lines[:-1], wanted, strict=False):  # after the last line break nothing is whole
        found = _parsed(line, f"{output}, line {kept + 1}")
        if (found.get("row"), found.get("sample")) != (row, sample):
            raise DataError(f"{output}, line {kept + 1} is not sample {sample} of row {row}: it was edited")
        kept += 1
    done = kept // n
    whole = b"".join(line + b"\n" for line in lines[: done * n])
    if len(whole) < output.stat().st_size:
        write_whole(output, [whole.decode()], AGAIN)
    if 0 < done < len(rows):
        logger.info("%s holds the answers to %d of %d prompts: the others are drawn", output, done, len(rows))
    return done


def _renew(output: Path, data: "Dataset", n: int) -> None:
    """The other columns of answers that are there, as the data has them now: rewards read them, and no answer does."""
    names = _others(data)
    now = [json.loads(json.dumps({k: row[k] for k in names}, default=str)) for row in data for _ in range(n)]
    lines = [json.loads(line) for line in output.read_bytes().splitlines()] if now and names else []
    if any(name not in line or line[name] != new[name] for line, new in zip(lines, now, strict=False) for name in new):
        logger.info("%s: the other columns of the data have changed, and are written anew", output)
        renewed = (json.dumps(line | new, ensure_ascii=False) + "\n" for line, new in zip(lines, now, strict=True))
        write_whole(output, renewed, AGAIN)


# ---- scores ---------------------------------------------------------------------------------------------------------


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """The lines of an answers' file. DataError, naming file and line, for one without `prompt` and `completion`."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist: give a file of align generate")
    found = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            row = _parsed(line, f"{path}, line {number}")
            prompt = row.get("prompt")
            messages = isinstance(prompt, list) and prompt and all(map(is_message, prompt))
            if not (isinstance(prompt, str) or messages) or not isinstance(row.get("completion"), str):
                raise DataError(f"{path}, line {number}: an answer has a prompt and a completion, which are texts")
            found.append(row)
    if not found:
        raise DataError(f"{path} holds no answer")
    return found


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() >= {"role", "content"}


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # also of bytes that are no text
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: no JSON object")
    return row


def scores_of(answers: list[dict[str, Any]], rewards: dict) -> dict[str, list[float]]:
    """The scores of answers by reward."""
    scores: dict[str, list[float]] = {name: [] for name in rewards}
    for batch in _batches(answers, tuple(rewards)):
        for name, reward in rewards.items():
            scores[name] += reward.score(batch).scores.tolist()
    return scores


def check_reward_names(rewards: Collection[str], columns: Collection[str]) -> None:
    """ConfigError for a reward whose scores would take the place of a column. columns: of the data."""
    taken = next((name for name in rewards if name in (*OWN, *columns)), None)
    if taken is not None:
        whose = "answers" if taken in OWN else "data"
        raise ConfigError(
            f"the scores of {taken!r} have the name of the column {taken!r} of the {whose}, which they would replace: "
            "give it another name ({type: rule, function: ..., name: ...}), or rename the column"
        )


def score_answers(path: str | Path, rewards: dict) -> dict[str, list[float]]:
    """Score every answer of a file by `rewards` (by name), and write the scores into its lines, under these names."""
    answers = read_answers(path)
    no_scores = {
        name for answer in answers for name, value in answer.items() if not isinstance(value, int | float | None)
    }
    check_reward_names(rewards, no_scores)  # those of a call before are written anew
    scores = scores_of(answers, rewards)
    for index, answer in enumerate(answers):
        answer.update({name: values[index] for name, values in scores.items()})
    write_whole(Path(path), (json.dumps(a, ensure_ascii=False) + "\n" for a in answers), AGAIN)
    return scores


def _batches(answers: list[dict[str, Any]], names: tuple[str, ...]) -> Iterator[Any]:
    from align.reward_models.base import RewardBatch

    others = [name for name in answers[0] if name not in (*OWN, *names)]
    for start in range(0, len(answers), SCORED_AT_ONCE):
        rows = answers[start : start + SCORED_AT_ONCE]
        yield RewardBatch(
            prompts=[row["prompt"] for row in rows],
            completions=[
                [{"role": "assistant", "content": row["completion"]}]
                if isinstance(row["prompt"], list)
                else row["completion"]
                for row in rows
            ],
            columns={name: [row.get(name) for row in rows] for name in others},
            rows=[row.get("row", start + index) for index, row in enumerate(rows)],
            ended=[row.get("finish_reason", "stop") == "stop" for row in rows],
        )
