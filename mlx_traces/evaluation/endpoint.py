"""A model behind an OpenAI-compatible server: which requests it gets, what is read from its replies, what is retried.

Chat prompts go to ``/chat/completions`` as turns, prompts with ``chat: false`` to ``/completions`` as one text. Where a
server splits the thought off (``reasoning_content`` or ``reasoning``), it is joined again, so that graders see all that
was sampled. What is sent is what the settings say; what they do not speak of, a repetition penalty say, is the server's
own. Redirects are not followed, and the key is sent to the given address alone. No MLX.
"""

import ipaddress
import json
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlx_traces.config import AnswerConfig, EndpointConfig, EvalConfig
from mlx_traces.errors import UserError, first_line
from mlx_traces.records import Problem
from mlx_traces.tasks.prompts import Prompt, as_text
from mlx_traces.text import clean

if TYPE_CHECKING:
    import httpx2


# Settings of a model that is loaded here; a server has settled them itself.
LOCAL = ("adapter", "weights", "dtype", "device", "trust_remote_code", "rows", "memory_limit")
ROUTES = ("/chat/completions", "/completions")
BACKOFF = 0.5  # seconds before the first repetition, twice as long before each further one
LONGEST_WAIT = 30.0  # seconds before a repetition, whatever the server asks for
LIST_TIMEOUT = 10.0  # seconds for the list of models
LISTED = 50  # models of that list that are kept
POLL = 0.1  # seconds between two looks at Ctrl-C
# A reply's most bytes: so many, and so many for each token that was asked for.
REPLY_BYTES, TOKEN_BYTES = 1 << 20, 1 << 10
NEUTRAL = {"top_k": 0, "min_p": 0.0}  # sampling by neither; a server that knows neither does the same without them


class Passing(Exception):
    """A fault that may be gone when the request is repeated; ``wait`` is how many seconds the server asks for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Ask:
    """One request: the problem's id, the path below the server's address, the JSON body, the prompt as text."""

    name: str
    path: str
    body: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Reply:
    """What a server answered.

    ``tokens`` are those of the completion as the server counts them, None if it does not say. ``finish_reason`` is the
    server's own word, ``"unknown"`` without one. ``model`` is the name that it gives to what answered, ``stop_string``
    the one that ended it, where it says so (vLLM's ``stop_reason``).
    """

    text: str
    tokens: int | None
    finish_reason: str
    model: str | None
    stop_string: str | None = None


# ------------------------------------------------------------------------------------------------------ settings


def behind(config: AnswerConfig) -> bool:
    """Whether a server answers in place of a model that is loaded here."""
    return isinstance(config, EvalConfig) and config.endpoint is not None


def settled(config: AnswerConfig) -> AnswerConfig:
    """Return the settings of an evaluation with the server's address as it is asked; nothing is sent yet.

    Raises:
        UserError: for a bad address, no model's name, and settings that make no sense with a server, or without one.
    """
    defaults = EvalConfig.model_fields
    if not behind(config):
        for name in EndpointConfig.model_fields:
            if getattr(config, name, defaults[name].default) != defaults[name].default:
                raise UserError(f"{_flag(name)} is for a server; name its address with --endpoint")
        return config
    for name in LOCAL:
        if getattr(config, name) != defaults[name].default:
            raise UserError(f"{_flag(name)} is for a model that is loaded here; leave it out with --endpoint")
    address = normalized(config.endpoint)
    if "model" not in config.model_fields_set or not config.model.strip() or not config.model.isprintable():
        raise UserError(f"--endpoint needs --model, the model's name at the server; {address}/models lists them")
    if "MLX_RANK" in os.environ:
        raise UserError("--endpoint is for one process, not for several by mlx.launch; see --concurrency")
    key(config)
    return config.model_copy(update={"endpoint": address})


def normalized(address: str) -> str:
    """Return a server's address up to its version: ``http://host:port/v1``; another path stays as it is given.

    Raises:
        UserError: for another scheme than http and https, for credentials, a query or a fragment in it.
    """
    try:
        parts = urlsplit(address.strip())
        host, _ = parts.hostname, parts.port
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
        UserError: if there is no such variable, or what it holds cannot be sent.
    """
    if config.api_key_env is None:
        return None
    value = os.environ.get(config.api_key_env, "").strip()
    if not value:
        raise UserError(f"--api-key-env {clean(config.api_key_env)[:80]}: no such environment variable, or it is empty")
    if not value.isascii() or not value.isprintable():
        raise UserError(f"--api-key-env {clean(config.api_key_env)[:80]}: its value cannot be a key")
    return value


def refuse_prefill(prompt: Prompt) -> None:
    """Raise UserError if a chat prompt opens the assistant's turn, for which servers have no common way."""
    if prompt.chat and prompt.prefill:
        raise UserError(
            f"prompt {prompt.name} opens the assistant's turn, which servers do not let one do in a common way; pass "
            "--prefill '', or a prompt with chat: false"
        )


def named(config: EvalConfig) -> str:
    """Return the model's name with the host that serves it, as tables show it: ``NAME@127.0.0.1:8080``."""
    return f"{config.model}@{urlsplit(config.endpoint).netloc}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------------------- requests and replies


def ask(config: EvalConfig, prompt: Prompt, problem: Problem, seed: int) -> Ask:
    """Put a problem into a request.

    A seed is sent with a temperature only: greedily it decides nothing, and mlx_lm.server batches no request that has
    one. ``top_k`` and ``min_p`` are then sent too, as a server's own are seldom 0.

    Args:
        config: settled settings.
        prompt: how the problem is asked.
        problem: which.
        seed: of this completion; servers take 31 bits of it.
    """
    body: dict[str, Any] = {
        "model": config.model,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "stream": False,
    }
    if config.temperature:
        body |= {"seed": seed & 0x7FFFFFFF, "top_k": config.top_k, "min_p": config.min_p}
    if prompt.stop:
        body["stop"] = list(prompt.stop)
    messages = prompt.messages(problem)
    if not prompt.chat:
        text = as_text(messages) + prompt.prefill
        return Ask(problem.id, "/completions", {**body, "prompt": text}, text)
    switch = {} if config.thinking is None else {"enable_thinking": config.thinking}
    if given := {**(config.template_args or {}), **switch}:
        body["chat_template_kwargs"] = given
    text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return Ask(problem.id, "/chat/completions", {**body, "messages": messages}, text)


def reply_of(content: bytes) -> Reply:
    """Read a server's reply, of either kind.

    Raises:
        Passing: if it is not one.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise Passing("the reply is not JSON") from None
    if not isinstance(body, dict):
        raise Passing(f"the reply is a JSON {type(body).__name__}, not an object")
    if body.get("error"):
        raise Passing(f"the reply is an error: {told(body)}")
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise Passing("the reply has no choices")
    part, name = (choice["message"], "content") if isinstance(choice.get("message"), dict) else (choice, "text")
    thought = part.get("reasoning_content") or part.get("reasoning")
    thought = thought if isinstance(thought, str) else ""
    if name not in part and not thought:
        raise Passing(f"the reply's choice has no {name}")
    usage, reason, stop = body.get("usage"), choice.get("finish_reason"), choice.get("stop_reason")
    return Reply(
        text=valid(joined(thought, _text(part.get(name)))),
        tokens=_count(usage.get("completion_tokens")) if isinstance(usage, dict) else None,
        finish_reason=clean(valid(reason))[:40] if isinstance(reason, str) and reason.strip() else "unknown",
        model=clean(valid(body["model"]))[:200] if isinstance(body.get("model"), str) else None,
        stop_string=valid(stop)[:200] if isinstance(stop, str) and stop else None,
    )


def joined(thought: str, content: str) -> str:
    """Put a thought that the server split off before what follows it, between the usual tags.

    Without anything after it the thought stays open: it was cut off, or ended the reply. One that the content holds
    already is not put there twice.
    """
    if not thought or thought.strip() in content:
        return content
    return f"<think>{thought}</think>{content}" if content else f"<think>{thought}"


def _text(content: Any) -> str:
    """Return a message's text: a string, or a list of parts; none is an empty one.

    Raises:
        Passing: if it is neither.
    """
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    if not isinstance(content, str):
        raise Passing("the reply's text is not one")
    return content


def _count(value: Any) -> int | None:
    """Return a server's count, None if it is not one."""
    return value if type(value) is int and 0 <= value < 1 << 31 else None


def valid(text: str) -> str:
    """Return a text without halves of a surrogate pair, which no file takes."""
    return text.encode("utf-8", "replace").decode()


def told(body: Any) -> str:
    """Return what an error's JSON says, on one line, as the servers word it."""
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return clean(valid(body if isinstance(body, str) else json.dumps(body)[:1_000]))[:200]


# -------------------------------------------------------------------------------------------------------- server


class Server:
    """The server of an evaluation's settled settings, asked by several threads; to be closed.

    ``notes`` are lines the user should see, each once.
    """

    def __init__(self, config: EvalConfig) -> None:
        import httpx2

        self.config, self.url, self.notes = config, config.endpoint, []
        self.known: list[str] | None = None
        self._key, self._refused = key(config), frozenset()
        self._client = httpx2.Client(
            timeout=config.timeout,
            limits=httpx2.Limits(max_connections=config.concurrency + 1),
            follow_redirects=False,
            trust_env=not _loopback(config.endpoint),  # no proxy stands between this machine and itself
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "mlx-traces"},
        )

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def models(self) -> list[str] | None:
        """Ask for the names of its models, once; None if it does not tell.

        Raises:
            UserError: if it cannot be reached, refuses the key, or redirects.
        """
        import httpx2

        try:
            status, _, content = self._send("GET", "/models", None, min(LIST_TIMEOUT, self.config.timeout))
            self._refuse(status, content, None)
            rows = json.loads(content).get("data") if status == 200 else None
            names = [clean(valid(row["id"]))[:200] for row in rows[:LISTED]]
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            raise UserError(
                f"{self.url} cannot be reached ({self._safe(first_line(error))}); start the server, or pass another "
                "--endpoint"
            ) from None
        except (Passing, httpx2.HTTPError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return None  # it has no such list, or a broken one, which is no reason to ask it nothing
        self.known = names
        return names

    def complete(self, one: Ask, halt: threading.Event) -> Reply | None:
        """Ask until there is an answer; None if it was halted before a repetition.

        Raises:
            UserError: if the server refuses the request, or it failed as often as the settings allow.
        """
        fault = Passing("never asked")
        for attempt in range(self.config.retries + 1):
            if attempt and halt.wait(_delay(attempt, fault.wait)):
                return None
            try:
                return self._once(one)
            except Passing as error:
                fault = error
        times = f"{attempt + 1} times" if attempt else "once"
        raise UserError(
            f"{self.url}, problem {one.name}: {self._safe(str(fault))}, asked {times}; when the server is well, go on "
            "with --resume"
        )

    def _once(self, one: Ask) -> Reply:
        """Ask once; what `NEUTRAL` names is left out from when the server says that it does not know it."""
        import httpx2

        body = {name: value for name, value in one.body.items() if name not in self._refused}
        try:
            status, wait, content = self._send("POST", one.path, body, self.config.timeout)
        except httpx2.TimeoutException:
            raise Passing(f"no whole reply in {self.config.timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise Passing(f"the connection failed ({first_line(error)})") from None
        if status in (408, 425, 429) or status >= 500:
            raise Passing(f"status {status} ({_said(content)})", wait)
        strange = {name for name, value in NEUTRAL.items() if body.get(name) == value and name in _said(content)}
        if status in (400, 422) and strange:
            self._refused |= strange
            self._note(f"the server knows no {' or '.join(sorted(self._refused))}, and was not sent it")
            return self._once(one)
        self._refuse(status, content, one)
        reply = reply_of(content)
        if reply.model and reply.model != self.config.model:
            self._note(f"the server calls the model that answered {reply.model}")
        return reply

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None, timeout: float
    ) -> tuple[int, float | None, bytes]:
        """Return a reply's status, the seconds that it asks to wait, and its content.

        Raises:
            Passing: if the reply is too long, in bytes or in time.
            httpx2.HTTPError: if the connection fails.
        """
        most, content = REPLY_BYTES + TOKEN_BYTES * self.config.max_tokens, bytearray()
        deadline = monotonic() + timeout
        with self._client.stream(method, self.url + path, json=body, auth=self._signed, timeout=timeout) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > most:
                    raise Passing(f"the reply is longer than {most:,} bytes, more than --max-tokens allows")
                if monotonic() > deadline:
                    raise Passing(f"no whole reply in {timeout:g} s")
            wait = response.headers.get("retry-after", "")
            return response.status_code, float(wait) if wait.isascii() and wait.isdigit() else None, bytes(content)

    def _signed(self, request: "httpx2.Request") -> "httpx2.Request":
        """Add the key; as this is the request's own way to sign, no .netrc is looked into."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _refuse(self, status: int, content: bytes, one: Ask | None) -> None:
        """Raise UserError for a status that repeating does not change; without a request only those of all requests."""
        if status in (401, 403):
            way = "check the key" if self._key else "it may want a key: pass --api-key-env NAME"
            raise UserError(f"{self.url} refuses ({status}: {self._safe(_said(content))}); {way}")
        if 300 <= status < 400:
            raise UserError(f"{self.url} sends requests elsewhere (status {status}); pass that address as --endpoint")
        if one is None or 200 <= status < 300:
            return
        has = f"; it has {', '.join(self.known[:5])}" if self.known and status in (400, 404) else ""
        raise UserError(
            f"{self.url}{one.path} refuses problem {one.name} ({status}: {self._safe(_said(content))}); check --model "
            f"and --max-tokens{has}"
        )

    def _safe(self, text: str) -> str:
        """Return a foreign text without the key."""
        return text.replace(self._key, "[key]") if self._key else text

    def _note(self, line: str) -> None:
        if line not in self.notes and len(self.notes) < 10:
            self.notes.append(self._safe(line))


def answers(server: Server, asks: Sequence[Ask], stop: Callable[[], bool] | None = None) -> Iterator[tuple[int, Reply]]:
    """Yield (index, reply) as they come, at most ``concurrency`` requests being under way.

    After ``stop`` says so, or a request has failed, none is begun, and those under way are waited for.

    Raises:
        UserError: if one has failed, after the others were yielded.
    """
    found: queue.SimpleQueue = queue.SimpleQueue()
    halt, turn, todo = threading.Event(), threading.Lock(), iter(enumerate(asks))

    def work() -> None:
        """Send requests until there are none; what is put last is None."""
        try:
            while not halt.is_set():
                with turn:
                    index, one = next(todo, (0, None))
                reply = server.complete(one, halt) if one else None
                if reply is None:
                    break
                found.put((index, reply))
        except BaseException as error:  # raised again where the replies are read
            found.put(error)
        finally:
            found.put(None)

    working, fault = min(server.config.concurrency, len(asks)), None
    for _ in range(working):
        threading.Thread(target=work, daemon=True).start()  # a second Ctrl-C does not wait for a reply
    try:
        while working:
            if stop and stop():
                halt.set()
            try:
                got = found.get(timeout=POLL)
            except queue.Empty:
                continue
            if got is None:
                working -= 1
            elif isinstance(got, BaseException):
                fault = fault or got
                halt.set()
            else:
                yield got
    finally:
        halt.set()
    if fault:
        raise fault


def _delay(attempt: int, wait: float | None) -> float:
    """Return the seconds before a repetition: doubled each time, spread at random, or what the server asks for."""
    seconds = BACKOFF * 2 ** (attempt - 1) * random.uniform(0.75, 1.25) if wait is None else wait
    return min(seconds, LONGEST_WAIT)


def _said(content: bytes) -> str:
    """Return the first line of what an error's reply says."""
    try:
        return told(json.loads(content))
    except (ValueError, RecursionError):
        return clean(content[:400].decode("utf-8", "replace"))[:200]


def _loopback(address: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
