"""What the data module makes of a real chat template: SmolLM2's, with a system message of its own."""

from align.data import BadRows, tokenize_completions, tokenize_pairs, tokenize_prompts


def test_prompts_and_answers_are_those_of_apply_chat_template(chat_pairs, real_tokenizer):
    report = BadRows()
    pairs = tokenize_pairs(chat_pairs, real_tokenizer, max_length=1024, report=report)
    prompts = tokenize_prompts(chat_pairs, real_tokenizer, max_prompt_length=1024)
    demonstrations = tokenize_completions(chat_pairs, real_tokenizer, max_length=1024)
    assert len(pairs) == len(chat_pairs) and not report.reasons
    render = real_tokenizer.apply_chat_template
    for row, pair, prompt, one in zip(chat_pairs, pairs, prompts, demonstrations, strict=True):
        started = render(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert pair["prompt_ids"] == prompt["prompt_ids"] == started
        for name in ("chosen", "rejected"):
            whole = render(row["prompt"] + row[name], return_dict=True)["input_ids"]
            assert started + pair[f"{name}_ids"] == whole[:-1]  # without the line break after <|im_end|>
            assert pair[f"{name}_ids"].count(real_tokenizer.eos_token_id) == 1
        assert one["input_ids"] == started + pair["chosen_ids"]
        assert one["completion_mask"] == [0] * len(started) + [1] * len(pair["chosen_ids"])
