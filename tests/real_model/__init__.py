"""Tests on a real pretrained chat model, SmolLM2-135M-Instruct; `python -m tests.real_model` makes its folder once."""
