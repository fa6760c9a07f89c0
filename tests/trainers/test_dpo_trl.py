"""DPOTrainer against TRL's: the same loss and gradient norm on the same pairs and models, and the same run.

Both tokenise the same texts, to the same ids (checked), and none is cut: TRL would cut elsewhere.
"""

import dataclasses
import math

import pytest
import torch

from align.data.tokenize import tokenize_pairs
from align.modeling.load import load_policy, load_tokenizer
from align.trainers.dpo import DPOTrainer
from tests.trainers.pairs.preference_runs import dpo_config, toy_pairs
from tests.trainers.tiny_runs import QUIET, logged, parameters

LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
DIVERGENCES = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
}


def cases():
    for loss in LOSSES:
        base = {"loss_type": [loss]}
        if loss != "sft":
            base["beta"] = 0.5 if loss == "sigmoid_norm" else 0.2
        if loss in SMOOTHED:
            base["label_smoothing"] = 0.1
        if loss == "discopop":
            base["discopop_tau"] = 0.07
        yield pytest.param(base, id=loss)
        # each loss with one divergence, and sigmoid with all
        if loss in OF_DIFFERENCES:
            number = OF_DIFFERENCES.index(loss)
            for name in list(DIVERGENCES) if number == 0 else [list(DIVERGENCES)[number % 3]]:
                yield pytest.param({**base, **DIVERGENCES[name]}, id=f"{loss}-{name}")
        if loss in ("sigmoid", "ipo", "aot", "bco_pair"):
            yield pytest.param({**base, "ld_alpha": 0.4}, id=f"{loss}-ld_alpha")
        # not sft: TRL multiplies its mean over all pairs by each pair's weight
        if loss in ("sigmoid", "hinge", "robust", "sppo_hard"):
            yield pytest.param({**base, "use_weighting": True}, id=f"{loss}-weighted")
    mixed = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.2}
    yield pytest.param(mixed, id="mixture")


@pytest.fixture(scope="module")
def pairs(policy):
    return tokenize_pairs(toy_pairs(12), load_tokenizer(policy), max_length=None)


@pytest.fixture(scope="module")
def moved(policy, tmp_path_factory) -> str:
    """A policy that is not the reference any more."""
    model = load_policy(policy)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    folder = tmp_path_factory.mktemp("moved")
    model.save_pretrained(folder)
    load_tokenizer(policy).save_pretrained(folder)
    return str(folder)


def of_trl(model: str, reference: str | None, pairs, folder, **options):
    """TRL's trainer, on the same token ids as ours."""
    import trl

    settings = {
        **QUIET, "output_dir": str(folder), "bf16": False, "gradient_checkpointing": False, "max_length": None,
        "per_device_train_batch_size": len(pairs),
    }  # fmt: skip
    trainer = trl.DPOTrainer(
        load_policy(model),
        None if reference is None else load_policy(reference),
        args=trl.DPOConfig(**{**settings, **options}),
        train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=load_tokenizer(model),
    )
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert trainer.train_dataset[name] == pairs[name]
    return trainer


@pytest.fixture(scope="module")
def theirs(policy, moved, pairs, tmp_path_factory):
    """TRL's trainer of a moved policy, by whether it weighs pairs. To build one takes long, so they serve all cases."""
    folder = tmp_path_factory.mktemp("trl")
    return {weigh: of_trl(moved, policy, pairs, folder, use_weighting=weigh) for weigh in (False, True)}


def one_step(trainer, pairs, *, gradient: bool, **options) -> dict[str, float]:
    """Loss, gradient norm and metrics of TRL's trainer with these options, as its constructor sets them."""
    trainer.loss_types = options["loss_type"]
    trainer.loss_weights = options.get("loss_weights") or [1.0] * len(trainer.loss_types)
    for name, default in trainer_defaults().items():
        setattr(trainer, name, options.get(name, default))
    trainer.args.discopop_tau = options.get("discopop_tau", 0.05)
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    with torch.set_grad_enabled(gradient):
        loss = trainer.compute_loss(trainer.model, batch)
    found = {name: values[0] for name, values in trainer._metrics["train"].items()} | {"loss": loss.item()}
    if gradient:
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None])
        found["grad_norm"] = norms.norm().item()
    return found


def trainer_defaults() -> dict:
    import trl

    names = ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha")
    fields = {field.name: field.default for field in dataclasses.fields(trl.DPOConfig)}
    return {name: fields[name] for name in names}


@pytest.mark.parametrize("options", cases())
def test_one_step_has_the_same_loss_and_gradient(options, policy, moved, pairs, theirs, tmp_path):
    settings = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": len(pairs), "max_length": None}
    reference = None if options["loss_type"] == ["sft"] else policy
    ours = DPOTrainer(moved, dpo_config(tmp_path, **settings, **options), pairs, ref_model=reference)
    ours.train()
    weigh = options.get("use_weighting", False)
    # TRL cannot backpropagate through weighted hinge losses: it multiplies the output of a ReLU in place
    gradient = not (weigh and options["loss_type"] == ["hinge"])
    expected = one_step(theirs[weigh], pairs, gradient=gradient, **options)
    assert logged(ours, "loss")[0] == pytest.approx(expected["loss"], rel=1e-5)
    assert math.isfinite(logged(ours, "loss")[0]) and logged(ours, "grad_norm")[0] > 0
    if gradient:
        assert logged(ours, "grad_norm")[0] == pytest.approx(expected["grad_norm"], rel=1e-4)
    names = ["logps/chosen", "logps/rejected"]
    if options["loss_type"] != ["sft"] and "f_divergence_type" not in options:
        names += ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    for name in names:
        assert logged(ours, name)[0] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_is_the_same(cached, policy, pairs, tmp_path):
    """Five steps of four pairs in the order of the data, with a reference of their own or cached log-probs."""
    settings = {
        "max_steps": 5, "learning_rate": 2e-3, "per_device_train_batch_size": 4, "precompute_ref_log_probs": cached,
        "train_sampling_strategy": "sequential", "max_length": None,
    }  # fmt: skip
    ours = DPOTrainer(policy, dpo_config(tmp_path / "ours", **settings), pairs)
    ours.train()
    theirs = of_trl(policy, None, pairs, tmp_path / "theirs", **settings)
    theirs.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-5)
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-4)
    for name, weight in parameters(theirs.model).items():
        # a hundredth of how far Adam has moved them, by gradients whose last bit processors differ in
        torch.testing.assert_close(ours.model.get_parameter(name), weight, rtol=0, atol=1e-4, msg=name)
