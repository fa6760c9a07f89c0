"""Two processes share the scoring of margin rewards, and both get all of it, once."""

import textwrap

from tests.warm import run_ranks

SCRIPT = textwrap.dedent("""
    import json, sys
    from pathlib import Path
    from accelerate import PartialState
    from align.data import tokenize_pairs, toy
    from datasets import Dataset
    from align.reward_models.margins import COLUMNS, MarginRewards

    state, folder, tokenizer = PartialState(cpu=True), Path(sys.argv[1]), toy.tokenizer()
    rows = [{"prompt": f"describe the {topic} : ", "chosen": "well " * (i + 1), "rejected": "so"}
            for i, topic in enumerate([*toy.TOPICS][:5])]
    rows = tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=32)

    def words(completions, **_):
        with open(folder / f"asked_{state.process_index}", "a") as file:
            file.write(f"{len(completions)} ")
        return [len(text.split()) for text in completions]

    for _ in range(2):
        found = MarginRewards(words, tokenizer, folder / "margins").add_to(rows)
    (folder / f"found_{state.process_index}.json").write_text(json.dumps([found[column][:] for column in COLUMNS]))
    if state.num_processes > 1:
        import torch.distributed
        torch.distributed.destroy_process_group()
""")


def test_two_processes_score_what_one_does(tmp_path):
    import json

    (tmp_path / "script.py").write_text(SCRIPT)
    for name, count in {"one": 1, "two": 2}.items():
        run_ranks(str(tmp_path / "script.py"), str(tmp_path / name), logs=tmp_path / name, count=count)
    alone = json.loads((tmp_path / "one" / "found_0.json").read_text())
    assert alone == [[[float(n)] for n in range(1, 6)], [[1.0]] * 5]
    for rank in (0, 1):
        assert json.loads((tmp_path / "two" / f"found_{rank}.json").read_text()) == alone
    asked = [(tmp_path / "two" / f"asked_{rank}").read_text().split() for rank in (0, 1)]
    assert asked == [["6"], ["4"]]  # both completions of three and of two pairs, once
    assert len(list((tmp_path / "two" / "margins").iterdir())) == 1
