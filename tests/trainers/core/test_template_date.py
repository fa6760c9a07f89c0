"""Chat templates that write the date, as Llama 3.2's and GPT-OSS's: a run has that of its first day."""

from datetime import date

import pytest
import torch
import transformers as tf
from datasets import Dataset

from align.data import today
from align.errors import TrainingError
from align.trainers.sft import SFTConfig, SFTTrainer
from tests.data.test_templates import family
from tests.trainers.tiny_runs import QUIET, logged

ROWS = Dataset.from_list(
    [{"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "No."}]} for i in range(16)]
)


@pytest.fixture
def on(monkeypatch):
    """Sets today's date; the run's own is forgotten after the test."""

    def on(number: int) -> None:
        at = {"today": classmethod(lambda cls: date(2026, 11, number))}
        monkeypatch.setattr(today, "date", type("Date", (date,), at))

    yield on
    today.set_day(None)


def trainer(folder, name="llama3_2", **options):
    tokenizer = family(name)
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends))
    args = {**QUIET, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, **options}
    return SFTTrainer(model, SFTConfig(str(folder), **args), ROWS, processing_class=tokenizer)


def shown(made) -> str:
    return made.processing_class.decode(made.train_dataset[0]["input_ids"])


def test_a_run_that_is_resumed_on_another_day(on, tmp_path):
    on(10)
    whole = trainer(tmp_path / "run")
    whole.train()
    assert "10 Nov 2026" in shown(whole)
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "later")
    on(11)
    again = trainer(tmp_path / "run", resume_from_checkpoint="auto")
    again.train(resume_from_checkpoint=True)
    assert "10 Nov 2026" in shown(again) and logged(again, "loss") == logged(whole, "loss")
    named = trainer(tmp_path / "other", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert "10 Nov 2026" in shown(named)
    new = trainer(tmp_path / "new")
    assert "11 Nov 2026" in shown(new)
    with pytest.raises(TrainingError, match="the date, 2026-11-10 then and 2026-11-11 now, .*resume_from_che"):
        new.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_templates_that_write_the_date(on):
    on(12)
    written = {"gptoss": "2026-11-12", "llama3_2": "12 Nov 2026"}
    for name, text in written.items():
        assert today.writes_date(family(name))
        today.set_day(None)
        assert text in _rendered(name)
        today.set_day(date(2025, 1, 2))
        assert text not in _rendered(name) and "2025" in _rendered(name)
    assert not today.writes_date(family("qwen3"))


def _rendered(name: str) -> str:
    from align.data.encode import render

    return render([{"role": "user", "content": "Hi"}], family(name), {}, answer_next=True)
