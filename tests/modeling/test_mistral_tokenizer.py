"""Mistral's `tekken.json`, which transformers loads with mistral-common where that is installed."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from align.data import tokenize_completions, tokenize_prompts
from align.errors import ConfigError, DataError
from align.modeling.load import load_tokenizer
from tests.data.test_messages import ANSWER, ASKED, TOOLS
from tests.modeling.tekken import needs_mistral_common, tekken

pytestmark = needs_mistral_common
BRIEF = {"role": "system", "content": "Be brief, in \n\ntwo words."}


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
def test_the_tokens_are_mistral_commons(version, tmp_path):
    folder = str(tekken(tmp_path, version))
    tokenizer, own = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(own).__name__ == "MistralCommonBackend" and tokenizer.name_or_path == folder
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    for text in ("Yes, the 1st — naïve\n\n ones.", "  x\t"):
        assert (
            tokenizer(text, add_special_tokens=False)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]
        )
    for talk in ([BRIEF, ASKED], [ASKED, ANSWER, ASKED]):
        (row,) = tokenize_prompts(Dataset.from_list([{"prompt": talk}]), tokenizer, max_prompt_length=None)
        assert row["prompt_ids"] == own.apply_chat_template(talk, return_dict=False)
    offered = {"tools": TOOLS, "return_dict": False}
    assert tokenizer.apply_chat_template([ASKED], **offered) == own.apply_chat_template([ASKED], **offered)
    (row,) = tokenize_completions(Dataset.from_list([{"messages": [ASKED, ANSWER]}]), tokenizer, max_length=None)
    whole = own.apply_chat_template([ASKED, ANSWER], continue_final_message=True, return_dict=False)
    assert row["input_ids"] == [*whole, own.eos_token_id]
    tokenizer.save_pretrained(tmp_path / "saved")  # as a run does
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "mistral"}', encoding="utf-8")
    again = load_tokenizer(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template


def test_the_published_template_comes_first(tmp_path):
    (tekken(tmp_path, "v7") / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"


def test_what_cannot_be_used(tmp_path):
    own = AutoTokenizer.from_pretrained(tekken(tmp_path, "v7"))
    with pytest.raises(DataError, match="mistral-common's.*pass the one of align.modeling.load.load_tokenizer"):
        tokenize_prompts(Dataset.from_list([{"prompt": [ASKED]}]), own, max_prompt_length=None)
    own._tokenizer_path = tmp_path / "tokenizer.model.v3"
    with pytest.raises(ConfigError, match=r"alone \(tokenizer.model.v3\): put the model's tokenizer.json"):
        from align.modeling.mistral_tokenizer import as_transformers_own

        as_transformers_own(own, "some/model")
