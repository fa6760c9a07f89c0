"""The section `rollout` of a run whose completions come from servers."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from align.config.server_key import KEY_FILE, KEY_VARIABLE
from align.rollout.options import RolloutOptions

MEMORY = "/dev/shm"
HERE = ("127.0.0.1", "localhost", "::1")


class ServerOptions(RolloutOptions):
    """Servers that `align serve` started with the config of the run."""

    label = "backend server"
    backend: Literal["server"] = Field("server", description="vLLM servers, started by `align serve`.")
    urls: list[str] = Field(min_length=1, description="Addresses of the servers, as [http://127.0.0.1:8000].")
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
    transfer_folder: str = Field(
        MEMORY, description="Folder that trainer and servers share; weights go through it. Default: memory."
    )

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError(f"{url!r} is not an address such as http://127.0.0.1:8000")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError(f"a server is named twice in {', '.join(urls)}")
        return urls

    @model_validator(mode="after")
    def _reachable(self) -> "ServerOptions":
        away = [url for url in self.urls if urlsplit(url).hostname not in HERE]
        if away and self.transfer_folder == MEMORY:
            raise ValueError(f"{away[0]} is on another machine: name a transfer_folder that both can reach")
        return self
