"""Rewrites keep what they claim to keep, change what they claim to change, and are the same for both answers."""

import random
import re
import string

import pytest

from align.errors import ConfigError
from align.evaluation.rewrites import REWRITES, choose_rewrites, looks_like_code, rewrite_row

PROSE = (
    'The sea isn\'t calm, but "rough" water is fine: see item 3.14 at http://a.b/c.\n\n- first thing\n- second thing'
    "\n\nUse `print('a, b')` or\n\n```python\nif x == 'a':\n    y = \"b\"  # a, b\n```\n\nThat is all."
)
CODE = "def add(a, b):\n    total = a + b\n    return total\n"
DIALOGUE = "\n\nHuman: How are you?\n\nAssistant: Well, thanks.\n\nHuman: Can I swim in the sea today?\n\nAssistant:"
DRAWN = ("ask", "opening", "closing", "handle", "typos")


def words(text):
    return text.split()


def letters(text):
    return re.sub(r"[\W_]", "", text)


def straight(text):
    return text.replace("’", "'").replace("“", '"').replace("”", '"')


# What of a text stays as it is, by rewrite: a function whose value is the same before and after.
KEEPS = {
    "double_spaces": words,
    "newline_at_end": str.rstrip,
    "first_letter_case": str.casefold,
    "quotes": lambda text: text[1:-1] if text.startswith('"The') else text,
    "end_punctuation": lambda text: text.rstrip("."),
    "punctuation_spaces": lambda text: re.sub(r" (?=[.,;:!?])", "", text),
    "curly_quotes": straight,
    "list_markers": lambda text: re.sub(r"(?m)^[*-] ", "", text),
    "typos": lambda text: sorted(text),
}


def edited(name, text, target="answer", seed=0, row=0):
    prompt, answer = ("prompt", text) if target == "answer" else (text, "answer")
    new = rewrite_row(REWRITES[name], prompt, answer, seed=seed, row=row)
    return new[1] if target == "answer" else new[0]


def target_of(name):
    return "prompt" if REWRITES[name].target == "prompt" else "answer"


@pytest.mark.parametrize("name", sorted(KEEPS))
def test_keeps_what_it_claims(name):
    new = edited(name, PROSE, target_of(name))
    assert new != PROSE and KEEPS[name](new) == KEEPS[name](PROSE)


@pytest.mark.parametrize("name", ["ask", "opening", "closing", "handle", "tautology", "quotes", "newline_at_end"])
def test_the_whole_text_is_still_there(name):
    new = edited(name, PROSE, target_of(name))
    assert new != PROSE and PROSE in new


def test_every_rewrite_is_tested():
    assert set(KEEPS) | {"ask", "opening", "closing", "handle", "tautology"} == set(REWRITES)


@pytest.mark.parametrize("name", sorted(REWRITES))
def test_code_inside_a_text_is_never_touched(name):
    new = edited(name, PROSE, target_of(name))
    assert "`print('a, b')`" in new and "```python\nif x == 'a':\n    y = \"b\"  # a, b\n```" in new


@pytest.mark.parametrize("name", [name for name, rewrite in REWRITES.items() if rewrite.prose])
def test_source_code_is_left_alone(name):
    assert looks_like_code(CODE) and not looks_like_code(PROSE)
    assert edited(name, CODE, target_of(name)) == CODE


def test_by_hand():
    assert edited("double_spaces", " a b\n  c d ") == " a  b\n  c  d "
    assert edited("first_letter_case", " The sea") == " the sea" and edited("first_letter_case", "die") == "Die"
    assert edited("end_punctuation", "Yes.") == "Yes" and edited("end_punctuation", "Yes") == "Yes."
    assert edited("end_punctuation", "Yes ...") == "Yes ..." and edited("end_punctuation", "Yes?") == "Yes?"
    assert edited("punctuation_spaces", "A, b. 3.14!") == "A , b . 3.14 !"
    assert edited("curly_quotes", 'it\'s "so"') == "it’s “so”"
    assert edited("curly_quotes", "5' 3\" tall") == "5' 3\" tall"
    assert edited("list_markers", "- a\n  * b\n-c") == "* a\n  - b\n-c"
    assert edited("tautology", "Why?", "prompt") == "Why?" + " and true is true" * 5
    assert edited("quotes", " a ") == ' "a" '


@pytest.mark.parametrize("name", sorted(REWRITES))
def test_draws_depend_on_the_seed_and_the_row_only(name):
    target = target_of(name)
    assert edited(name, PROSE, target, seed=3, row=7) == edited(name, PROSE, target, seed=3, row=7)
    random.seed(1)
    first = [edited(name, PROSE, target, seed=0, row=row) for row in range(20)]
    random.seed(2)
    assert first == [edited(name, PROSE, target, seed=0, row=row) for row in range(20)]
    assert (len(set(first)) > 1) == (name in DRAWN)
    if name in DRAWN:
        assert first != [edited(name, PROSE, target, seed=1, row=row) for row in range(20)]


@pytest.mark.parametrize("name", ["opening", "closing"])
def test_both_answers_get_the_same_words(name):
    for row in range(10):
        added = {edited(name, text, row=row).replace(text, "") for text in ("Yes", "Surely not")}
        assert len(added) == 1


def test_a_typo_is_one_swap_of_letters_inside_a_word():
    new = edited("typos", "swimming is wonderful", "prompt")
    changed = [i for i, (a, b) in enumerate(zip("swimming is wonderful", new, strict=True)) if a != b]
    assert len(changed) == 2 and changed[1] == changed[0] + 1
    assert [w[0] + w[-1] for w in new.split()] == ["sg", "is", "wl"]
    ten = " ".join(["banana"] * 30)
    assert sum(a != b for a, b in zip(ten.split(), edited("typos", ten, "prompt").split(), strict=True)) == 3
    assert edited("typos", "a aaaa bbbbb", "prompt") == "a aaaa bbbbb"


@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_the_last_human_turn_is_edited(end):
    prompt, answer = rewrite_row(REWRITES["quotes"], DIALOGUE + end, " Yes.", seed=0, row=0)
    assert prompt == (DIALOGUE + end).replace("Can I swim in the sea today?", '"Can I swim in the sea today?"')
    assert answer == ' "Yes."'


def test_the_last_message_of_its_author_is_edited_and_the_original_stays():
    chat = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u1"), ("assistant", "a"), ("user", "u2"))]
    reply = [{"role": "assistant", "content": "b"}]
    prompt, answer = rewrite_row(REWRITES["quotes"], chat, reply, seed=0, row=0)
    assert [m["content"] for m in prompt] == ["s", "u1", "a", '"u2"'] and answer[0]["content"] == '"b"'
    assert chat[3]["content"] == "u2" and reply[0]["content"] == "b"


def test_a_handle_is_letters_and_digits():
    new = edited("handle", "Why?", "prompt")
    assert re.fullmatch(r"Why\? @[a-z0-9]{6}", new) and set(new[6:]) <= set(string.ascii_lowercase + string.digits)


def test_names():
    assert len(choose_rewrites(["all"])) == len(REWRITES) and choose_rewrites(["none"]) == []
    assert [rewrite.name for rewrite in choose_rewrites(["typos", "ask", "typos"])] == ["typos", "ask"]
    with pytest.raises(ConfigError, match="no rewrite 'shout'; there are all, none, double_spaces"):
        choose_rewrites(["shout"])
    with pytest.raises(ConfigError, match="names, or 'all' alone, got all, ask"):
        choose_rewrites(["all", "ask"])
