"""A reward for docs/overoptimization.md: a function of the completions, one number for each."""


def word_count(completions, **_):
    return [float(len(text.split())) for text in completions]
