"""Requests as vLLM takes them in its own process, and what it answers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from align.rollout.types import Completion, OnDone, Request
from align.rollout.vllm_versions import known_names


def vllm_params(request: Request):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = request.params
    return SamplingParams(
        n=params.n,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        seed=request.seed,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=list(request.stop_ids),
        ignore_eos=True,  # of the configuration, which the request may not name
        logprobs=None if params.greedy else 0,  # 0: of the drawn token only
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # each request has its own object
    )


def completion(output, request: Request) -> Completion:
    logprobs = None if request.params.greedy else output.logprobs.logprobs
    return Completion(list(output.token_ids), logprobs, output.finish_reason)


@contextmanager
def stepping(engine, step: Callable[[], list]) -> Iterator[None]:
    """With another `step` of vLLM's engine in the place of its own, or of what is in that place already."""
    before = vars(engine).get("step")
    engine.step = step
    try:
        yield
    finally:
        if before is None:
            del engine.step
        else:
            engine.step = before


@contextmanager
def told_of(llm, requests: list[Request], done: OnDone) -> Iterator[None]:
    """While `LLM.generate` completes these requests, `done` is told of each when its last token is there. vLLM itself
    says nothing before all are: so what every step of its engine gives is looked at."""
    engine = llm.llm_engine
    with known_names():
        first, step = llm.request_counter.counter, engine.step

    def looked_at() -> list:
        outputs = step()
        for output in outputs:
            if output.finished:
                index = int(output.request_id) - first
                done(index, [completion(one, requests[index]) for one in output.outputs])
        return outputs

    with stepping(engine, looked_at):
        yield
