"""Writes the small example files of docs/overoptimization.md. The scores are made up, from a fixed seed:

    examples/bon_scores.csv                              a table of scored completions
    examples/evaluations/{single,ensemble}/overoptimization.jsonl   the evaluation files of two "runs"

It also shows how a training loop of your own writes an evaluation file.
"""

from pathlib import Path

import numpy as np

from align.evaluation.records import EvalWriter

HERE = Path(__file__).parent
TOPICS = ("sea", "forest", "city", "mountain", "river", "desert", "garden", "harbour")
PRAISE = ("lovely", "great", "splendid")


def write_table(prompts: int = 32, answers: int = 32) -> None:
    """Both scores like an answer that says much; the gold score minds flattery (quadratically), the proxies do not."""
    rng = np.random.default_rng(0)
    lines = ["prompt_id,prompt,completion,rm0,rm1,gold"]
    for prompt in range(prompts):
        topic = TOPICS[prompt % len(TOPICS)]
        scores: dict[str, tuple] = {}  # an answer that is drawn twice has the same scores twice
        for _ in range(answers):
            facts, flattery = rng.poisson(2.0), rng.poisson(1.5)
            text = " ".join([topic] + ["fact"] * facts + [str(word) for word in rng.choice(PRAISE, size=flattery)])
            rm0, rm1 = (0.5 * facts + weight * flattery + 0.3 * rng.normal() for weight in (0.7, 0.2))
            gold = facts + 1.6 * flattery - 0.5 * flattery**2 + 0.1 * rng.normal()
            rm0, rm1, gold = scores.setdefault(text, (rm0, rm1, gold))
            lines.append(f"{prompt},tell me about the {topic},{text},{rm0:.3f},{rm1:.3f},{gold:.3f}")
    (HERE / "bon_scores.csv").write_text("\n".join(lines) + "\n")


def write_run(name: str, beta: float, prompts: int = 32, evaluations: int = 16) -> None:
    """A run whose gold score follows d (alpha - beta ln d), Gao et al., with noise per prompt."""
    rng = np.random.default_rng(1)
    writer = EvalWriter(
        HERE / "evaluations" / name,
        name=name,
        method="made up",
        proxy=f"{name} reward",
        gold="gold",
        seed=1,
        config={"alpha": 1.2, "beta": beta},
    )
    for index in range(evaluations):
        kl = 30.0 * (index / (evaluations - 1)) ** 1.5
        d = np.sqrt(kl)
        proxy = 1.1 * d + 0.6 * rng.normal(size=prompts)
        gold = d * (1.2 - beta * np.log(max(d, 1e-9))) + 0.6 * rng.normal(size=prompts)
        samples = [
            {
                "prompt": f"tell me about the {topic}",
                "completion": " ".join([topic, "fact"] + ["lovely"] * (index // 3)),
                "proxy": round(float(proxy[row]), 3),
                "gold": round(float(gold[row]), 3),
            }
            for row, topic in enumerate(TOPICS[:3])
        ]
        # One number per prompt, the same prompts at every evaluation; the means are computed by the writer.
        writer.write(
            step=20 * index,
            kl=(kl * (1 + 0.1 * rng.normal(size=prompts))).round(4),
            kl_k3=np.full(prompts, round(kl, 4)),
            proxy=proxy.round(4),
            gold=gold.round(4),
            length=rng.integers(3, 12, size=prompts),
            samples=samples,
        )


if __name__ == "__main__":
    write_table()
    for name, beta in (("single", 0.75), ("ensemble", 0.3)):
        (HERE / "evaluations" / name / "overoptimization.jsonl").unlink(missing_ok=True)
        write_run(name, beta)
