"""What vLLM loads in each of its processes through its entry point `vllm.general_plugins`."""

from contextlib import suppress

TRANSFER = "align"


def register() -> None:
    """Makes our transfer of weights known to vLLM by name. Nothing else is imported until a server asks for it."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    with suppress(ValueError):  # known already
        WeightTransferEngineFactory.register_engine(TRANSFER, "align.rollout.server.worker", "Receiver")
