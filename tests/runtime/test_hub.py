"""The hub for real: its own clients download from a hub on the loopback, and upload to it; what we say to faults."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import make_config, make_model, make_tokenizer
from hub_server import TOKEN, Hub, Repository
from mlx.utils import tree_flatten
from packaging.version import Version

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
AGAIN = "repeat the command: complete files are kept"
GOES_ON = Version(version("huggingface_hub")) >= Version("1.20")  # by itself, where an answer ends too early
# The clients read their settings as they are imported, which takes seconds: a process that has imported them, with the
# test hub's address, forks for each command, so that no command knows anything of the one before.
PROGRAM = """
import json, os, sys, time, traceback
wait, time.sleep = time.sleep, lambda seconds: wait(min(seconds, 0.02))  # the clients wait between two tries
import datasets, huggingface_hub, mlx_traces, mlx_lm.utils, mlx_lm.models.qwen2
from huggingface_hub import constants
import mlx_traces.evaluation.run, mlx_traces.train.push, mlx_traces.train.sft
from mlx_traces.cli import main
for line in sys.stdin:
    order = json.loads(line)
    if not (child := os.fork()):
        for number, file in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        os.environ |= order["environment"]
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = order["offline"]
        code = 1
        try:
            main(order["words"])
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)  # without the seconds that taking all of this down would need
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
# Pens
"""


@dataclass
class Done:
    """What a command came to; ``asked`` are the requests that reached the hub."""

    code: int
    out: str
    err: str
    asked: list[tuple[str, str, str]]

    def refusal(self) -> str:
        """Return the one line that a command ended with."""
        assert self.code == 1 and "Traceback" not in self.err, self
        lines = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1 and self.err.rstrip().endswith(lines[0]), self.err
        return lines[0].removeprefix("Error: ")


class World:
    """The hub, and the process whose commands use it; both work in a folder of their own."""

    def __init__(self, hub: Hub, folder: Path):
        self.hub, self.folder, self.home = hub, folder, folder / "home"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}  # git LFS, not xet
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", "MLX_TRACES_DEVICE": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**kept, **own, **quiet},
            cwd=folder,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, *words: object, offline: bool = False, **environment: str) -> Done:
        """Run a command of ours; three minutes are the most it may take."""
        before = len(self.hub.asked)
        late = threading.Timer(180, self.process.kill)
        late.start()
        order = {"words": [str(word) for word in words], "offline": offline, "environment": environment}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline()
        late.cancel()
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return Done(int(code), out, err, self.hub.asked[before:])

    def evaluate(self, model: str, out: str, *words: object, **how) -> Done:
        """Evaluate a model of the hub on two problems."""
        return self.run("eval", "--model", model, "--limit", 2, "--max-tokens", 4, "--out", out, *words, **how)

    def identity(self, run: str) -> dict:
        return json.loads((self.folder / run / "run.json").read_text())["identity"]


def model_files(folder: Path, seed: int, **changes) -> dict[str, bytes]:
    """Return the files of a tiny model as it stands on the hub: weights in two parts with their index, and a card."""
    weights = sorted(tree_flatten(make_model(seed, **changes).parameters()))
    parts = {FIRST: weights[: len(weights) // 2], SECOND: weights[len(weights) // 2 :]}
    folder.mkdir()
    for name, part in parts.items():
        mx.save_safetensors(str(folder / name), dict(part))
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key, _ in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(make_config(**changes)))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A tiny model\n")
    make_tokenizer().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data_files(more: int) -> dict[str, bytes]:
    """Return a data set laid out as openai/gsm8k is, of problems made here."""
    rows = [
        {
            "question": f"A box holds {pens} pens; {more} more are put in. How many are there?",
            "answer": f"There are {pens} + {more} = <<{pens}+{more}={pens + more}>>{pens + more}.\n#### {pens + more}",
        }
        for pens in range(9)
    ]
    files = {"README.md": CARD.encode()}
    for name, part in (("main/train", rows[:5]), ("main/test", rows[5:]), ("socratic/train", rows[:2])):
        pq.write_table(pa.Table.from_pylist(part), buffer := io.BytesIO())
        files[f"{name}-00000-of-00001.parquet"] = buffer.getvalue()
    return files


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        tiny = hub.models["org/tiny"] = Repository()
        old, new = model_files(folder / "old", 1), model_files(folder / "new", 2)
        tiny.commit(old, "v1")
        tiny.commit(new, "main")
        hub.models["org/gated"] = Repository(gated=True)
        hub.models["org/gated"].commit(old, "main")
        pens = hub.datasets["openai/gsm8k"] = Repository()
        pens.commit(data_files(1), "old")
        pens.commit(data_files(2), "main")
        hub.datasets["org/gated-pens"] = Repository(gated=True)
        hub.datasets["org/gated-pens"].commit(data_files(3), "main")
        made = World(hub, folder)
        yield made
        made.process.kill()
        made.process.wait()


def adapter(folder: Path) -> Path:
    """Write the files of an adapter, without a card."""
    folder.mkdir()
    about = {"model": "nano", "num_layers": -1, "training": {"epochs": 1}}
    lora = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps({**about, "lora_parameters": lora}))
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"x.lora_a": mx.zeros((2, 2))})
    return folder


def repository(world: World, name: str, **changes) -> Repository:
    """Put a model on the hub that no other test has asked for."""
    made = world.hub.models[f"org/{name}"] = Repository()
    made.commit(model_files(world.folder / name, 3, **changes), "main")
    return made


def test_revisions_are_branches_tags_and_commits(world):
    refs = world.hub.models["org/tiny"].refs
    for number, (revision, commit) in enumerate((("", "main"), ("@v1", "v1"), (f"@{refs['v1']}", "v1"))):
        done = world.evaluate(f"org/tiny{revision}", f"revision-{number}")
        assert done.code == 0, done
        about = world.identity(f"revision-{number}")
        assert about["model"] == f"org/tiny{revision}" and about["revision"] == refs[commit]
    assert not [path for _, path, _ in done.asked if "/store/" in path]  # the tag's commit, which was here
    text = [(world.folder / f"revision-{number}/samples.jsonl").read_text() for number in range(3)]
    assert text[0] != text[1]  # other weights
    told = world.evaluate("org/tiny@v2", "none").refusal()
    assert told == "org/tiny has no revision 'v2'; give a whole commit hash of it, v1 or main"


def test_models_that_are_here_need_no_hub(world):
    assert world.evaluate("org/tiny@v1", "here").code == 0
    with world.hub.away():
        assert world.evaluate("org/tiny@v1", "gone").code == 0
        told = world.evaluate("org/tiny@v2", "none").refusal()
        assert told.startswith("org/tiny@v2 could not be downloaded (no network or hub not reachable: ")
        assert "; pass nano, a folder" in told and "org/tiny@v1 (downloaded)" in told
    done = world.evaluate("org/tiny@v1", "offline", offline=True)
    assert done.code == 0 and not done.asked
    assert world.identity("gone") == world.identity("here") == world.identity("offline")
    told = world.evaluate("org/tiny@v2", "none", offline=True).refusal()
    assert told.startswith("org/tiny@v2 could not be downloaded (HF_HUB_OFFLINE is set); pass nano, a folder")


def evaluated_after_a_cut(world: World, name: str, out: str) -> Done:
    """Evaluate a model whose download is cut off once: an old client gives up, and the next command goes on."""
    world.hub.broken[SECOND] = 1
    if not GOES_ON:
        assert world.evaluate(name, out).refusal().endswith(AGAIN)
    return world.evaluate(name, out)


def test_a_download_that_is_cut_off_goes_on(world):
    made = repository(world, "cut")
    assert evaluated_after_a_cut(world, "org/cut", "cut-1").code == 0
    shutil.rmtree(world.home / "hub/models--org--cut")
    world.hub.broken[SECOND] = 6 if GOES_ON else 1  # as often as the client tries
    told = world.evaluate("org/cut", "cut-2").refusal()
    assert told.startswith("org/cut could not be downloaded (") and told.endswith(AGAIN)
    told = world.evaluate("org/cut", "cut-3", offline=True).refusal()
    assert told.startswith("org/cut could not be downloaded (HF_HUB_OFFLINE is set); pass nano")
    assert "org/cut" not in told.partition("pass")[2]  # half of it is here, which is no model
    done = world.evaluate("org/cut", "cut-4")
    assert done.code == 0 and world.hub.broken[SECOND] == 0
    assert FIRST not in str([path for method, path, _ in done.asked if method == "GET"])
    (snapshot,) = (world.home / "hub/models--org--cut/snapshots").iterdir()
    assert (snapshot / SECOND).read_bytes() == made.commits[made.refs["main"]][SECOND]


def test_a_large_file_goes_on_in_the_middle(world):
    made = repository(world, "large", intermediate_size=30_000)  # more than the client's 10 MB at a time
    done = evaluated_after_a_cut(world, "org/large", "large-1")
    assert done.code == 0
    assert [part for method, path, part in done.asked if method == "GET" and path.endswith(SECOND) and part]
    (snapshot,) = (world.home / "hub/models--org--large/snapshots").iterdir()
    assert (snapshot / SECOND).read_bytes() == made.commits[made.refs["main"]][SECOND]


def test_what_the_hub_refuses_is_one_line(world):
    page = f"accept it on {world.hub.url}/org/gated, then run `hf auth login`"
    for token in ({}, {"HF_TOKEN": TOKEN}):
        told = world.evaluate("org/gated", "none", **token).refusal()
        assert told == f"org/gated asks for an agreement first: {page}"
    unknown = "not on the hub, or private (then run `hf auth login`); check the name"
    told = world.evaluate("orgs/tiny", "none").refusal()
    assert told == f"unknown model 'orgs/tiny': {unknown}; did you mean 'org/tiny'?"
    told = world.evaluate("org/gatte", "none", HF_TOKEN=TOKEN).refusal()
    assert told == f"unknown model 'org/gatte': {unknown}; did you mean 'org/gated'?"
    told = world.evaluate("org/gated", "none", HF_TOKEN="hf_old").refusal()
    assert told == "org/gated: the hub refuses the token; run `hf auth login` anew, or unset HF_TOKEN"
    made = world.hub.models["org/none"] = Repository()
    made.commit({"README.md": b"# Nothing\n"}, "main")
    assert (
        world.evaluate("org/none", "none").refusal().startswith("org/none: not a model folder, config.json is missing")
    )


def test_the_data_set_is_of_the_revision_that_was_asked_for(world):
    def asked(out: str, *words: object, **how) -> list[str]:
        words = ("--task", "gsm8k", "--split", "test[:2]", "--max-tokens", 4, "--out", out, *words)
        done = world.run("eval", "--model", "nano", *words, **how)
        assert done.code == 0, done
        return [json.loads(line)["question"] for line in (world.folder / out / "samples.jsonl").open()]

    commit = world.hub.datasets["openai/gsm8k"].refs["main"]
    assert all("; 2 more" in question for question in asked("data-main"))
    assert all("; 2 more" in question for question in asked("data-main-off", offline=True))
    told = world.run("eval", "--task", "gsm8k", "--data", "openai/gsm8k@old", "--out", "x", offline=True).refusal()
    assert told.startswith(
        "openai/gsm8k@old could not be downloaded (HF_HUB_OFFLINE is set), and was not downloaded before; "
    )
    assert all("; 1 more" in question for question in asked("data-old", "--data", "openai/gsm8k@old"))
    world.hub.failing = True  # then its client takes what came last
    try:
        assert all("; 2 more" in question for question in asked("data-main-failing"))
        shutil.rmtree(next(world.home.glob(f"datasets/openai___gsm8k/main/*/{commit}")))
        told = world.run("eval", "--task", "gsm8k", "--out", "x").refusal()
    finally:
        world.hub.failing = False
    assert told.startswith("openai/gsm8k could not be downloaded (the hub failed meanwhile); repeat the command, or ")
    assert all("; 2 more" in question for question in asked("data-main-again"))
    with world.hub.away():  # both are here
        assert all("; 2 more" in question for question in asked("data-main-gone"))
        assert all("; 1 more" in question for question in asked("data-old-gone", "--data", "openai/gsm8k@old"))
        assert all("; 2 more" in question for question in asked("data-commit", "--data", f"openai/gsm8k@{commit}"))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            "openai/gsm8k@odl",
            "openai/gsm8k has no revision 'odl'; give a whole commit hash of it, old or main; pass --data",
        ),
        (
            "openai/gsm",
            "unknown data set 'openai/gsm': not on the hub, .*; did you mean 'openai/gsm8k'\\?; pass --data",
        ),
        ("org/gated-pens", "org/gated-pens asks for an agreement first: accept it on .*/datasets/org/gated-pens, then"),
    ],
)
def test_data_sets_that_the_hub_refuses(world, data, told):
    import re

    assert re.match(told, world.run("eval", "--task", "gsm8k", "--data", data, "--out", "x").refusal())


def test_a_card_has_the_licence_of_the_base_and_goes_to_the_hub(world):
    rows = [{"prompt": f"What is {n} and 1?", "completion": f"It is {n + 1}."} for n in range(8)]
    (world.folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--format", "prompt-completion", "--out", "traces.jsonl")
    assert world.run("data", "import", "sums.jsonl", *words).code == 0
    words = ("--data", "traces.jsonl", "--out", "trained", "--valid-share", 0)
    trained = world.run("sft", "--model", "org/tiny@v1", *words)
    assert trained.code == 0, trained
    run = world.folder / "trained"
    card = (run / "adapter/README.md").read_text()
    assert "license: apache-2.0" in card and "base_model: org/tiny" in card

    told = world.run("push", "trained", "me/adapter", "--dry-run")
    assert told.code == 0 and not told.asked and "me/adapter, private: nothing was uploaded" in told.out
    names = {"README.md", "adapter_config.json", "adapters.safetensors"}
    assert names == {line.split()[-1] for line in told.out.splitlines()[:-1]}
    assert f"{(run / 'adapter/adapters.safetensors').stat().st_size:,}  adapters.safetensors" in told.out

    login = "not logged in to the hub: run `hf auth login` with a token that may write, or set HF_TOKEN"
    assert world.run("push", "trained", "me/adapter").refusal() == login
    (run / "adapter/notes.txt").write_text("not for others")
    done = world.run("push", "trained/adapter", "me/adapter", HF_TOKEN=TOKEN)
    made = world.hub.models["me/adapter"]
    assert done.code == 0 and made.private and f"{world.hub.url}/me/adapter/commit/{made.refs['main']}" in done.out
    arrived = made.commits[made.refs["main"]]
    assert arrived.keys() == {*names, ".gitattributes"}
    for name in names - {"adapter_config.json"}:
        assert arrived[name] == (run / "adapter" / name).read_bytes(), name
    settings = json.loads(arrived["adapter_config.json"])
    own = json.loads((run / "adapter/adapter_config.json").read_text())
    assert settings["lora_parameters"] == own["lora_parameters"] and settings["model"] == own["model"] == "org/tiny@v1"

    made.private = False
    assert (
        "me/adapter exists and is public; pass --public"
        in world.run("push", run, "me/adapter", HF_TOKEN=TOKEN).refusal()
    )
    assert world.run("push", run, "me/adapter", "--public", HF_TOKEN=TOKEN).code == 0
    assert "the hub does not let you write there" in world.run("push", run, "you/mine", HF_TOKEN=TOKEN).refusal()


def test_settings_lose_the_paths_of_the_machine_on_the_way(world):
    folder = adapter(world.folder / "own")
    (folder / "README.md").write_text("# Mine\n")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["training"]["data"] = "/home/somebody/secret/traces.jsonl"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert world.run("push", folder, "me/own", "--public", HF_TOKEN=TOKEN).code == 0
    made = world.hub.models["me/own"]
    settings = json.loads(made.commits[made.refs["main"]]["adapter_config.json"])
    assert settings["training"]["data"] == "traces.jsonl" and not made.private


def test_a_model_goes_to_the_hub_and_back(world):
    assert world.run("push", "new", "me/model", HF_TOKEN=TOKEN).code == 0
    made = world.hub.models["me/model"]
    arrived = made.commits[made.refs["main"]]
    own = {path.name: path.read_bytes() for path in (world.folder / "new").iterdir()}
    assert {name: data for name, data in arrived.items() if name != ".gitattributes"} == own
    assert world.evaluate("me/model", "back", HF_TOKEN=TOKEN).code == 0


@pytest.mark.parametrize(
    ("folder", "name", "told"),
    [
        (".", "me/x", "not an adapter folder, adapter_config.json is missing"),
        ("nowhere", "me/x", "nowhere: no such adapter folder"),
        ("bare", "me/x", "no README.md to go with it; write one with: mlx-traces card bare"),
        ("new", "x", "'x' cannot be a name on the hub; give USER/NAME"),
        ("new", "me/a/b", "'me/a/b' cannot be a name on the hub; give USER/NAME"),
    ],
)
def test_what_cannot_be_pushed(world, folder, name, told):
    if folder == "bare":
        adapter(world.folder / folder)
    done = world.run("push", folder, name, HF_TOKEN=TOKEN)
    assert told in done.refusal() and not done.asked
