"""Traces that a model writes itself: resumed, graded, with the exact ids and their log-probabilities."""

import json
from pathlib import Path

import pytest
from factories import make_tokenizer, wrap

from mlx_traces.config import GenerateConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation.completion import Completion
from mlx_traces.models import loading
from mlx_traces.records import Rollout
from mlx_traces.runtime.provenance import ids_digest
from mlx_traces.tasks import get_task
from mlx_traces.traces import generate
from mlx_traces.traces.files import manifest_of, manifest_path, read_traces

CONFIG = GenerateConfig(limit=6, samples=3, max_tokens=96, rows=8, prompt="thinking")


def rows(path):
    return [trace for _, trace in read_traces(path)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("generated") / "own.jsonl"
    counts = generate.generate(CONFIG, out)
    return out, counts


def test_every_problem_gets_its_samples_in_order_and_is_graded(whole):
    out, counts = whole
    made, task = rows(out), get_task("countdown")
    problems = task.load("train", None, 6, 0)
    assert [(trace.id, trace.sample) for trace in made] == [(p.id, k) for p in problems for k in range(3)]
    assert counts["written"] == 18 and counts["correct"] == sum(trace.verdict == "correct" for trace in made)
    for trace, problem in zip(made, [p for p in problems for _ in range(3)], strict=True):
        assert trace.verdict == task.grade(problem, trace.completion)["answer"].verdict
        assert trace.messages[-1]["content"] == task.prompts["thinking"].messages(problem)[-1]["content"]
        assert len(trace.logprobs) == len(trace.completion_ids) and max(trace.logprobs) <= 0
    manifest = manifest_of(out)
    assert manifest["counts"]["written"] == 18
    assert manifest["models"] == {"model": loading.load("nano").about()} and "source_sha256" not in manifest
    assert manifest["problems"] == ids_digest([p.id for p in problems])
    assert not list(out.parent.glob(".own*"))


def test_the_ids_are_the_text_and_the_logprobs_the_models(whole):
    """At temperature 1 and unfiltered the stored log-probabilities are those of a plain forward pass."""
    import mlx.core as mx

    trace = rows(whole[0])[0]
    loaded = loading.load("nano")
    assert trace.completion_ids[-1] in loaded.stop_ids
    assert loaded.tokenizer.decode(list(trace.completion_ids[:-1])) == trace.completion
    prompt = loaded.chat.prompt([dict(turn) for turn in trace.messages]).ids
    logits = loaded.model(mx.array([prompt + trace.completion_ids]))[0, len(prompt) - 1 : -1]
    expected = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist()
    for row, token, logprob in zip(expected, trace.completion_ids, trace.logprobs, strict=True):
        assert logprob == pytest.approx(row[token], abs=1e-4)


def test_a_generated_trace_is_learned_as_it_was_sampled(tmp_path):
    from mlx_traces.traces import encoding

    loaded, out = loading.load("nano"), tmp_path / "own.jsonl"
    config = CONFIG.model_copy(update={"limit": 2, "samples": 2, "thinking": True, "template_args": {"effort": 1}})
    generate.generate(config, out)
    for trace in rows(out):
        assert (trace.thinking, trace.template_args) == (True, {"effort": 1})
        prompt = loaded.chat.prompt([dict(turn) for turn in trace.messages]).ids
        example = encoding.encode(loaded, trace, encoding.turn_end(loaded))
        assert example.ids == (*prompt, *trace.completion_ids)
        assert example.trained == (*[False] * len(prompt), *[True] * len(trace.completion_ids))


def test_what_bounds_put_into_a_thought_is_marked_and_not_learned_by_any_model(tmp_path):
    from mlx_traces.traces import encoding

    bounds = {"limit": 3, "samples": 2, "think_tokens": 24, "think_at_least": 20, "think_more": " Wait;"}
    config, out = CONFIG.model_copy(update=bounds), tmp_path / "own.jsonl"
    generate.generate(config, out)
    made, nano, other = rows(out), loading.load("nano"), wrap(make_tokenizer())
    put = "".join(trace.completion[start:end] for trace in made for start, end in trace.forced_text)
    assert set(put) == set(" Wait;\n</think>") and "Wait" in put and "think" in put
    for trace in made:
        assert trace.forced and [*trace.forced] == [i for i, value in enumerate(trace.logprobs) if value is None]
        ids = [trace.completion_ids[place] for place in trace.forced]
        assert nano.tokenizer.decode(ids) == "".join(trace.completion[start:end] for start, end in trace.forced_text)
        example = encoding.encode(other, trace, encoding.turn_end(other))
        learned = [token for token, own in zip(example.ids, example.trained, strict=True) if own]
        sampled, at = "", 0
        for start, end in trace.forced_text:
            sampled, at = sampled + trace.completion[at:start], end
        ending = "<|im_end|>" if trace.finish_reason == "stop" else ""
        assert other.tokenizer.decode(learned) == sampled + trace.completion[at:] + ending


def test_what_was_put_there_is_found_after_a_prefill_and_in_the_usual_tags():
    rollout = Rollout((1,), (2,), "a</hm>b\n</hm>\nSo: 5", "stop", forced_text=((6, 7), (7, 17)))
    found = Completion.sampled("?", "Well <hm>\n", rollout, ("<hm>", "</hm>"))
    assert [found.whole[start:end] for start, end in found.forced] == ["b", "\n</think>\nSo:"]


def test_a_run_that_was_cut_off_ends_as_the_uninterrupted_one(whole, tmp_path, monkeypatch):
    out = tmp_path / "own.jsonl"

    def stop(trace, total):
        if len((tmp_path / ".own.part.jsonl").read_text().splitlines()) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate.generate(CONFIG, out, show=stop)
    with (tmp_path / ".own.part.jsonl").open("a") as file:
        file.write('{"id": "cut off whi')
    with pytest.raises(UserError, match="was begun and cut off; pass --resume"):
        generate.generate(CONFIG, out)
    with pytest.raises(UserError, match=r"begun with other settings \(seed"):
        generate.generate(CONFIG.model_copy(update={"seed": 1}), out, resume=True)
    seen = []
    assert generate.generate(CONFIG, out, resume=True, show=lambda trace, total: seen.append(trace)) == whole[1]
    assert len(seen) == 18  # those of the first run are counted too
    assert [trace.completion_ids for trace in rows(out)] == [trace.completion_ids for trace in rows(whole[0])]
    with pytest.raises(UserError, match="exists; remove it"):
        generate.generate(CONFIG, out)


def test_cut_off_between_the_file_and_its_manifest(tmp_path, monkeypatch):
    out, config = tmp_path / "own.jsonl", CONFIG.model_copy(update={"limit": 2, "max_tokens": 8})
    with monkeypatch.context() as patch:
        renamed = Path.replace
        patch.setattr(Path, "replace", lambda a, b: 1 / 0 if "manifest" in b.name else renamed(a, b))
        with pytest.raises(ZeroDivisionError):
            generate.generate(config, out)
    content = out.read_bytes()
    assert not manifest_path(out).exists()
    generate.generate(config, out, resume=True)
    assert out.read_bytes() == content and manifest_of(out) and not list(tmp_path.glob(".own*"))
    manifest_path(out).unlink()
    with pytest.raises(UserError, match="exists; remove it"):  # now it is somebody's
        generate.generate(config, out, resume=True)
    assert out.read_bytes() == content


def test_a_line_of_the_file_is_plain_json(whole):
    line = json.loads(whole[0].read_text().splitlines()[0])
    assert line["source"] == "nano" and line["task"] == "countdown" and line["finish_reason"] in ("stop", "length")
