"""Requests as vLLM takes them in its own process, and what it answers."""

from align.rollout.types import Completion, Request


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
