"""What runs were made with: each thing changed, one at a time, and pointed out; nothing said where nothing differs."""

import copy
import hashlib
import json
import os
import random
import shutil
from dataclasses import fields

import pytest

import mlx_traces
from mlx_traces.config import EvalConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison, differences, evaluator
from mlx_traces.models.names import resolve
from mlx_traces.records import EvalResult
from mlx_traces.runtime import fingerprints
from mlx_traces.runtime.fingerprints import doubt, fingerprint
from mlx_traces.runtime.run_folder import SAMPLE_COLUMNS, RunFolder

ABOUT = {
    "identity": {
        **{"model": "nano", "adapter": None, "temperature": 0.7, "top_p": 1.0, "thinking": True},
        **{"weights": "dense", "dtype": "float32", "model_files": "aa", "adapter_files": None, "revision": None},
        "prompt": {"name": "thinking", "user": "Q: {question}", "system": None, "prefill": ""},
        "date": "2025-01-31",
    },
    "versions": {"python": "3.11.2", "mlx-traces": "0.1.0", "mlx": "0.32.4", "mlx-lm": "0.32.2", "transformers": "5.7"},
    "git_revision": "abc",
    "backend": {"name": "cpu", "description": "AMD EPYC (CPU), 25 GB, dense weights, float32"},
}


def changed(*path, to):
    about = copy.deepcopy(ABOUT)
    part = about
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    return about


@pytest.mark.parametrize(
    ("path", "to", "line"),
    [
        (("versions", "mlx"), "0.33", "versions differ: mlx 0.32.4 in a; mlx 0.33 in b"),
        (("git_revision",), "def", "versions differ: mlx-traces 0.1.0 at abc in a; mlx-traces 0.1.0 at def in b"),
        (("backend", "description"), "M3 (Metal), 16 GB", "device differs: AMD EPYC (CPU) in a; M3 (Metal) in b"),
        (("identity", "dtype"), "bfloat16", "weights differ: dense float32 in a; dense bfloat16 in b"),
        (("identity", "top_p"), 0.9, "top_p differs: 1.0 in a; 0.9 in b"),
        (("identity", "thinking"), False, "thinking switch differs: True in a; False in b"),
        (("identity", "thinking"), None, "thinking switch differs: True in a; the template's own in b"),
        (
            ("identity", "template_args"),
            {"effort": "high"},
            "variables of the chat template differ: unset in a; {'effort': 'high'} in b",
        ),
        (
            ("identity", "stop_in_thoughts"),
            True,
            "whether stop strings end thoughts differs: unset in a; True in b",
        ),
        (("identity", "think_then"), "So", "what follows a closed thought differs: unset in a; So in b"),
        (("identity", "date"), "2025-02-01", "date in the prompts differs: 2025-01-31 in a; 2025-02-01 in b"),
        (("identity", "prompt", "user"), "{question}", "prompt thinking is another one (its user) in a than in b"),
        (("identity", "prompt", "prefill"), "x", "prompt thinking is another one (its prefill) in a than in b"),
        (("identity", "model_files"), "bb", "model nano is another one (model_files) in a than in b"),
        (("identity", "revision"), "f00", "model nano is another one (revision) in a than in b"),
    ],
)
def test_each_difference_is_pointed_out(path, to, line):
    assert differences.differences({"a": ABOUT, "b": changed(*path, to=to)}) == [line]


def test_what_is_the_same_or_not_known_or_in_the_table_is_not():
    assert differences.differences({"a": ABOUT, "b": ABOUT}) == []
    assert differences.differences({"a": ABOUT, "b": {}, "c": {"identity": 3, "versions": [], "backend": "x"}}) == []
    for path, to in (
        (("versions", "python"), "3.12"),  # moves no result
        (("identity", "model"), "other"),  # a column of the table
        (("identity", "prompt"), {"name": "direct", "user": "other"}),
        (("started",), "later"),
    ):
        assert differences.differences({"a": ABOUT, "b": changed(*path, to=to)}) == []
    greedy = changed("identity", "temperature", to=0.0)
    other = copy.deepcopy(greedy)
    other["identity"]["top_p"] = 0.5
    assert differences.differences({"a": greedy, "b": other}) == []


def test_runs_graded_by_other_rules():
    """A run that does not say its version was graded by the first."""
    now = changed("grader", to=2)
    assert differences.differences({"a": ABOUT, "b": now}) == ["graders' rules differ: version 1 in a; version 2 in b"]
    assert differences.differences({"a": now, "b": now}) == []


def test_three_runs_and_hostile_names():
    other = changed("versions", "mlx", to="0.33\x1b[31m")
    assert differences.differences({"a": ABOUT, "b\n": other, "c": ABOUT}) == [
        "versions differ: mlx 0.32.4 in a, c; mlx 0.33[31m in b"
    ]


def test_a_comparison_reads_it_from_run_folders_and_keeps_it(tmp_path):
    columns = fields(EvalResult)
    for name, about in (("a", ABOUT), ("b", changed("versions", "mlx", to="0.33"))):
        (tmp_path / name).mkdir()
        result = {field.name: 0 for field in columns} | {"model": "nano", "adapter": None, "prompt": "thinking"}
        result |= {"extractor": "answer", "task": "countdown", "split": "test", "timestamp": "x", "run": name}
        result |= {"pass_at_k": {}, "pass_hat_k": {}, "maj_at_k": {}, "notes": []}
        row = {key: "x" for key in SAMPLE_COLUMNS} | {"sample": 0, "tokens": 3, "correct": True}
        row |= {"elapsed": 0.1, "verdicts": {"answer": "correct"}, "extractions": {"answer": "x"}}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        (tmp_path / name / "run.json").write_text(json.dumps(about))
        (tmp_path / name / "samples.jsonl").write_text(json.dumps(row) + "\n")
    runs = [comparison.by_extractor(comparison.read_run(tmp_path / name), "answer") for name in "ab"]
    assert comparison.differences(runs) == ["versions differ: mlx 0.32.4 in a; mlx 0.33 in b"]
    (tmp_path / "b" / "run.json").unlink()
    assert comparison.read_run(tmp_path / "b").about == {}


def test_fingerprints_change_with_a_weight_an_adapter_and_a_problem(tmp_path):
    model, adapter, places = tmp_path / "nano", tmp_path / "adapter", iter(range(99))

    def begun(*given):
        folder = RunFolder(tmp_path / f"run-{next(places)}")
        folder.begin({}, *given)
        return folder.about

    shutil.copytree(resolve("nano")[0], model)
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"x")

    def now(*ids):
        files = {"model": fingerprint(model), "adapter": fingerprint(adapter)}
        return begun({"seed": 3}, files, {"problems": ids, "held_out": []})["fingerprints"]

    first = now("a", "b")
    assert first == now("a", "b") and first["held_out"] is None
    assert begun({"seed": 3})["fingerprints"] == {"model": None, "adapter": None}
    other = now("b", "a")
    assert {key for key in first if first[key] != other[key]} == {"problems"}
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    other = now("a", "b")
    assert {key for key in first if first[key] != other[key]} == {"model"}
    (adapter / "adapters.safetensors").write_bytes(b"y")
    assert now("a", "b")["adapter"] != first["adapter"]


def test_run_and_table_say_what_they_were_made_with(tmp_path):

    out = tmp_path / "table"
    frame = mlx_traces.compare(model="nano", prompt="direct", limit=2, max_tokens=4, runs_dir=tmp_path, out=out)
    (name,) = frame["run"]
    about = json.loads((tmp_path / name / "run.json").read_text())
    assert {"versions", "git_revision", "platform", "command", "started", "backend"} <= set(about)
    assert about["config"]["seed"] == 0 and about["config"]["extractor"] == "answer" and about["config"]["rows"]
    assert about["fingerprints"]["model"] == about["identity"]["model_files"] and about["fingerprints"]["problems"]
    table = json.loads((out / "provenance.json").read_text())
    assert (
        table["versions"] == about["versions"]
        and {"run": name, **about}.items() <= table["runs"]["nano_direct"].items()
    )


def a_model(tmp_path, size):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    content = bytearray(random.Random(0).randbytes(size))
    (folder / "model.safetensors").write_bytes(content)
    return folder, content


@pytest.mark.parametrize("place", [0, 1_500_000, 2_500_000, 3_999_999])
def test_a_fingerprint_sees_every_byte(tmp_path, place):
    folder, content = a_model(tmp_path, 4_000_000)
    before = fingerprint(folder)
    content[place] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert before.startswith("2-") and fingerprint(folder) != before and not doubt(before, fingerprint(folder))


def test_small_files_have_the_fingerprints_they_had(tmp_path):
    """Those are of every byte, so runs of earlier versions keep their identity."""
    folder, content = a_model(tmp_path, 1_500_000)
    first, last = content[: 1 << 20], content[-(1 << 20) :]
    former = hashlib.sha256(b"config.json 2 {}{}" + b"model.safetensors 1500000 " + first + last)
    assert fingerprint(folder) == former.hexdigest()[:12]
    (folder / "extra.json").mkdir()
    (folder / "dangling.json").symlink_to("/nonexistent")
    assert fingerprint(folder) == former.hexdigest()[:12]


def test_of_a_giant_file_blocks_size_and_date_count(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "WHOLE", 3_000_000)
    monkeypatch.setattr(fingerprints, "BLOCKS", 3)
    folder, content = a_model(tmp_path, 9_000_000)
    weights = folder / "model.safetensors"
    before, date = fingerprint(folder), weights.stat().st_mtime_ns
    for place, seen in ((4_500_000, True), (2_000_000, False)):
        changed = bytearray(content)
        changed[place] ^= 1
        weights.write_bytes(changed)
        os.utime(weights, ns=(date + 1, date + 1))
        assert (doubt(before, fingerprint(folder)) == "") == seen and fingerprint(folder) != before
    weights.write_bytes(content)
    os.utime(weights, ns=(date, date))
    assert fingerprint(folder) == before


def test_a_fingerprint_of_an_older_version_is_neither_the_same_nor_another(tmp_path):
    """A run is not continued, and a table does not say that its weights are others."""
    old, new = "0123456789ab", "2-0123456789ab"
    assert doubt(old, new) and doubt(new, old) and not doubt(old, "a" * 12) and not doubt(None, new)
    line = "model nano may be another one (noted by an older version, which read only the first and last MiB of a file)"
    abouts = {"a": changed("identity", "model_files", to=old), "b": changed("identity", "model_files", to=new)}
    assert differences.differences(abouts) == [f"{line} in a than in b"]
    folder = RunFolder(tmp_path / "run")
    folder.begin({"model_files": old, "seed": 0}, {})
    with pytest.raises(UserError, match="continued, since its files may have changed .model_files: noted by an"):
        folder.check({"model_files": new, "seed": 0})
    with pytest.raises(UserError, match=r"started with other settings \(seed was 0, now 1\)"):
        folder.check({"model_files": new, "seed": 1})
    with pytest.raises(UserError, match=r"may have changed \(shown: not noted by an older version\)"):
        folder.check({"model_files": old, "seed": 0, "shown": "x"})
    folder.check({"model_files": old, "seed": 0})


def test_what_a_model_is_shown_is_part_of_a_runs_identity(tmp_path):
    """A column beside question and answer, and the order of a Countdown problem's numbers."""
    prompt = tmp_path / "mine.yaml"
    prompt.write_text("user: '{context} {question}'\n")

    def label(**row):
        (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Q?", "answer": "1", **row}) + "\n")
        return evaluator.plan(EvalConfig(task="qa", data=str(tmp_path / "q.jsonl"), prompt=str(prompt))).label

    assert label(context="one") == label(context="one", other=3) != label(context="two")

    def shown(nums):
        (tmp_path / "c.jsonl").write_text(json.dumps({"nums": nums, "target": 6}) + "\n")
        return evaluator.plan(EvalConfig(task="countdown", data=str(tmp_path / "c.jsonl"))).identity()

    first, second = shown([1, 2, 3]), shown([3, 2, 1])
    assert {key for key in first if first[key] != second[key]} == {"shown"}
