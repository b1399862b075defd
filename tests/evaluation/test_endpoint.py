"""Models behind a server: what is sent, what becomes of every fault, and mlx_lm's own server beside our engine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

import mlx_traces
from mlx_traces.cli import main
from mlx_traces.config import CompareConfig, EvalConfig, StudyConfig, build
from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison, endpoint, server
from mlx_traces.evaluation.evaluator import plan
from mlx_traces.pipelines import compare, study, verify
from mlx_traces.records import Problem
from mlx_traces.report import tables
from mlx_traces.runtime.interrupts import Stopped
from mlx_traces.tasks.prompts import Prompt

ROOT = Path(__file__).parents[2]
SMALL = {"model": "served", "task": "countdown", "prompt": "thinking", "limit": 6, "max_tokens": 64, "retries": 2}
KEY = "sk-very-secret-0123456789"


class Fake(ThreadingHTTPServer):
    """A server that answers as ``respond(number, path, body)`` says: (status, headers, content), or what it raises.

    ``asked`` are the requests, (path, body, headers) each; ``most`` is how many were under way at once.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.lock, self.under_way, self.most = [], threading.Lock(), 0, 0
        self.respond = lambda number, path, body: said("<answer>1 + 1</answer>")
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, address):
        """Say nothing: connections are lost on purpose."""


class Handler(BaseHTTPRequestHandler):
    wbufsize = -1  # one packet an answer

    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        listener = self.server
        with listener.lock:
            number = sum(path != "/v1/models" for path, _, _ in listener.asked)
            listener.asked.append((self.path, body, dict(self.headers)))
            listener.under_way += 1
            listener.most = max(listener.most, listener.under_way)
        try:
            if body is None:
                status, headers, content = 200, {}, {"data": [{"id": "served"}, {"id": "other"}]}
            else:
                status, headers, content = listener.respond(number, self.path, body)
        finally:
            with listener.lock:
                listener.under_way -= 1
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


def said(text, usage=7, **message):
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
    body = {"model": "served", "choices": [choice]}
    return 200, {}, body if usage is None else {**body, "usage": {"completion_tokens": usage}}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("mlx_traces.evaluation.server.BACKOFF", 0.001)
    listener = Fake()
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield listener
    listener.shutdown()
    listener.server_close()


def evaluated(fake, out, **changes):
    return mlx_traces.evaluate(endpoint=fake.url, out=out, **{**SMALL, **changes})


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


def posts(fake):
    return [body for path, body, _ in fake.asked if path != "/v1/models"]


# ------------------------------------------------------------------------------------------------- what is sent


def test_a_run_by_a_server_is_a_run_as_any_other(fake, tmp_path):
    result = evaluated(fake, tmp_path / "run")
    assert result.model == f"served@127.0.0.1:{fake.server_port}" and result.total_questions == 6
    assert result.mean_tokens == 7 and result.peak_memory_gb is None and result.notes == []
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["server"] == {"url": f"{fake.url}/v1", "models": ["served", "other"]}
    assert run["identity"]["endpoint"] == f"{fake.url}/v1" and not {"timeout", "retries"} & set(run["identity"])
    assert verify.verify(tmp_path / "run") == ("6 samples, verdicts and figures agree", [])
    assert {body["messages"][0]["content"] for body in posts(fake)} == {
        row["prompt"].removeprefix("user: ") for row in rows_of(tmp_path / "run")
    }
    assert all(
        {**body, "messages": 0}
        == {"model": "served", "max_tokens": 64, "temperature": 0, "top_p": 1, "stream": False, "messages": 0}
        for body in posts(fake)
    )
    local = plan(EvalConfig(limit=6)).identity()
    assert "endpoint" not in local and "concurrency" not in local  # those of before stay what they are


def test_turns_stops_and_sampling_are_sent():
    config = build(
        EvalConfig, {**SMALL, "endpoint": "http://h", "temperature": 0.7, "top_p": 0.9, "top_k": 5, "thinking": False}
    )
    prompt = Prompt("p", "What is {question}?", "Be brief.", shots=(("1 + 1?", "2"),), stop=("\n\n", "Q:"))
    problem = Problem("p-1", {"question": "2 + 2"}, "4")
    asked = server.post_of(config, prompt, problem, (1 << 63) + 5)
    assert asked.path == "/chat/completions" and asked.body == {
        "model": "served",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "What is 2 + 2?"},
        ],
        **{"max_tokens": 64, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.0, "seed": 5, "stream": False},
        "stop": ["\n\n", "Q:"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    given = server.post_of(config.model_copy(update={"template_args": {"effort": 2}}), prompt, problem, 5)
    assert given.body["chat_template_kwargs"] == {"effort": 2, "enable_thinking": False}
    plain = Prompt("p", "Q: {question}\nA:", prefill=" It is", chat=False)
    asked = server.post_of(config, plain, problem, 5)
    assert (asked.path, asked.body["prompt"]) == ("/completions", "Q: 2 + 2\nA: It is") and "messages" not in asked.body


def test_a_text_prompt_is_graded_with_its_prefill(fake, tmp_path):
    (tmp_path / "own.yaml").write_text("user: '{nums} to {target}:'\nprefill: ' <answer>'\nchat: false\n")
    choice = {"text": "1 + 1</answer>", "finish_reason": "length"}
    fake.respond = lambda number, path, body: (200, {}, {"choices": [choice], "usage": {"completion_tokens": 64}})
    result = evaluated(fake, tmp_path / "run", prompt=str(tmp_path / "own.yaml"))
    assert {path for path, _, _ in fake.asked} == {"/v1/models", "/v1/completions"} and result.truncated == 1
    assert {row["extracted"] for row in rows_of(tmp_path / "run")} == {"1 + 1"}
    assert verify.verify(tmp_path / "run")[1] == []


def test_samples_have_seeds_of_their_own_and_neutral_settings_go_where_they_are_not_known(fake, tmp_path):
    def respond(number, path, body):
        if strange := {"top_k", "min_p"} & set(body):
            return 400, {}, {"error": {"message": f"Unrecognized request argument supplied: {min(strange)}"}}
        return said("<answer>2</answer>")

    fake.respond = respond
    result = evaluated(fake, tmp_path / "run", samples=3, temperature=0.5)
    assert result.pass_at_k.keys() == {"1", "2", "3"}
    assert len({body["seed"] for body in posts(fake)}) == 18 and all(0 <= b["seed"] < 1 << 31 for b in posts(fake))
    assert result.notes[-1] == "the server does not know min_p or top_k; not sent"
    with pytest.raises(UserError, match="refuses problem .* top_k"):
        evaluated(fake, tmp_path / "other", samples=3, temperature=0.5, top_k=9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "adapters/nano-grpo"}, "--adapter is for a model that is loaded here"),
        ({"rows": 4}, "--rows is for a model that is loaded here"),
        ({"trust_remote_code": True}, "--trust-remote-code is for"),
        ({"prompt": "tinyzero"}, "opens the assistant's turn, and servers have no common way to pass that"),
        ({"endpoint": None, "concurrency": 3}, "--concurrency is for a server; name its address with --endpoint"),
        ({"endpoint": "ftp://127.0.0.1/v1"}, "give an http or https address"),
        ({"endpoint": "127.0.0.1:8080"}, "give an http or https address"),
        ({"endpoint": "http://127.0.0.1:99999"}, "not an address"),
        ({"endpoint": "http://256.1.1.1"}, "http://256.1.1.1/v1: not an address"),
        ({"endpoint": "http://ex..ample:8080"}, "not an address"),
        ({"endpoint": f"http://{'x' * 70}.org"}, "not an address"),
        ({"endpoint": "http://me:hunter2@127.0.0.1"}, "credentials in it"),
        ({"endpoint": "http://127.0.0.1/v1?key=hunter2"}, "with '\\?' or '#' in it"),
        ({"api_key_env": "MLX_TRACES_NO_SUCH"}, "MLX_TRACES_NO_SUCH: no such environment variable"),
        ({"model": " "}, "--endpoint needs --model"),
        ({"concurrency": 0}, "concurrency: "),
    ],
)
def test_what_makes_no_sense_is_one_line_before_anything_is_asked(settings, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        mlx_traces.evaluate(out=tmp_path / "run", **{**SMALL, "endpoint": "http://127.0.0.1:9", **settings})
    assert "\n" not in str(error.value) and "hunter2" not in str(error.value) and not (tmp_path / "run").exists()


def test_addresses():
    for given, asked in {
        "http://127.0.0.1:8080": "http://127.0.0.1:8080/v1",
        "http://[::1]:8080/": "http://[::1]:8080/v1",
        "https://host/api/v1/": "https://host/api/v1",
        "http://host:1/v1/chat/completions": "http://host:1/v1",
    }.items():
        assert endpoint.normalized(given) == asked


def test_without_a_name_or_a_server(tmp_path):
    with pytest.raises(UserError, match="--endpoint needs --model, .*/v1/models lists them"):
        mlx_traces.evaluate(endpoint="http://127.0.0.1:9", limit=2, out=tmp_path / "run")
    with socket.socket() as taken:  # bound, and not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="cannot be reached .*start the server"):
            mlx_traces.evaluate(endpoint=address, out=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- replies and faults


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_that_was_split_off_is_joined_again(fake, tmp_path, name):
    fake.respond = lambda number, path, body: said("\n<answer>1 + 1</answer>", **{name: "\n<answer>9</answer>"})
    evaluated(fake, tmp_path / "run")
    (row, *_) = rows_of(tmp_path / "run")
    assert row["completion"] == "<think>\n<answer>9</answer></think>\n<answer>1 + 1</answer>"
    assert row["extracted"] == "1 + 1"
    assert server.joined("so long", "") == "<think>so long"
    assert server.joined("so", "<think>so</think>2") == "<think>so</think>2" and server.joined("", "2") == "2"


BROKEN = {
    "status": (503, {}, {"error": "loading"}),
    "too many": (429, {"Retry-After": "0"}, b"slow down"),
    "not JSON": (200, {}, b"<html>"),
    "deep": (200, {}, b"[" * 100_000),
    "no object": (200, {}, []),
    "no choices": (200, {}, {"choices": []}),
    "choice": (200, {}, {"choices": [None]}),
    "no content": (200, {}, {"choices": [{"message": {"role": "assistant"}}]}),
    "content": (200, {}, {"choices": [{"message": {"content": {"a": 1}}}]}),
    "error": (200, {}, {"error": {"message": "overloaded\x1b[31m"}}),
    "not gzip": (200, {"Content-Encoding": "gzip"}, b"no"),
    "huge": said("x" * (2 << 20)),
    "short": (200, {"Content-Length": "999"}, b"{}"),
    "header": (200, {"Content-Length": "x"}, b"{}"),
}


@pytest.mark.parametrize("kind", [*BROKEN, "lost"])
def test_a_fault_that_passes_is_asked_again_and_one_that_stays_ends_the_run(fake, tmp_path, kind):
    def respond(number, path, body):
        if number < broken:
            if kind == "lost":
                raise ConnectionError
            return BROKEN[kind]
        return said("<answer>1 + 1</answer>")

    fake.respond, broken, one = respond, 2, {"limit": 1}
    assert evaluated(fake, tmp_path / "run", **one).total_questions == 1 and len(posts(fake)) == 3
    fake.asked.clear()
    broken = 3
    with pytest.raises(UserError, match=r"problem countdown-\S+: .*tried 3 times") as error:
        evaluated(fake, tmp_path / "stays", **one)
    assert len(posts(fake)) == 3 and str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
            r"provided: \[key\]\); check the key",
        ),
        ((404, {}, {"error": f"no model\n{KEY}"}), r"\(404: no model \[key\]\); .*it has served, other"),
        ((413, {}, b"\xff\x00 too long"), "refuses problem .*413"),
    ],
)
def test_what_repeating_does_not_change_is_asked_once_and_the_key_is_told_to_nobody(
    fake, tmp_path, monkeypatch, answer, message
):
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    fake.respond = lambda number, path, body: said("2") if number < 1 else answer
    with pytest.raises(UserError, match=message) as error:
        evaluated(fake, tmp_path / "run", concurrency=1, api_key_env="MY_KEY")
    assert KEY not in str(error.value) and len(posts(fake)) == 2
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, _, headers in fake.asked)
    fake.respond = lambda number, path, body: said(f"you are {KEY}"[:7])
    evaluated(fake, tmp_path / "run", resume=True, api_key_env="MY_KEY")
    assert len(posts(fake)) == 7
    assert not any(KEY in file.read_text() for file in (tmp_path / "run").iterdir())


def test_redirects_are_not_followed(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    other = Fake()
    threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    fake.respond = lambda number, path, body: (307, {"Location": f"{other.url}{path}"}, b"")
    with pytest.raises(UserError, match=r"redirects \(status"):
        evaluated(fake, tmp_path / "run", api_key_env="MY_KEY")
    other.shutdown()
    other.server_close()
    assert other.asked == []


@pytest.mark.parametrize("drip", [False, True])
def test_a_reply_that_does_not_come_or_end(fake, tmp_path, drip):
    release = threading.Event()

    def respond(number, path, body):
        if not drip:
            release.wait(20)
        return 200, {"Content-Length": 10_000}, b""

    fake.respond, original = respond, Handler.answer

    def answer(self, body):
        original(self, body)
        while drip and body is not None and not release.wait(0.02):
            self.wfile.write(b" ")

    Handler.answer = answer
    try:
        start = time.monotonic()
        with pytest.raises(UserError, match=r"no whole reply in 0\.2 s, tried 2 times"):
            evaluated(fake, tmp_path / "run", limit=1, timeout=0.2, retries=1)
        assert time.monotonic() - start < 15  # the reply would take longer
    finally:
        Handler.answer = original
        release.set()


def test_what_a_server_leaves_out_is_said_and_foreign_text_is_kept_safe(fake, tmp_path):
    def respond(number, path, body):
        choice = {"message": {"content": "half \ud800 <answer>1</answer>\x1b[31m"}}
        usage = [{}, {"completion_tokens": -1}, {"completion_tokens": True}, {"completion_tokens": 1e99}, 3, None][
            number
        ]
        return 200, {}, {"model": "another\nmodel", "choices": [choice], "usage": usage}

    fake.respond = respond
    result = evaluated(fake, tmp_path / "run")
    assert result.mean_tokens is None and result.tokens_per_second is None
    assert result.notes == [
        "the server's name for the model that answered is another model",
        "the server gave no count of tokens for 6 of 6 completions",
        "the server did not say why 6 of 6 completions ended",
    ]
    assert rows_of(tmp_path / "run")[0]["completion"].startswith("half ? <answer>")
    assert verify.verify(tmp_path / "run")[1] == []
    frame = mlx_traces.compare(tmp_path / "run", out=tmp_path / "tables")
    assert "| – | – | 0.0 % |" in tables.to_markdown(frame)
    assert json.loads(json.dumps(tables.to_json(frame), allow_nan=False))["rows"][0]["tokens_per_answer"] is None
    shown = CliRunner().invoke(main, ["compare", str(tmp_path / "run")])
    page = CliRunner().invoke(main, ["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")])
    assert (shown.exit_code, page.exit_code) == (0, 0) and f"{fake.url}/v1" in (tmp_path / "page.html").read_text()


def test_no_more_requests_are_under_way_than_the_settings_allow(fake, tmp_path):
    def respond(number, path, body):
        time.sleep(0.02)
        return said("2")

    fake.respond = respond
    evaluated(fake, tmp_path / "run", limit=24, concurrency=3)
    assert fake.most == 3


# ------------------------------------------------------------------------------------------------ stopped, resumed


@pytest.fixture
def ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_waits_for_what_is_under_way_and_resume_asks_for_the_rest(fake, tmp_path, ctrl_c):
    def respond(number, path, body):
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        if number >= 4:
            time.sleep(0.3)
        return said(f"<answer>{number}</answer>")

    fake.respond = respond
    with pytest.raises(Stopped, match=r"stopped after [4-9] of 24 completions"):
        evaluated(fake, tmp_path / "run", limit=24, concurrency=2)
    kept = rows_of(tmp_path / "run")
    assert len(kept) == len(posts(fake)) < 24  # no reply is lost
    fake.respond = lambda number, path, body: said("<answer>2</answer>")
    evaluated(fake, tmp_path / "run", limit=24, resume=True)
    assert len(posts(fake)) == 24 and all(row in rows_of(tmp_path / "run") for row in kept)
    with pytest.raises(UserError, match="started with other settings .*endpoint was"):
        mlx_traces.evaluate(endpoint="http://127.0.0.1:9", out=tmp_path / "run", resume=True, **SMALL | {"limit": 24})


def test_the_second_ctrl_c_waits_for_nothing(fake, tmp_path, ctrl_c):
    release = threading.Event()

    def respond(number, path, body):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
        release.wait(20)
        return said("2")

    fake.respond, start = respond, time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluated(fake, tmp_path / "run", concurrency=2)
        assert time.monotonic() - start < 15  # the reply comes after 20 s
        others = set(threading.enumerate()) - {threading.main_thread()}
        assert others and all(thread.daemon for thread in others)  # the process would end now
    finally:
        release.set()


def test_mlx_is_not_loaded(fake, tmp_path):
    code = (
        "import sys, mlx_traces\n"
        f"mlx_traces.evaluate(endpoint={fake.url!r}, model='served', limit=2, out={str(tmp_path / 'run')!r})\n"
        "assert not any(name.startswith(('mlx.', 'mlx_lm', 'transformers')) for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# --------------------------------------------------------------------------------------------- several, and for real


def test_a_study_takes_served_models_beside_loaded_ones(fake, tmp_path):
    task = {"task": "countdown", "limit": 2, "rows": 4, "max_tokens": 16, "prompts": ["direct"]}
    served = {"model": "served", "label": "gguf", "settings": {"endpoint": fake.url}}
    settings = {"name": "s", "tasks": [task], "models": [{"model": "nano"}, served], "baseline": "gguf"}
    settings |= {"runs_dir": str(tmp_path), "out": str(tmp_path / "tables")}
    (part,) = study.lay_out(build(StudyConfig, settings))
    assert [planned.model for planned in part.plans] == ["nano", f"served@127.0.0.1:{fake.server_port}"]
    assert [planned.config.rows for planned in part.plans] == [4, EvalConfig().rows] and part.baseline == 1
    settings["models"][1] = {**served, "bits": 4}
    with pytest.raises(UserError, match=r"models\.1: bits cannot be chosen for a model behind a server"):
        study.lay_out(build(StudyConfig, settings))


@pytest.fixture
def real(tmp_path):
    """mlx_lm's server with nano's weights expanded to float32: its 4-bit kernels are very slow on a CPU."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_traces.models.loading import load

    loaded, folder = load("nano", weights="dense", dtype="float32"), tmp_path / "nano-dense"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(loaded.model.parameters())))
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(loaded.path / name, folder)
    config = json.loads((loaded.path / "config.json").read_text())
    plain = {name: value for name, value in config.items() if not name.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(plain))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port)]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        for _ in range(1200):
            assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield folder, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_mlx_lms_server_and_our_engine_say_the_same(real, tmp_path):
    folder, address = real
    ask = {"task": "countdown", "limit": 8, "max_tokens": 32, "model": str(folder)}  # 32: some are cut off
    evals = [
        build(EvalConfig, {**ask, "prompt": prompt, **where})
        for prompt in ("direct", "thinking")
        for where in ({}, {"endpoint": address})
    ]
    frame, runs, _ = compare.compared(CompareConfig(evals=evals, runs_dir=str(tmp_path / "runs")))
    for local, served in (runs[:2], runs[2:]):
        for one, two in zip(local.samples, served.samples, strict=True):
            same = ("id", "completion", "tokens", "finish_reason", "verdicts", "extractions")
            assert {name: one[name] for name in same} == {name: two[name] for name in same}
        assert comparison.paired(local, served)["diff"] == 0
    assert {row["finish_reason"] for row in runs[3].samples} == {"stop", "length"}
    assert len({row["completion"] for row in runs[3].samples}) == 8
    assert list(frame["model"]) == [str(folder), f"{folder}@{address.removeprefix('http://')}"] * 2


def test_a_server_that_names_the_stop_string_is_counted(fake, tmp_path):
    choice = {"message": {"content": "<think>a"}, "finish_reason": "stop"}
    post = server.Post("p", "/completions", {}, "?")
    for stop, found in (("END", "END"), (None, None), (128001, None), ("", None)):
        content = json.dumps({"choices": [{**choice, "stop_reason": stop}]})
        assert server.reply_of(content.encode(), post)[0].stop_string == found
    fake.respond = lambda *_: (200, {}, {"choices": [{**choice, "stop_reason": "END"}]})
    (tmp_path / "own.yaml").write_text("user: '{nums}'\nstop: [END]\n")
    result = evaluated(fake, tmp_path / "run", prompt=str(tmp_path / "own.yaml"), limit=2)
    assert (result.stopped, result.stopped_in_thoughts) == (2, 2)
    assert "a server applies stop strings within thoughts too" in result.notes


def test_a_server_that_cuts_off_before_max_tokens_is_told(fake, tmp_path):
    def respond(number, path, body):
        choice = {"message": {"content": "<think>a"}, "finish_reason": "stop" if number == 0 else "length"}
        return 200, {}, {"choices": [choice], "usage": {"completion_tokens": (5, 19, 15, 20)[number]}}

    fake.respond = respond
    result = evaluated(fake, tmp_path / "run", limit=4, max_tokens=20)
    cut = "the server cut off 1 of 4 completions before --max-tokens, one after 15 tokens; raise its context length"
    assert result.truncated == 0.75 and result.notes == [cut]
