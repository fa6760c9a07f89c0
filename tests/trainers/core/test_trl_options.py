"""Options and arguments of TRL's: defaults written out are no error, what asks for something works or is refused."""

import json
from dataclasses import MISSING, fields

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments

import align
from align import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from align.data import toy
from align.errors import ConfigError, DataError
from tests.trainers.core.test_eval_sets import make_trainer, rows_of
from tests.trainers.tiny_runs import QUIET, tiny_model

BOTH = ((DPOConfig, trl.DPOConfig), (SFTConfig, trl.SFTConfig), (RewardConfig, trl.RewardConfig))
OTHERS = {
    "truncation_mode": "keep_end", "padding_free": True, "ref_model_mixup_alpha": 0.9,
    "ref_model_sync_steps": 8, "pad_token": "<pad>", "pad_to_multiple_of": 8,
    "activation_offloading": True, "dataset_text_field": "body",
    "completion_only_loss": False, "dataset_kwargs": {"skip_prepare_dataset": True},
}  # fmt: skip


@pytest.mark.parametrize("ours, theirs", BOTH)
def test_trls_defaults_written_out_are_no_error(ours, theirs, tmp_path):
    base = {f.name for f in fields(TrainingArguments)}
    written = {f.name: f.default for f in fields(theirs) if f.name not in base and f.default is not MISSING}
    neutral = {n: v for n, v in written.items() if n != "f_alpha_divergence_coef"}
    config = ours(output_dir=str(tmp_path), **neutral, use_cpu=True)
    assert config.max_length == 1024
    ours(str(tmp_path), pad_to_multiple_of=None, use_cpu=True)


@pytest.mark.parametrize("ours", [DPOConfig, RewardConfig, SFTConfig])
def test_what_asks_for_something_is_refused_by_name(ours, tmp_path):
    names = {f.name for f in fields(ours)} & OTHERS.keys()
    names -= {"padding_free", "activation_offloading"} if ours is SFTConfig else set()  # TRL's own, which work
    assert len(names) >= 3
    for name in names:
        with pytest.raises(ConfigError, match=name):
            ours(str(tmp_path), use_cpu=True, **{name: OTHERS[name]})


@pytest.mark.parametrize(
    "trainer, config", [(DPOTrainer, DPOConfig), (RewardTrainer, RewardConfig), (SFTTrainer, SFTConfig)]
)
def test_model_init_kwargs_load_a_named_model(trainer, config, policy, tokenizer, tmp_path):
    method = {DPOTrainer: "dpo", RewardTrainer: "reward", SFTTrainer: "sft"}[trainer]
    args = config(str(tmp_path), model_init_kwargs={"attn_implementation": "eager"}, **QUIET)
    found = trainer(policy, args, rows_of(method, 4), processing_class=tokenizer)
    assert found.model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="model_init_kwargs are for loading a model by its name"):
        trainer(tiny_model(tokenizer), args, rows_of(method, 4), processing_class=tokenizer)


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_compute_metrics_gets_the_rewards_of_both_answers(method, tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"mine": float(np.mean(prediction.predictions[:, 0] > prediction.predictions[:, 1]))}

    cls, config = {"dpo": (DPOTrainer, DPOConfig), "reward": (RewardTrainer, RewardConfig)}[method]
    tokenizer = toy.tokenizer()
    model = tiny_model(tokenizer)
    if method == "reward":
        model = make_trainer(method, tmp_path, rows_of(method, 4)).model
    args = config(str(tmp_path), max_steps=1, **QUIET)
    rows = rows_of(method, 6, 1)
    trainer = cls(model, args, rows_of(method, 8), rows, tokenizer, compute_metrics=metrics)
    trainer.train()
    found = trainer.evaluate()
    assert seen[-1].predictions.shape == (6, 2) and not seen[-1].label_ids.any()
    assert found["eval_mine"] == pytest.approx(found["eval_rewards/accuracies"])
    assert trainer.predict(rows).metrics["test_mine"] == found["eval_mine"]


def test_formatting_func_makes_the_text(tmp_path):
    tokenizer, rows = toy.tokenizer(), rows_of("sft", 8)

    def run(name, train, **options):
        args = SFTConfig(str(tmp_path / name), max_steps=1, **QUIET)
        trainer = SFTTrainer(tiny_model(tokenizer), args, train, processing_class=tokenizer, **options)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    def text(row):
        return row["prompt"] + row["completion"]

    as_text = rows.map(lambda row: {"text": text(row)}, remove_columns=rows.column_names)
    assert torch.equal(run("a", rows, formatting_func=text), run("b", as_text))
    with pytest.raises(DataError, match="formatting_func gave list instead of the text of one row"):
        run("c", rows, formatting_func=lambda row: [text(row)])


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("method", ["sft", "reward"])
def test_chat_template_path_is_a_file_or_a_tokenizer(method, policy, tmp_path):
    cls, config = {"sft": (SFTTrainer, SFTConfig), "reward": (RewardTrainer, RewardConfig)}[method]
    (tmp_path / "a.jinja").write_text(TEMPLATE, encoding="utf-8")
    source = toy.tokenizer()
    source.chat_template = TEMPLATE
    source.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    source.save_pretrained(tmp_path / "source")

    def made(path, **options):
        args = config(str(tmp_path / "run"), chat_template_path=str(tmp_path / path), **QUIET)
        return cls(policy, args, rows_of(method, 4), **options)

    before = made("a.jinja")
    assert before.processing_class.chat_template == TEMPLATE and "<turn>" not in before.processing_class.get_vocab()
    cloned = made("source")
    assert cloned.processing_class.chat_template == TEMPLATE and "<turn>" in cloned.processing_class.get_vocab()
    rows = [t.model.get_input_embeddings().weight.shape[0] for t in (before, cloned)]
    assert rows[1] >= len(cloned.processing_class) > rows[0] - 64
    with pytest.raises(ConfigError, match="special tokens that the model lacks"):
        made("source", peft_config=LoraConfig(target_modules=["q_proj"]))
    for path, problem in (("none.jinja", "cannot be read"), (str(policy), "has no chat template")):
        with pytest.raises(ConfigError, match=problem):
            made(path)


def test_a_model_with_code_of_its_own_needs_leave(policy, tokenizer, tmp_path):
    folder = tmp_path / "own"
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
        "\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    config_class = Own\n"
    )
    for cls, config, method in ((DPOTrainer, DPOConfig, "dpo"), (SFTTrainer, SFTConfig, "sft")):
        with pytest.raises(ValueError, match="code of its own.*trust_remote_code: true"):
            cls(str(folder), config(str(tmp_path / "run"), **QUIET), rows_of(method, 4))
        trainer = cls(str(folder), config(str(tmp_path / "run"), trust_remote_code=True, **QUIET), rows_of(method, 4))
        assert type(trainer.model).__name__ == "OwnForCausalLM"


def test_sft_takes_transformers_own_arguments(tmp_path):
    tokenizer = toy.tokenizer()
    given = TrainingArguments(str(tmp_path), learning_rate=3e-4, max_steps=2, report_to="none", use_cpu=True)
    args = SFTTrainer(tiny_model(tokenizer), given, rows_of("sft", 4), processing_class=tokenizer).args
    assert (args.learning_rate, args.max_steps, args.report_to) == (3e-4, 2, [])
    assert args.max_length == 1024 and args.logging_nan_inf_filter is False


def test_assistant_only_loss_is_what_messages_have_anyway(tmp_path):
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = TEMPLATE
    talk = [{"role": "user", "content": "about rose"}, {"role": "assistant", "content": "the rose well"}]

    def labels(rows, **options):
        args = SFTConfig(str(tmp_path), **QUIET, **options)
        trainer = SFTTrainer(tiny_model(tokenizer), args, rows, processing_class=tokenizer)
        assert trainer.args.assistant_only_loss == bool(options)
        return trainer.train_dataset["labels"]

    rows = Dataset.from_list([{"messages": talk}])
    assert labels(rows, assistant_only_loss=True) == labels(rows)
    with pytest.raises(ConfigError, match="assistant_only_loss: the rows are text"):
        labels(rows_of("sft", 4), assistant_only_loss=True)


@pytest.mark.parametrize(
    "config, options, message",
    [
        ("DPOConfig", {"include_for_metrics": ["inputs"]}, "include_for_metrics: compute_metrics gets the rewards"),
        ("RewardConfig", {"batch_eval_metrics": True}, "batch_eval_metrics: compute_metrics gets the rewards"),
        ("ReMaxConfig", {"label_names": ["labels"]}, "label_names: compute_metrics gets the rewards"),
        ("DPOConfig", {"eval_do_concat_batches": False}, "eval_do_concat_batches: compute_metrics gets the rewards"),
        ("PPOConfig", {"average_tokens_across_devices": False}, "average_tokens_across_devices: losses are divided"),
        ("RewardConfig", {"bf16_full_eval": True}, "bf16_full_eval: transformers leaves the weights rounded"),
        ("SFTConfig", {"fp16_full_eval": True}, "fp16_full_eval: transformers leaves the weights rounded"),
        ("SFTConfig", {"enable_jit_checkpoint": True}, "enable_jit_checkpoint: a run ends with a checkpoint"),
        ("SFTConfig", {"accelerator_config": {"even_batches": False}}, "accelerator_config: without even_batches"),
        ("SFTConfig", {"accelerator_config": {"evenbatches": True}}, "unknown key evenbatches; nearest valid: even_b"),
        ("DPOConfig", {"accelerator_config": "nowhere.json"}, "No such file or directory: 'nowhere.json'"),
        (
            "PPOConfig",
            {"ddp_static_graph": True},
            "ddp_static_graph: DDP adds up the gradients",
        ),
        ("GRPOConfig", {"accelerator_config": {"split_batches": True}}, "accelerator_config: with split_batches"),
        ("SFTConfig", {"optim_args": "betas=0.5"}, "optim_args: adamw_torch"),
        ("KTOConfig", {"optim": "adafactor", "optim_args": "clip_threshold=2"}, "optim_args: adafactor reads none"),
        ("RLOOConfig", {"optim_target_modules": ["q_proj"]}, "optim_target_modules: adamw_torch"),
        ("GRPOConfig", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: log-probs of a policy with noise"),
    ],
)
def test_options_of_transformers_without_effect_are_refused_by_name(config, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        getattr(align, config)(str(tmp_path), use_cpu=True, **options)


def test_rows_are_read_by_each_process(policy, tmp_path):
    args = DPOConfig(str(tmp_path), accelerator_config={"dispatch_batches": True}, **QUIET)
    with pytest.raises(ConfigError, match="accelerator_config: dispatch_batches sends"):
        DPOTrainer(policy, args=args, train_dataset=[{"prompt": "a", "chosen": "b", "rejected": "c"}])


def test_options_of_an_optimiser_that_reads_them(tmp_path):
    args = DPOConfig(str(tmp_path), optim="sgd", optim_args="momentum=0.5", **QUIET)
    trainer = DPOTrainer(tiny_model(toy.tokenizer()), args, rows_of("dpo", 4), processing_class=toy.tokenizer())
    assert trainer.create_optimizer().param_groups[0]["momentum"] == 0.5


def test_noise_in_the_embeddings_is_for_losses_without_a_reference(tmp_path):
    def trained(name, **options):
        tokenizer = toy.tokenizer()
        args = DPOConfig(str(tmp_path / name), max_steps=1, **QUIET, **options)
        trainer = DPOTrainer(tiny_model(tokenizer), args, rows_of("dpo", 8), processing_class=tokenizer)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    with pytest.raises(ConfigError, match="neftune_noise_alpha"):
        trained("dpo", neftune_noise_alpha=5.0)
    assert not torch.equal(trained("a", loss_type="simpo", neftune_noise_alpha=5.0), trained("b", loss_type="simpo"))
