"""Best-of-n on real answers: proxies trained on real preferences, a GPT-4 judge as gold.

    python benchmarks/real_answers.py --answers FILE --model FOLDER [--harmless FILE] [--folder DIR] [--output FILE]

answers   a table with columns prompt, completion and gold: several answers of different models to each instruction, and
          the judge's score of each (AlpacaEval 2: its probability that the answer beats the reference's).
harmless  preference pairs of another kind of data (hh-rlhf, harmless), as text with turns of Human and Assistant;
          without it there is no second ensemble.
model     a chat model. The reward models keep its lowest `--layers` layers: that is what two processors score in time.

An ensemble of `--members` reward models is trained on pairs of answers to half of the instructions, labelled by the
judge, and another one on the harmless pairs. They score the answers to instructions that they have not seen. Then, for
one member, for the ensembles, and for the length of the answer, the best of n is judged, by the unbiased estimator over
all subsets.

The defaults are those of results/real_answers.json. Every step is kept in DIR and is not repeated. `align bon
DIR/scores.parquet` draws the page of the same numbers.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

RESULT = Path(__file__).parent / "results" / "real_answers.json"
RULES = {"mean": {"rule": "mean"}, "wco": {"rule": "wco"}, "uwo:0.5": {"rule": "uwo", "lambda_": 0.5}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", required=True, type=Path)
    parser.add_argument("--harmless", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", default="runs/real_answers", type=Path)
    parser.add_argument("--output", default=RESULT, type=Path)
    parser.add_argument("--figure", type=Path, help="a picture of the curves")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--upper_layers", type=int, default=1)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--instructions", type=int, default=100, help="held out, whose answers are scored [100]")
    parser.add_argument("--max_length", type=int, default=224, help="what the reward models read, in tokens [224]")
    return parser.parse_args()


def chat(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def shortened(tokenizer, texts: list[str], limit: int) -> list[str]:
    """The texts, cut after `limit` tokens."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        text if len(spans) <= limit else text[: spans[limit - 1][1]] for text, spans in zip(texts, encoded, strict=True)
    ]


def judged_pairs(answers: pd.DataFrame, count: int, seed: int = 0) -> list[dict]:
    """Two answers to one instruction, drawn at random; the judge's better one is chosen. Ties are drawn again."""
    rng = np.random.default_rng(seed)
    groups = [group for _, group in answers.groupby("prompt", sort=True)]
    rows: list[dict] = []
    while len(rows) < count:
        group = groups[rng.integers(len(groups))]
        one, two = (group.iloc[i] for i in rng.choice(len(group), 2, replace=False))
        if one.gold != two.gold:
            better, worse = (one, two) if one.gold > two.gold else (two, one)
            rows.append(
                {
                    "prompt": chat(one.prompt),
                    "chosen": [{"role": "assistant", "content": better.completion}],
                    "rejected": [{"role": "assistant", "content": worse.completion}],
                }
            )
    return rows


def harmless_pairs(path: Path, count: int) -> list[dict]:
    from align.data import load_rows
    from align.data.dialogue import convert_dialogues

    rows, _ = convert_dialogues(load_rows(path).select(range(count)), max_bad_share=0.05, source=str(path))
    return rows.to_list()


def train(base: Path, rows: list[dict], folder: Path, args: argparse.Namespace) -> Path:
    """The ensemble's folder. A tenth of the pairs is held out."""
    from datasets import Dataset

    from align import RewardConfig, train_reward_ensemble

    data = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    data = data.train_test_split(test_size=0.1, seed=0)
    options = RewardConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_length=args.max_length + 160,
        max_bad_share=0.1,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        bf16=False,
    )
    return train_reward_ensemble(
        str(base),
        options,
        data["train"],
        data["test"],
        members=args.members,
        kind="shared_trunk",
        upper_layers=args.upper_layers,
        resume=True,
    )


def held_out_accuracy(folder: Path) -> float:
    """Of the members' mean score on the tenth of the pairs, after training."""
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return round([log["eval_rewards/accuracies"] for log in logs if "eval_rewards/accuracies" in log][-1], 4)


def score(folder: Path, table: pd.DataFrame, args: argparse.Namespace) -> np.ndarray:
    """[members, rows]"""
    from align import RewardBatch
    from align.reward_models.ensemble import load_ensemble

    members = load_ensemble(folder, "mean", max_length=args.max_length + 160).members
    order = table.completion.str.len().argsort().to_numpy()
    found = np.zeros((args.members, len(table)))
    for part in np.array_split(order, max(1, len(order) // 64)):
        rows = table.iloc[part]
        batch = RewardBatch(
            [chat(p) for p in rows.prompt], [[{"role": "assistant", "content": c}] for c in rows.completion]
        )
        found[:, part] = members.scores(batch).numpy()
    return found


def curves(table: pd.DataFrame, names: list[str], members: int) -> dict:
    """By way to choose: n, KL, proxy and gold of the choice with their 95 % intervals over instructions."""
    from align.evaluation.best_of_n import bon_curve
    from align.evaluation.bootstrap import percentile_interval, resample_weights
    from align.objectives.ensemble import aggregate

    groups = list(table.groupby("prompt_id", sort=True).indices.values())
    gold = [table.gold.to_numpy()[rows] for rows in groups]
    ways = {"length": table.length.to_numpy(float), "gold": table.gold.to_numpy()}
    for name in names:
        scores = torch.tensor(table[[f"{name}_{i}" for i in range(members)]].to_numpy().T)
        scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
        ways |= {f"{name}, one": scores[0].numpy()}
        ways |= {f"{name}, {rule}": aggregate(scores, **how).scores.numpy() for rule, how in RULES.items()}
    found = {}
    for name, scores in ways.items():
        curve = bon_curve([scores[rows] for rows in groups], gold, name=name, gold_name="gold", min_answers=32)
        per_prompt = np.asarray(curve.per_prompt["gold"])  # [n, prompts]
        low, high = percentile_interval(resample_weights(per_prompt.shape[1], seed=0) @ per_prompt.T)
        found[name] = {
            "instructions": per_prompt.shape[1],
            "n": curve.n.tolist(),
            "kl": np.round(curve.kl, 4).tolist(),
            "gold": np.round(curve.gold, 4).tolist(),
            "gold_95": np.round(np.stack([low, high], 1), 4).tolist(),
            "proxy": np.round(curve.proxy, 4).tolist(),
        }
    return found


def draw(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "length": "the longest answer",
        "judged, one": "one reward model",
        "judged, mean": "four, mean",
        "judged, wco": "four, worst case",
        "judged, uwo:0.5": "four, uncertainty-weighted",
    }
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, colour in zip(names, plt.cm.tab10.colors, strict=False):
        curve = found[name]
        axis.plot(curve["n"], curve["gold"], color=colour, marker="o", markersize=3, label=names[name])
        axis.fill_between(curve["n"], *np.transpose(curve["gold_95"]), color=colour, alpha=0.1, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(curve["n"], [str(n) for n in curve["n"]])
    axis.set_xlabel("best of n answers, chosen by")
    axis.set_ylabel("GPT-4 judge's score of the choice")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    answers = pd.read_parquet(args.answers)
    names = sorted(answers.prompt.unique())
    np.random.default_rng(0).shuffle(names)
    held_out = set(names[: args.instructions])
    from transformers import AutoTokenizer

    from align.modeling.lowest_layers import save_lowest_layers

    base = save_lowest_layers(args.model, args.layers, args.folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers["length"] = answers.completion.str.len()
    answers["completion"] = shortened(tokenizer, answers.completion.tolist(), args.max_length)
    answers = answers[answers.completion.str.strip() != ""]
    answers = answers[answers.prompt.str.len() < 500]
    table = answers[answers.prompt.isin(held_out)].reset_index(drop=True)
    table["prompt_id"] = table.prompt.factorize()[0]
    half = answers[answers.prompt.isin(names[len(names) // 2 :])]
    pairs = {"judged": judged_pairs(half, args.pairs)}
    if args.harmless:
        pairs["harmless"] = harmless_pairs(args.harmless, args.pairs)
    for name, rows in pairs.items():
        folder = train(base, rows, args.folder / name, args)
        kept = args.folder / f"{name}.npy"
        if not kept.exists():
            np.save(kept, score(folder, table, args))
        for i, values in enumerate(np.load(kept)):
            table[f"{name}_{i}"] = values
    table.to_parquet(args.folder / "scores.parquet")
    result = {
        "settings": {
            name: getattr(args, name) for name in ("layers", "upper_layers", "members", "pairs", "max_length")
        },
        "accuracy": {name: held_out_accuracy(args.folder / name) for name in pairs},
        "instructions": int(table.prompt_id.nunique()),
        "answers": len(table),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "curves": curves(table, list(pairs), args.members),
    }
    if args.figure:
        draw(result["curves"], args.figure)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, curve in result["curves"].items():
        print(f"{name:22} gold at n = 1, 4, 32: {curve['gold'][0]:.3f} {curve['gold'][2]:.3f} {curve['gold'][-1]:.3f}")


if __name__ == "__main__":
    main()
