"""Writes pairs.jsonl: 120 made-up preference pairs about sums, a small file for `align reward-eval`.

Subset "sums": a right against a wrong sum, of similar length. Subset "padding": a short right answer against a long
wrong one. Subset "help": a right answer with its steps against a bare wrong one.
"""

import json
import random
from pathlib import Path

PADDING = "That is a very interesting question, and I am happy to think about it with you step by step. "


def main() -> None:
    rng = random.Random(0)
    rows = []
    for number in range(120):
        a, b = rng.randint(2, 80), rng.randint(2, 80)
        right, wrong = a + b, a + b + rng.choice([-2, -1, 1, 2, 10])
        subset = ("sums", "padding", "help")[number % 3]
        chosen, rejected = f"{a} + {b} is {right}.", f"{a} + {b} is {wrong}."
        if subset == "padding":
            rejected = PADDING * rng.randint(1, 2) + rejected
        elif subset == "help":
            chosen = f"Take the tens first, then the ones, and add the two: {chosen}"
        rows.append({"prompt": f"What is {a} + {b}?", "chosen": chosen, "rejected": rejected, "subset": subset})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(__file__).parent / "pairs.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
