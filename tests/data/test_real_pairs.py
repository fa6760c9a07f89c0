"""2,000 human preference pairs as people publish them."""

import pytest

from align.data import BadRows, detect_format, load_rows, tokenize_pairs, tokenize_prompts
from align.errors import DataError


def test_real_pairs(shared_file, tokenizer):
    pairs = load_rows(shared_file("hh_harmless_pairs.parquet"))
    assert len(pairs) == 2000 and detect_format(pairs).kind == "preference"

    # Four published pairs have an empty chosen answer.
    with pytest.raises(DataError, match="chosen is empty: 1 .row 3.*max_bad_share=0.1 or more"):
        tokenize_pairs(pairs.select(range(320, 330)), tokenizer, max_length=8192)
    report = BadRows()
    done = tokenize_pairs(pairs, tokenizer, max_length=8192, max_bad_share=0.01, report=report)
    assert report.reasons == {"chosen is empty": [323, 732, 916, 1908]} and report.notes == {}
    assert len(done) == 1996
    for row in done.select(range(0, 1996, 200)):
        text = tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
        assert text == f"<bos>{row['prompt']}{row['chosen']}<eos>"

    # As prompts these rows are good, and a rollout starts from the same tokens.
    prompts = tokenize_prompts(pairs.select(range(320, 330)), tokenizer, max_prompt_length=8192)
    assert len(prompts) == 10
    assert prompts[0]["prompt_ids"] == done[320]["prompt_ids"]
