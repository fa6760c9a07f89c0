"""The section `rollout` of a run whose completions come from servers."""

from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from align.config.addresses import LOOPBACK
from align.config.secrets import masked_text
from align.config.server_key import KEY_FILE, KEY_VARIABLE
from align.rollout.options import VLLMSettings

MEMORY = "/dev/shm"
# One address need not be written as a list.
Addresses = Annotated[
    list[str],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=list[str] | str),
]


class ServerOptions(VLLMSettings):
    """Servers that `align serve` started with the config of the run, and what it starts them with."""

    start_only: ClassVar = (
        "gpu_memory_utilization",
        "kv_cache_gib",
        "engine_options",
    )  # of the servers, not of the engine

    label = "backend server"
    backend: Literal["server"] = Field("server", description="vLLM servers, started by `align serve`.")
    urls: Addresses = Field(min_length=1, description="Addresses of the servers, as [http://127.0.0.1:8000].")
    api_key_env: str = Field(KEY_VARIABLE, description="Environment variable with the servers' key.")
    api_key_file: str | None = Field(
        None, description=f"File with the key, where the variable is not set [{KEY_FILE}]."
    )
    timeout: float = Field(
        60, gt=0, allow_inf_nan=False, description="Seconds for any answer, and for a sign of life during completions."
    )
    generation_limit: float = Field(
        7200, gt=0, allow_inf_nan=False, description="Seconds for all completions of one call."
    )
    on_engine_failure: Literal["stop", "wait"] = Field(
        "stop", description="With a server that does not answer: stop the run, or wait for it to come back."
    )
    wait_limit: float = Field(600, gt=0, allow_inf_nan=False, description="Seconds to wait for a lost server.")
    transfer: Literal["auto", "files", "ipc", "nccl", "gloo"] = Field(
        "auto",
        description="How weights get to the servers: files, ipc (all on one GPU), nccl (between GPUs) or gloo (between "
        "machines, over the CPUs). auto: ipc where it can be, else files.",
    )
    transfer_folder: str = Field(
        MEMORY,
        description="Folder that trainer and servers share, for files and adapters. Default: memory.",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="A server's share of its GPU's memory, weights included; CUDA only."
    )

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            shown = masked_text(url if "://" in url else url.rpartition("@")[2])
            if not is_address(url):
                raise ValueError(f"{shown!r} is not an address such as http://127.0.0.1:8000")
            if "@" in urlsplit(url).netloc:
                raise ValueError(
                    f"{shown} holds a user or a password: the servers' key belongs in the environment "
                    "variable of api_key_env, or in api_key_file"
                )
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError(f"a server is named twice in {', '.join(urls)}")
        return urls

    @model_validator(mode="after")
    def _reachable(self) -> "ServerOptions":
        direct = self.transfer in ("ipc", "nccl", "gloo")
        if direct and self.on_engine_failure == "wait":
            raise ValueError(
                f"with transfer: {self.transfer} no server can be given its weights again: on_engine_failure: wait "
                "needs transfer: files"
            )
        away = [url for url in self.urls if urlsplit(url).hostname not in LOOPBACK]
        if away and self.transfer == "ipc":
            raise ValueError(
                f"{away[0]} is on another machine, and transfer: ipc needs one GPU: use nccl, gloo or files"
            )
        if away and self.transfer_folder == MEMORY and not direct:
            raise ValueError(
                f"{away[0]} is on another machine: name a transfer_folder that both can reach, or set transfer to nccl "
                "or gloo"
            )
        return self

    def engine_arguments(self) -> dict[str, Any]:
        return {name: value for name, value in super().engine_arguments().items() if name not in self.start_only}


def is_address(url: str) -> bool:
    """http(s), a host, and a port that is one if there is any."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an open bracket, a port that is no number
        return False
