"""Settings of an evaluation whose model runs behind an OpenAI-compatible server: checks, address, key. No MLX."""

import ipaddress
import os
from urllib.parse import urlsplit

from mlx_traces.config import AnswerConfig, EndpointConfig, EvalConfig
from mlx_traces.errors import UserError, first_line
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.text import clean

# Settings of a model that is loaded here; a server has its own.
LOCAL = ("adapter", "weights", "dtype", "device", "trust_remote_code", "rows", "memory_limit")
ROUTES = ("/chat/completions", "/completions")


def behind(config: AnswerConfig) -> bool:
    """Whether a server answers in place of a model that is loaded here."""
    return isinstance(config, EvalConfig) and config.endpoint is not None


def resolved(config: AnswerConfig) -> AnswerConfig:
    """Return the settings with the server's address in its normal form; nothing is sent yet.

    Raises:
        UserError: for a bad address, a missing model name, and settings that do not go with a server, or need one.
    """
    served = behind(config)
    local, remote = "a model that is loaded here; leave it out with", "a server; name its address with"
    for name in LOCAL if served else EndpointConfig.model_fields:
        default = EvalConfig.model_fields[name].default
        if getattr(config, name, default) != default:
            raise UserError(f"--{name.replace('_', '-')} is for {local if served else remote} --endpoint")
    if not served:
        return config
    if config.bounded:
        raise UserError("--think-tokens and --think-at-least are for a model that is loaded here, not with --endpoint")
    address = normalized(config.endpoint)
    if "model" not in config.model_fields_set or not config.model.strip() or not config.model.isprintable():
        raise UserError(f"--endpoint needs --model, the model's name at the server; {address}/models lists them")
    if "MLX_RANK" in os.environ:
        raise UserError("--endpoint is for one process, not for several by mlx.launch; see --concurrency")
    key(config)
    return config.model_copy(update={"endpoint": address})


def normalized(address: str) -> str:
    """Return a server's address up to its version, ``http://host:port/v1``; a path other than `ROUTES` is kept.

    Raises:
        UserError: for another scheme than http and https, for credentials, a query or a fragment in it.
    """
    try:
        parts = urlsplit(address.strip())
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as error:
        raise UserError(f"--endpoint: not an address ({first_line(error)}); give http://HOST:PORT") from None
    if parts.username is not None or parts.password is not None:
        raise UserError("--endpoint: an address with credentials in it; pass the key's variable as --api-key-env NAME")
    if parts.query or parts.fragment:
        raise UserError("--endpoint: an address with '?' or '#' in it; give it up to the version, http://host:port/v1")
    if parts.scheme not in ("http", "https") or not host or not address.strip().isprintable() or " " in address.strip():
        raise UserError(f"--endpoint {clean(address)[:80]}: give an http or https address, as http://127.0.0.1:8080")
    path = parts.path.rstrip("/")
    path = next((path.removesuffix(route) for route in ROUTES if path.endswith(route)), path)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def key(config: EvalConfig) -> str | None:
    """Return the server's key, from the environment variable that the settings name; None if they name none.

    Raises:
        UserError: if the variable is missing or empty, or its value is not printable ASCII.
    """
    if config.api_key_env is None:
        return None
    value = os.environ.get(config.api_key_env, "").strip()
    if not value:
        raise UserError(f"--api-key-env {clean(config.api_key_env)[:80]}: no such environment variable, or it is empty")
    if not value.isascii() or not value.isprintable():
        raise UserError(f"--api-key-env {clean(config.api_key_env)[:80]}: not printable ASCII; set it to the key alone")
    return value


def refuse_prefill(prompt: Prompt) -> None:
    """Raise UserError if a chat prompt opens the assistant's turn: servers have no common way to pass that."""
    if prompt.chat and prompt.prefill:
        raise UserError(
            f"prompt {prompt.name} opens the assistant's turn, and servers have no common way to pass that; pass "
            "--prefill '', or a prompt with chat: false"
        )


def named(config: EvalConfig) -> str:
    """Return the model's name with the host that serves it, as tables show it: ``NAME@127.0.0.1:8080``."""
    return f"{config.model}@{urlsplit(config.endpoint).netloc}"


def loopback(address: str) -> bool:
    """Whether an address is on the loopback interface."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
