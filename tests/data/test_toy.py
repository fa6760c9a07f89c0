"""The toy world: its gold scores by hand, its determinism, and that its objectives conflict."""

import random
import statistics

import pytest

from align.data import toy


@pytest.mark.parametrize(
    ("completion", "helpfulness", "courtesy", "brevity"),
    [
        ("rose soil", 2.0, 0.0, 0.0),
        ("rose rose soil", 1.5, 0.0, 0.0),
        ("rose wave", 0.5, 0.0, 0.0),
        ("well so", -1.5, 0.0, 0.0),
        ("", -1.5, 0.0, 0.0),
        ("rose thanks", 1.0, 1.0, 0.0),
        ("rose thanks please", 1.0, 1.0, 0.0),
        ("rose thanks please gladly thanks", 1.0, -0.5, 0.0),
        ("rose stupid", 1.0, -1.0, 0.0),
        ("rose soil seed bloom spade well so like also really", 5.0, 0.0, -1.0),
    ],
)
def test_gold_by_hand(completion, helpfulness, courtesy, brevity):
    assert toy.helpfulness("garden", completion) == helpfulness
    assert toy.courtesy("garden", completion) == courtesy
    assert toy.brevity("garden", completion) == brevity
    assert toy.gold_score("garden", completion) == helpfulness + courtesy + brevity
    assert toy.gold(["p"], [completion], ["garden"]) == [helpfulness + courtesy + brevity]


def test_deterministic_and_disjoint():
    train, evaluation = toy.split_prompts(3, 200, 100)
    assert (train, evaluation) == tuple(toy.split_prompts(3, 200, 100))
    assert train != toy.split_prompts(4, 200, 100)[0]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}
    assert toy.reference_text(train, 2, 0) == toy.reference_text(train, 2, 0)
    with pytest.raises(ValueError, match="384 prompts, 400 were asked for"):
        toy.split_prompts(0, 400)


def test_prompts_with_two_audiences():
    texts = [row["prompt"] for row in toy.prompts(two_audiences=True)]
    assert len(texts) == len(set(texts)) == 6 * 8 * (1 + 7 + 7 * 7 - 7)
    assert {row["prompt"] for row in toy.prompts()} < set(texts) and max(len(text.split()) for text in texts) == 12
    train, evaluation = toy.split_prompts(3, 256, 512, two_audiences=True)
    assert len({row["prompt"] for row in train + evaluation}) == 768
    assert {word for text in texts for word in text.split()} <= set(toy.words())


def test_every_word_is_one_token():
    tokenizer = toy.tokenizer()
    rows = toy.reference_text(toy.prompts(), 1, 0)
    for row in rows:
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert 2 <= len(row["completion"].split()) <= 8


def test_longer_reference_text():
    rows = toy.reference_text(toy.prompts(), 4, 0, longest=11)
    lengths = {len(row["completion"].split()) for row in rows}
    assert lengths == set(range(2, 12))


def test_annotators_are_fond_of_a_word_each():
    words = toy.favourite_words(5, 3)
    assert len(set(words)) == 5 and set(words) < set(toy.FILLER) and words == toy.favourite_words(5, 3)
    answer = "rose so so thanks"
    assert toy.annotator_score("garden", answer, "so", 1.5) == toy.gold_score("garden", answer) + 3.0
    assert toy.annotator_score("garden", answer, "well", 1.5) == toy.gold_score("garden", answer)


def best_answers(count: int = 300) -> dict[str, list[str]]:
    """For each objective, the best tenth of random answers of 1 to 16 words."""
    rng = random.Random(0)
    pool = [toy.TOPICS["garden"], toy.POLITE, toy.FILLER, toy.RUDE]
    answers = [" ".join(rng.choice(rng.choice(pool)) for _ in range(rng.randint(1, 16))) for _ in range(10 * count)]
    return {
        name: sorted(answers, key=lambda answer: (objective("garden", answer), rng.random()))[-count:]
        for name, objective in toy.OBJECTIVES.items()
    }


def test_the_objectives_conflict():
    """What is best for one objective is not best for another: each loses on the others' choices."""
    best = best_answers()
    for name, objective in toy.OBJECTIVES.items():
        own = statistics.mean(objective("garden", answer) for answer in best[name])
        for other in toy.OBJECTIVES:
            if other != name and (name, other) != ("brevity", "courtesy"):
                theirs = statistics.mean(objective("garden", answer) for answer in best[other])
                assert theirs < own - 0.4, (name, other, own, theirs)
    lengths = {name: statistics.mean(len(answer.split()) for answer in answers) for name, answers in best.items()}
    assert lengths["helpfulness"] > lengths["brevity"] + 3
