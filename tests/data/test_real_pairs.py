"""2,000 human preference pairs as people publish them."""

import pytest

from align.data import BadRows, detect_format, load_rows, tokenize_pairs, tokenize_prompts
from align.errors import DataError


def test_real_pairs(shared_file, tokenizer):
    pairs = load_rows(shared_file("hh_harmless_pairs.parquet"))
    assert len(pairs) == 2000 and detect_format(pairs).kind == "preference"

    # Four published pairs have an empty chosen answer; the numbers are those of the file, also for a part of it.
    numbered = pairs.add_column("row", list(range(2000)))
    with pytest.raises(DataError, match="1 of 10 rows .*chosen is empty: 1 .row 1908.*max_bad_share=0.1 or more"):
        tokenize_pairs(numbered.select(range(1900, 1910)), tokenizer, max_length=8192)
    report = BadRows()
    part = numbered.select(range(320, 920))
    done = tokenize_pairs(part, tokenizer, max_length=8192, max_bad_share=0.01, report=report)
    assert report.reasons == {"chosen is empty": [323, 732, 916]} and report.notes == {}
    assert len(done) == 597
    for row in done.select(range(0, 597, 60)):
        text = tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
        assert text == f"<bos>{row['prompt']}{row['chosen']}<eos>"

    # As prompts these rows are good, and a rollout starts from the same tokens.
    prompts = tokenize_prompts(part.select(range(10)), tokenizer, max_prompt_length=8192)
    assert prompts["row"][:] == list(range(320, 330))
    assert prompts[0]["prompt_ids"] == done[0]["prompt_ids"]
