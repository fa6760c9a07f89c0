"""The one rule for where an answer ends."""

import pytest

from align.data.ending import close, end_ids, ending_of, written_text
from tests.data.conftest import CHATML


@pytest.fixture
def base(make_tokenizer):
    """ChatML on a base model's tokenizer: the tokenizer's EOS is not the end of a turn."""
    return make_tokenizer(bos=True, eos="<eos>", template=CHATML)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_conversation_ends_with_the_templates_token_and_a_text_with_eos(base, chat_tokenizer, tokenizer):
    turn, eos = base.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    talk = ending_of(base, conversational=True)
    assert (talk.token, list(talk.tail), talk.written) == (turn, ids(base, "\n"), True)
    assert ending_of(base, conversational=False).token == eos and set(end_ids(base)) == {turn, eos}
    assert end_ids(chat_tokenizer) == (turn,) and end_ids(tokenizer) == (eos,)


def test_a_template_that_refuses_the_probe_or_is_none_leaves_eos(make_tokenizer):
    for template in (None, "{{ raise_exception('no') }}", "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        ending = ending_of(make_tokenizer(template=template), conversational=True)
        assert not ending.written and ending.accepted == (ending.token,)


@pytest.mark.parametrize(
    "text", ["yes", "yes<|im_end|>", "yes<|im_end|>\n", "yes<eos><|im_end|>\n", "yes<|im_end|>\n\n"]
)
def test_closing(base, text):
    assert base.decode(close(ids(base, text), ending_of(base, conversational=True), base)) == "yes<|im_end|>"


def test_what_a_policy_wrote_keeps_its_tags(base):
    base.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>", "<|eom|>"]})
    for end, stopped in (("<|im_end|>", True), ("<eos>", True), ("<|eom|>", True), ("", False), ("<eos><pad>", True)):
        written = written_text(base, ids(base, f"<answer>yes</answer>{end}"), stopped)
        assert written == "<answer>yes</answer>"
