"""Names that Python does not know are answered as on the command line: with what to write."""

import copy
import pickle
from dataclasses import dataclass

import pytest

import align
from align.config.names import check_arguments
from align.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "option", "said"),
    [
        ("RLOOConfig", "rollout_dtype", 'RLOOConfig; it is rollout={"dtype": ...} here'),
        ("GRPOConfig", "max_num_seqs", 'GRPOConfig; it is rollout={"max_num_seqs": ...} here'),
        ("DPOConfig", "xyzzy", "unknown argument xyzzy of DPOConfig; `help(DPOConfig)` lists them"),
        ("SFTConfig", "max_lenght", "nearest valid: max_length"),
        ("KTOConfig", "bta", "nearest valid: beta"),
        (
            "DPOConfig",
            "max_prompt_length",
            "Instead: max_length counts prompt and completion together",
        ),
        ("SFTConfig", "max_seq_length", "it is max_length here"),
        ("SFTTrainer", "max_seq_length", "it is max_length of SFTConfig here"),
        ("RLOOConfig", "rloo_k", "it is num_generations here"),
        ("KTOConfig", "generate_during_eval", "Instead: every evaluation shows num_logged_completions"),
        ("DPOTrainer", "tokenizer", "unknown argument tokenizer of DPOTrainer; it is processing_class here"),
        ("SFTTrainer", "train_datset", "nearest valid: train_dataset"),
        ("RLOOTrainer", "reward_function", "nearest valid: reward_funcs"),
        ("PPOTrainer", "num_generations", "an option of PPOConfig: PPOTrainer(args=PPOConfig(num_generations=...))"),
    ],
)
def test_an_unknown_argument(config, option, said):
    with pytest.raises(ConfigError) as error:
        getattr(align, config)(**{option: 1})
    assert said in str(error.value)
    assert error.value.key == option


def test_every_trainer_and_configuration_answers():
    for name in align.__all__:
        if name.endswith(("Trainer", "Config")):
            with pytest.raises(ConfigError, match=f"unknown argument nonsense of {name}"):
                getattr(align, name)(nonsense=1)


def test_the_valid_ones_pass_and_copies_are_made_as_before(tmp_path):
    config = align.DPOConfig(str(tmp_path), beta=0.25)
    assert [c.beta for c in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)))] == [0.25, 0.25]

    @dataclass
    class Own(align.DPOConfig):
        mine: int = 0

    class Open(align.DPOConfig):
        def __init__(self, **options):
            super().__init__(str(tmp_path), beta=options["half_beta"] * 2)

    assert Own(str(tmp_path), mine=3).mine == 3
    assert Open(half_beta=0.5).beta == 1.0
    check_arguments(Open, ["anything"])
