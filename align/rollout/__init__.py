"""Completions for trainers, best-of-n and evaluation: one engine interface, vLLM and transformers behind it."""

from align.rollout.engine import RolloutEngine
from align.rollout.make import choose_backend, make_engine, register_engine
from align.rollout.types import Completion, PushReport, Rollout, SamplingParams

__all__ = [
    "Completion",
    "PushReport",
    "Rollout",
    "RolloutEngine",
    "SamplingParams",
    "choose_backend",
    "make_engine",
    "register_engine",
]
