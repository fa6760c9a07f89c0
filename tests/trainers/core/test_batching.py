"""Which layout batches get."""

from dataclasses import dataclass

import pytest

from align import DPOConfig, ReMaxConfig, RewardConfig
from align.errors import ConfigError
from align.trainers.core.batching import BatchingOptions, resolve_layout


def obstacles(*reasons):
    """A generator that notes how far it was read."""
    obstacles.seen = []
    for reason in reasons:
        obstacles.seen.append(reason)
        yield reason


@pytest.mark.parametrize("batching, reasons, expected, seen", [
    ("auto", [None, None], True, [None, None]),
    ("shared_prefix", [None], True, [None]),
    ("padded", [None, "it has no positions"], False, []),
    ("auto", [None, "it has no positions", "another"], False, [None, "it has no positions"]),
])  # fmt: skip
def test_every_model_must_be_able_to(batching, reasons, expected, seen):
    found = obstacles(*reasons)
    obstacles.seen = []
    assert resolve_layout(batching, found) is expected and obstacles.seen == seen


def test_a_fallback_is_a_warning_and_a_refusal_an_error(caplog):
    assert not resolve_layout("auto", ["its attention is eager"])
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "its attention is eager" in record.message
    caplog.clear()
    assert not resolve_layout("padded", ["its attention is eager"]) and not caplog.records
    with pytest.raises(ConfigError, match="shared_prefix cannot be used with this model: its attention is eager"):
        resolve_layout("shared_prefix", ["its attention is eager"])


def test_the_option_is_checked():
    class Further:
        def __post_init__(self):
            self.went_on = True

    @dataclass
    class Config(BatchingOptions, Further):
        pass

    assert Config().went_on and Config().batching == "auto"
    with pytest.raises(ConfigError, match="batching cannot be 'packed'; valid: auto, shared_prefix, padded"):
        Config(batching="packed")


@pytest.mark.parametrize("config", [DPOConfig, RewardConfig, ReMaxConfig])
def test_compiling_the_whole_model_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="torch_compile: the head and the attention"):
        config(output_dir=str(tmp_path), torch_compile=True, report_to="none")
