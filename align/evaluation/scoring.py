"""From a model or a table of completions to a table of scored completions, which `align bon` reads."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import ConfigError, DataError

if TYPE_CHECKING:
    from align.reward_models.base import RewardBatch
    from align.rollout.types import Completion

logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 16
ROWS_AT_ONCE = 256


def build_rewards(specs: list[str], gold: str | None, *, gold_name: str, tokenizer=None) -> dict:
    """Rewards by column name from what `reward_specs` reads.

    The gold reward, if any, is the last one, under `gold_name`. Raises ConfigError for two of one name.
    """
    from align.reward_models.build import build_reward

    rewards = named_rewards(
        [s for given in specs for s in reward_specs(given)], reserved=gold_name, tokenizer=tokenizer
    )
    if gold is not None:
        found = reward_specs(gold)
        if len(found) != 1:
            raise ConfigError(f"{gold} holds {len(found)} rewards; the gold score is one")
        rewards[gold_name] = build_reward(found[0], tokenizer=tokenizer)
    return rewards


def named_rewards(specs: list, *, reserved: str | None = None, tokenizer=None) -> dict:
    """The rewards of these specs by name. Raises ConfigError for two of one name, or one that is called `reserved`."""
    from align.reward_models.build import build_reward

    rewards: dict = {}
    for spec in specs:
        reward = build_reward(spec, tokenizer=tokenizer)
        if reward.name in rewards or reward.name == reserved:
            raise ConfigError(f"two scores are named {reward.name!r}: name one of them, {{type: ..., name: other}}")
        rewards[reward.name] = reward
    return rewards


def _tokenizers(reward) -> list:
    """Those of the models that a reward is, or is made of."""
    own = vars(reward).get("tokenizer")
    return [*([] if own is None else [own]), *(found for part in reward.parts() for found in _tokenizers(part))]


def has_chat_template(reward) -> bool:
    """Whether a reward is, or is made of, a model that reads messages through a chat template of its own."""
    return any(tokenizer.chat_template for tokenizer in _tokenizers(reward))


def score_table(
    path: str | Path, rewards: dict, output: str | Path, *, prompt: str | None, completion: str, chat: bool = False
) -> Path:
    """Score the completions of a table; write it with one more column per reward to `output` (parquet).

    prompt: the column that says which rows share a prompt, and has its text unless a column `prompt` has. chat: rewards
    get text as a user's and an assistant's message, so that a model sees its chat template. A column `finish_reason`
    says which completions were cut (`length`): these have no end token to be read at.
    """
    from align.evaluation.score_table import check_texts, load_table, text_column
    from align.reward_models.base import RewardBatch

    frame = load_table(Path(path), texts=(completion,))
    prompt = text_column(frame, prompt)
    for name, column in (("prompt", prompt), ("completion", completion)):
        if column not in frame:
            raise DataError(f"{path} has no column {column!r} (columns: {', '.join(frame)})")
        if name == "completion" or any(map(_tokenizers, rewards.values())):  # a function may do without the prompt
            check_texts(frame[column], Path(path), f"rewards read the {name}")
    taken = [name for name in rewards if name in frame]
    if taken:
        raise ConfigError(
            f"{path} already has a column {taken[0]!r}: name the reward otherwise, or use --proxy {taken[0]}"
        )
    others = [column for column in frame if column not in (prompt, completion)]
    text = len(frame) > 0 and isinstance(frame[prompt].iloc[0], str)
    chat = chat and text
    if text and not chat:
        for name in (name for name, reward in rewards.items() if has_chat_template(reward)):
            logger.warning(
                "%s holds plain text, and %s is a model with a chat template: it scores prompt and answer put together "
                "as they are. If it was trained on messages, say --chat",
                path,
                name,
            )

    def batches() -> Iterator[tuple[dict[str, list], object]]:
        for start in range(0, len(frame), ROWS_AT_ONCE):
            rows = {name: frame[name].iloc[start : start + ROWS_AT_ONCE].tolist() for name in frame}
            columns = {name: rows[name] for name in others}
            ended = [reason != "length" for reason in rows["finish_reason"]] if "finish_reason" in rows else None
            prompts, completions = rows[prompt], rows[completion]
            if chat:
                prompts = [[{"role": "user", "content": text}] for text in prompts]
                completions = [[{"role": "assistant", "content": text}] for text in completions]
            yield rows, RewardBatch(prompts, completions, columns=columns, ended=ended)

    return _write(batches(), rewards, output, total=len(frame))


def sample_table(
    model: str,
    prompts: str,
    rewards_of_tokenizer,
    output: str | Path,
    *,
    n: int,
    num_prompts: int | None,
    split: str = "train",
    max_prompt_length: int = 512,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    backend: str = "auto",
    seed: int = 0,
) -> Path:
    """Draw n completions for every prompt from a model, score them, write the table to `output` (parquet).

    prompts: a dataset as in `align.data.load_rows`, any format with prompts. rewards_of_tokenizer: a function of the
    model's tokenizer that returns the rewards by name (see `build_rewards`). Columns: prompt_id (row of the dataset),
    completion_id, prompt, completion, finish_reason, and one per reward.
    """
    from align.data import load_rows, tokenize_prompts
    from align.data.ending import written_text
    from align.data.limits import longest_of
    from align.modeling.load import load_policy, load_tokenizer
    from align.rollout import SamplingParams, make_engine

    tokenizer = load_tokenizer(model)
    rewards = rewards_of_tokenizer(tokenizer)
    rows = load_rows(prompts, split)
    if num_prompts is not None and num_prompts < len(rows):
        logger.info("%s: the first %d of %d prompts", prompts, num_prompts, len(rows))
        rows = rows.select(range(num_prompts))
    dataset = tokenize_prompts(rows, tokenizer, max_prompt_length=max_prompt_length, source=prompts)
    params = SamplingParams(max_tokens=max_completion_length, n=n, temperature=temperature, top_p=top_p)
    longest = longest_of(dataset, "prompt_ids") + max_completion_length
    engine = make_engine(load_policy(model), tokenizer, backend=backend, max_model_len=longest, seed=seed)

    def batches() -> Iterator[tuple[dict[str, list], object]]:
        for start in range(0, len(dataset), PROMPTS_AT_ONCE):
            chunk = [dataset[i] for i in range(start, min(start + PROMPTS_AT_ONCE, len(dataset)))]
            rollouts = engine.generate([row["prompt_ids"] for row in chunk], params)
            pairs = [(row, c, i) for row, r in zip(chunk, rollouts, strict=True) for i, c in enumerate(r.completions)]
            texts = [written_text(tokenizer, c.token_ids, c.finish_reason == "stop") for _, c, _ in pairs]
            batch = drawn_batch([(row, c, text) for (row, c, _), text in zip(pairs, texts, strict=True)])
            columns = {
                "prompt_id": [row["row"] for row, _, _ in pairs],
                "completion_id": [i for _, _, i in pairs],
                "prompt": batch.prompts,
                "completion": texts,
                "finish_reason": [c.finish_reason for _, c, _ in pairs],
            }
            yield columns, batch

    try:
        return _write(batches(), rewards, output, total=len(dataset) * n)
    finally:
        engine.close()


def drawn_batch(drawn: "list[tuple[dict, Completion, str]]") -> "RewardBatch":
    """What rewards get of drawn completions: of each the row (`tokenize_prompts`), what was drawn and its text."""
    from align.reward_models.base import RewardBatch

    chat = isinstance(drawn[0][0]["prompt"], list)
    others = [name for name in drawn[0][0] if name not in ("prompt", "prompt_ids", "row")]
    return RewardBatch(
        prompts=[row["prompt"] for row, _, _ in drawn],
        completions=[[{"role": "assistant", "content": text}] if chat else text for _, _, text in drawn],
        prompt_ids=[row["prompt_ids"] for row, _, _ in drawn],
        completion_ids=[made.token_ids for _, made, _ in drawn],
        columns={name: [row[name] for row, _, _ in drawn] for name in others},
        rows=[row["row"] for row, _, _ in drawn],
        ended=[made.finish_reason == "stop" for _, made, _ in drawn],
    )


def _write(batches: Iterator, rewards: dict, output: str | Path, *, total: int) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    writer = None
    with tqdm(total=total, unit="completion", desc="scoring") as progress:
        for columns, batch in batches:
            scores = {name: reward.score(batch).scores.tolist() for name, reward in rewards.items()}
            table = pa.table({**columns, **scores}, schema=writer.schema if writer else None)
            writer = writer or pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
            progress.update(len(batch))
    if writer is None:
        raise DataError(f"no completion to score for {output}")
    writer.close()
    temporary.replace(output)
    logger.info("scored completions: %s", output)
    return output


def reward_specs(text: str) -> list:
    """The reward specs that a command-line word names.

    "{type: ...}" is a YAML mapping; "run.yaml" the `rewards` of a configuration file, "run.yaml:gold_reward" another
    key of it; anything else (a folder, a hub name, "file.py:function") is a spec as it is.
    """
    from align.config.source import parse_value, read_file

    if text.lstrip().startswith("{"):
        spec = parse_value(text)
        if not isinstance(spec, dict):
            raise ConfigError(f"the reward {text!r} is not a YAML mapping")
        return [spec]
    path, _, key = text.partition(":")
    if not path.endswith((".yaml", ".yml")):
        return [text]
    entries, key = read_file(path), key or "rewards"
    found = entries[key].value if key in entries else None
    if not found:
        raise ConfigError(f"{path} has no {key!r} to take rewards from (its keys: {', '.join(entries) or 'none'})")
    return found if isinstance(found, list) else [found]
