"""Both engines, for every test that asks for one."""

import pytest

from align.rollout import make_engine
from align.rollout.engine import end_tokens
from tests.rollout.rollout_models import llama, needs_vllm, never_ending

BACKENDS = ["transformers", pytest.param("vllm", marks=needs_vllm)]


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def shared(backend):
    """Engines by (shape, dtype), each started once: starting and ending vLLM takes seconds."""
    made = {}
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture
def holding(backend, shared):
    """holding(model, seed=0, dtype=None): an engine with its weights, as if it were new. One at a time of a kind."""

    def give(model, seed: int = 0, dtype=None):
        config = model.config
        key = (config.tie_word_embeddings, config.hidden_size, dtype or model.dtype)
        if key in shared:
            shared[key].push(model, 0)
            shared[key].load_state_dict({"seed": seed, "calls": 0})
        else:
            shared[key] = make_engine(model, backend=backend, max_model_len=256, seed=seed, dtype=dtype)
        shared[key].eos_token_ids = end_tokens(model, None)
        return shared[key]

    return give


@pytest.fixture
def engine(holding):
    return holding(never_ending(llama()), seed=7)


@pytest.fixture
def make(backend):
    """New engines, closed when the test ends."""
    made = []

    def build(model, tokenizer=None, **options):
        made.append(make_engine(model, tokenizer, backend=backend, **{"max_model_len": 256, **options}))
        return made[-1]

    yield build
    for engine in made:
        engine.close()
