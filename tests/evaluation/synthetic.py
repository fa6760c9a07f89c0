"""Made-up scores and runs with known answers."""

import json

import numpy as np

from align.evaluation.fits import gao_rl
from align.evaluation.records import FORMAT, UNCHECKED, EvalWriter


def scored_answers(prompts=60, answers=256, *, trap=1.0, seed=0):
    """(proxy, gold) [P, N]: two features please both, but the gold score turns against an excess of the second, with
    strength `trap`, and the proxy never learns that. So best-of-n by the proxy over-optimises for trap > 0."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, prompts, answers))
    easy = rng.normal(size=(prompts, 1))
    return first + second + easy, first + second - trap * second**2 + easy


def without_checksums(path) -> list[str]:
    """Makes an evaluation file one of format 1, whose lines are judged by what they say; returns them."""
    values = [json.loads(line) for line in path.read_text().splitlines()]
    for value in values:
        del value["crc32"]
    lines = [json.dumps(value).replace(FORMAT, UNCHECKED) for value in values]
    path.write_text("\n".join(lines) + "\n")
    return lines


def write_run(
    folder,
    name,
    *,
    alpha=1.2,
    beta=0.55,
    steps=20,
    max_kl=40.0,
    prompts=64,
    noise=0.8,
    gold=True,
    seed=0,
    method="remax",
):
    """A run whose gold score follows the RL form, with noise per prompt, and whose proxy score keeps rising."""
    rng = np.random.default_rng(seed)
    writer = EvalWriter(
        folder, name=name, method=method, proxy=f"{name} reward", gold="gold" if gold else None, seed=seed,
        config={"learning_rate": 1e-4, "beta": 0.0},
    )  # fmt: skip
    level = rng.normal(size=prompts)  # some prompts are easier
    for index in range(steps + 1):
        kl = max_kl * (index / max(steps, 1)) ** 1.5
        d = np.sqrt(kl)
        proxy = 0.2 + 1.3 * d - 0.06 * d**2 + level + noise * rng.normal(size=prompts)
        scores = 1.0 + gao_rl(d, alpha, beta) + level + noise * rng.normal(size=prompts)
        samples = [
            {
                "prompt": prompt,
                "completion": f"{' '.join(['please'] * (index // 4))} the {prompt} is deep and wide".strip(),
                "proxy": float(proxy[number]),
                "gold": float(scores[number]) if gold else None,
            }
            for number, prompt in enumerate(("sea", "forest", "city"))
        ]
        writer.write(
            index * 10,
            kl=np.maximum(kl * (1 + 0.1 * rng.normal(size=prompts)), 0) if index else np.zeros(prompts),
            kl_k3=np.full(prompts, kl),
            proxy=proxy,
            gold=scores if gold else None,
            length=rng.integers(5, 16, size=prompts),
            samples=samples,
            entropy=3.0 - 0.1 * index,
        )
    return folder
