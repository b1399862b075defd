"""Completions of a model behind an OpenAI-compatible server: requests, replies, retries. No MLX.

Chat prompts go to ``/chat/completions`` as turns, prompts with ``chat: false`` to ``/completions`` as one text. If a
server returns the thought apart (``reasoning_content`` or ``reasoning``), it is put before the content again, so that
graders see the whole completion. Settings that are not sent, such as a repetition penalty, keep the server's values.
Redirects are not followed, and the key is sent to the given address alone.
"""

import json
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import httpx2

from mlx_traces.config import EvalConfig
from mlx_traces.errors import UserError, first_line
from mlx_traces.evaluation.completion import Completion
from mlx_traces.evaluation.endpoint import key, loopback
from mlx_traces.evaluation.evaluator import Plan, Source, sample_seed
from mlx_traces.records import Problem
from mlx_traces.runtime.files import held
from mlx_traces.runtime.interrupts import listening
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.tasks.prompts import Prompt, as_text
from mlx_traces.text import clean

BACKOFF = 0.5  # seconds before the first retry, twice as long before each further one
LONGEST_WAIT = 30.0  # seconds before a retry, whatever the server asks for
LIST_TIMEOUT = 10.0  # seconds for the list of models
LISTED = 50  # models of that list that are kept
POLL = 0.1  # seconds between two checks for Ctrl-C
# The largest reply, in bytes: REPLY_BYTES, and TOKEN_BYTES more for each token of --max-tokens.
REPLY_BYTES, TOKEN_BYTES = 1 << 20, 1 << 10
NEUTRAL = {"top_k": 0, "min_p": 0.0}  # values that change nothing, so they may be left out


class Passing(Exception):
    """A fault that a retry may overcome; ``wait`` is how many seconds the server asks for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Post:
    """One request for a completion.

    ``name`` is the problem's id, ``path`` follows the server's address, ``body`` is JSON, ``text`` the prompt as text,
    ``opened`` the prefill that ends it.
    """

    name: str
    path: str
    body: dict[str, Any]
    text: str
    opened: str = ""


@contextmanager
def opened(planned: Plan, path: Path, resume: bool) -> Iterator[tuple[Plan, RunFolder, Source]]:
    """Open and lock the run folder ``path``, and connect to the plan's server.

    Raises:
        UserError: if the run cannot be written there, was started with other settings, or the server refuses.
    """
    config = planned.config
    RunFolder(path).refuse(resume)
    with held(path / ".lock"), listening() as pressed:
        RunFolder(path).check(planned.identity(), planned.idle)
        server = Server(config)

        def generate(todo: list[tuple[Problem, int]]) -> Iterator[tuple[int, Completion]]:
            seeds = [sample_seed(config.seed, problem.id, sample) for problem, sample in todo]
            pairs = zip(todo, seeds, strict=True)
            posts = [post_of(config, planned.prompt, problem, seed) for (problem, _), seed in pairs]
            return answers(server, posts, pressed)

        try:
            known = server.models()
            details = {"server": {"url": server.url, "models": known}, "concurrency": config.concurrency}
            if planned.prompt.chat and planned.prompt.stop and not config.stop_in_thoughts:
                server.notes.append("a server applies stop strings within thoughts too")
            if known and config.model not in known:
                server.notes.append(f"the server's list of models does not name {config.model}")
            yield planned, RunFolder(path), Source(generate, {}, details, server.notes)
        finally:
            server.close()


# ------------------------------------------------------------------------------------------- requests and replies


def post_of(config: EvalConfig, prompt: Prompt, problem: Problem, seed: int) -> Post:
    """Put a problem into a request.

    The seed is sent only with a temperature: greedy decoding does not use it, and mlx_lm.server does not batch requests
    with a seed. ``top_k`` and ``min_p`` are then sent too, since a server's defaults are seldom 0.

    Args:
        config: resolved settings.
        prompt: the prompt style.
        problem: the problem that fills it in.
        seed: seed of this completion; its low 31 bits are sent.
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
        return Post(problem.id, "/completions", {**body, "prompt": text}, text, prompt.prefill)
    switch = {} if config.thinking is None else {"enable_thinking": config.thinking}
    if given := {**(config.template_args or {}), **switch}:
        body["chat_template_kwargs"] = given
    text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return Post(problem.id, "/chat/completions", {**body, "messages": messages}, text)


def reply_of(content: bytes, post: Post) -> tuple[Completion, str | None]:
    """Read a server's reply to either kind of request; return the completion and the server's name for the model.

    ``tokens`` are as the server counts them, ``finish_reason`` is its own word, or ``"unknown"``, and ``stop_string``
    is set where it says which one ended the completion (vLLM's ``stop_reason``).

    Raises:
        Passing: if it is not such a reply.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise Passing("the reply is not JSON") from None
    if not isinstance(body, dict):
        raise Passing(f"the reply is a JSON {type(body).__name__}, not an object")
    if body.get("error"):
        raise Passing(f"the reply is an error: {error_text(content)}")
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
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    completion = Completion(
        prompt=post.text,
        opened=post.opened,
        text=valid(joined(thought, text_of(part.get(name)))),
        tokens=count if type(count) is int and 0 <= count < 1 << 31 else None,
        finish_reason=clean(valid(reason))[:40] if isinstance(reason, str) and reason.strip() else "unknown",
        stop_string=valid(stop)[:200] if isinstance(stop, str) and stop else None,
    )
    return completion, clean(valid(body["model"]))[:200] if isinstance(body.get("model"), str) else None


def text_of(content: Any) -> str:
    """Return a message's text: a string, or a list of parts; None counts as empty.

    Raises:
        Passing: if it is neither.
    """
    parts = content if isinstance(content, list) else [{"type": "text", "text": "" if content is None else content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise Passing("the reply's text is neither a string nor text parts")
    return "".join(texts)


def joined(thought: str, content: str) -> str:
    """Put a thought that the server returned apart before the content, between the usual tags.

    Without content the thought stays open: it was cut off, or ended the reply. Content that contains the thought
    already is returned as it is.
    """
    if not thought or thought.strip() in content:
        return content
    return f"<think>{thought}</think>{content}" if content else f"<think>{thought}"


def valid(text: str) -> str:
    """Return a text with ``?`` for lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def error_text(content: bytes) -> str:
    """Return the message of an error reply, in the server's words, on one line."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return clean(content[:400].decode("utf-8", "replace"))[:200]
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return clean(valid(body if isinstance(body, str) else json.dumps(body)[:1_000]))[:200]


# -------------------------------------------------------------------------------------------------------- server


class Server:
    """A client of the server that the resolved settings name; several threads may use it. Close it at the end.

    ``notes`` are lines that the user should see, each once.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config, self.url, self.notes = config, config.endpoint, []
        self.known: list[str] | None = None
        try:
            httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise UserError(f"--endpoint {self.url}: not an address ({first_line(error)})") from None
        self._key, self._refused = key(config), frozenset()
        self._client = httpx2.Client(
            timeout=config.timeout,
            limits=httpx2.Limits(max_connections=config.concurrency + 1),
            follow_redirects=False,
            trust_env=not loopback(config.endpoint),  # no proxy stands between this machine and itself
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "mlx-traces"},
        )

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def models(self) -> list[str] | None:
        """Request the names of the server's models, once; return None if it does not list them.

        Raises:
            UserError: if it cannot be reached, refuses the key, or redirects.
        """
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
            return None  # no such list, or a broken one; completions may work all the same
        self.known = names
        return names

    def complete(self, post: Post, halt: threading.Event) -> Completion | None:
        """Send a request, with retries; return None if ``halt`` was set before a retry.

        Raises:
            UserError: if the server refuses the request, or all retries fail.
        """
        fault = Passing("not sent")
        for attempt in range(self.config.retries + 1):
            if attempt:
                seconds = BACKOFF * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
                if halt.wait(min(seconds if fault.wait is None else fault.wait, LONGEST_WAIT)):
                    return None
            try:
                return self._once(post)
            except Passing as error:
                fault = error
        times = f"{attempt + 1} times" if attempt else "once"
        raise UserError(
            f"{self.url}, problem {post.name}: {self._safe(str(fault))}, tried {times}; when the server works again, "
            "go on with --resume"
        )

    def _once(self, post: Post) -> Completion:
        """Send a request once, and again without the settings of `NEUTRAL` that the server does not know."""
        body = {name: value for name, value in post.body.items() if name not in self._refused}
        try:
            status, wait, content = self._send("POST", post.path, body, self.config.timeout)
        except httpx2.TimeoutException:
            raise Passing(f"no whole reply in {self.config.timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise Passing(f"the connection failed ({first_line(error)})") from None
        if status in (408, 425, 429) or status >= 500:
            raise Passing(f"status {status} ({error_text(content)})", wait)
        if status in (400, 422):
            reason = error_text(content)
            if strange := {name for name, value in NEUTRAL.items() if body.get(name) == value and name in reason}:
                self._refused |= strange
                self._note(f"the server does not know {' or '.join(sorted(self._refused))}; not sent")
                return self._once(post)
        self._refuse(status, content, post)
        completion, model = reply_of(content, post)
        if model and model != self.config.model:
            self._note(f"the server's name for the model that answered is {model}")
        return completion

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None, timeout: float
    ) -> tuple[int, float | None, bytes]:
        """Return a reply's status, its ``Retry-After`` in seconds, and its content.

        ``timeout`` bounds the wait for each piece of the headers, since the client shows nothing before they are
        complete, and the whole time from the request on as soon as there is content.

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

    def _signed(self, request: httpx2.Request) -> httpx2.Request:
        """Add the key; a request with its own ``auth`` does not read .netrc."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _refuse(self, status: int, content: bytes, post: Post | None) -> None:
        """Raise UserError for a status that no retry changes; for the model list (no post) only 401, 403 and 3xx."""
        if status in (401, 403):
            way = "check the key" if self._key else "it may need a key: pass --api-key-env NAME"
            raise UserError(f"{self.url} refuses ({status}: {self._safe(error_text(content))}); {way}")
        if 300 <= status < 400:
            raise UserError(f"{self.url} redirects (status {status}); pass the address it redirects to as --endpoint")
        if post is None or 200 <= status < 300:
            return
        has = f"; it has {', '.join(self.known[:5])}" if self.known and status in (400, 404) else ""
        raise UserError(
            f"{self.url}{post.path} refuses problem {post.name} ({status}: {self._safe(error_text(content))}); check "
            f"--model and --max-tokens{has}"
        )

    def _safe(self, text: str) -> str:
        """Return a text from the server without the key."""
        return text.replace(self._key, "[key]") if self._key else text

    def _note(self, line: str) -> None:
        if line not in self.notes and len(self.notes) < 10:
            self.notes.append(self._safe(line))


def answers(
    server: Server, posts: Sequence[Post], stop: Callable[[], bool] | None = None
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, completion) as replies come, with at most ``concurrency`` requests at a time.

    Once ``stop`` returns True or a request has failed, no more are sent; replies to those already sent are yielded.

    Raises:
        UserError: if a request has failed, after the other replies were yielded.
    """
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    halt, turn, todo = threading.Event(), threading.Lock(), iter(enumerate(posts))

    def work() -> None:
        """Send requests until there are none left; put None last."""
        try:
            while not halt.is_set():
                with turn:
                    index, post = next(todo, (0, None))
                completion = server.complete(post, halt) if post else None
                if completion is None:
                    break
                inbox.put((index, completion))
        except BaseException as error:  # raised again by the reader
            inbox.put(error)
        finally:
            inbox.put(None)

    working, fault = min(server.config.concurrency, len(posts)), None
    for _ in range(working):
        threading.Thread(target=work, daemon=True).start()  # a second Ctrl-C does not wait for a reply
    try:
        while working:
            if stop and stop():
                halt.set()
            try:
                got = inbox.get(timeout=POLL)
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
