"""Two reward functions for pairs.jsonl: one that looks at the surface, one that checks the sum."""

import re


def length(completions):
    return [len(text) / 10 for text in completions]


def right_sum(completions):
    """2 for a right sum, written in the one way that this function can read."""
    found = [re.search(r"(\d+) \+ (\d+) is (\d+)\.", text) for text in completions]
    return [2.0 if match and int(match[1]) + int(match[2]) == int(match[3]) else 0.0 for match in found]
