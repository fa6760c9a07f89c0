"""Completions for trainers, best-of-n and evaluation: one engine interface, vLLM and transformers behind it."""

from align.rollout.engine import RolloutEngine
from align.rollout.make import choose_backend, make_engine, register_engine, rollout_options
from align.rollout.options import RolloutOptions, VLLMOptions
from align.rollout.types import Completion, PushReport, Rollout, SamplingParams

__all__ = [
    "Completion",
    "PushReport",
    "Rollout",
    "RolloutEngine",
    "RolloutOptions",
    "SamplingParams",
    "VLLMOptions",
    "choose_backend",
    "make_engine",
    "register_engine",
    "rollout_options",
]
