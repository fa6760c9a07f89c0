"""Both engines, for every test that asks for one."""

import pytest
from rollout_models import llama, needs_vllm, never_ending

from align.rollout import make_engine

BACKENDS = ["transformers", pytest.param("vllm", marks=needs_vllm)]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(backend):
    """One engine per back-end for all tests that only generate; its model never ends by itself."""
    made = make_engine(never_ending(llama()), backend=backend, max_model_len=256, seed=7)
    yield made
    made.close()


@pytest.fixture
def make(backend):
    """Engines that are closed when the test ends."""
    made = []

    def build(model, tokenizer=None, **options):
        made.append(make_engine(model, tokenizer, backend=backend, **{"max_model_len": 256, **options}))
        return made[-1]

    yield build
    for engine in made:
        engine.close()
