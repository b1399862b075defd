"""The recipes of score and filter: what models say of a trace, files in and out, the commands."""

import hashlib
import json
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from factories import CHATML, broken, call, make_model, make_tokenizer, wrap

import mlx_traces.engine.generation
from mlx_traces.config import ScoreConfig
from mlx_traces.errors import UserError
from mlx_traces.models import loading
from mlx_traces.records import Rollout, Trace
from mlx_traces.runtime.provenance import ids_digest
from mlx_traces.tasks import get_task
from mlx_traces.traces.files import manifest_of, read_traces
from mlx_traces.traces.judge import Cache, judge, parse_judgement
from mlx_traces.traces.perplexity import mean_probabilities
from mlx_traces.traces.quality import COMPONENTS
from mlx_traces.traces.score import own_probability, score_traces, summary

COLUMNS = {"nums": [3, 4, 6], "target": 30}
THOUGHT = "<think>\n4 + 6 = 10, 3 no\n4 + 6 = 10, 10 * 3 = 30 yes\n</think>\n"


def trace(completion, **fields):
    asked = ({"role": "user", "content": "Make 30 from 3, 4, 6"},)
    return Trace(**{"id": "p", "messages": asked, "completion": completion, **fields})


RIGHT = trace(THOUGHT + "<answer>3 * (4 + 6)</answer>", task="countdown", columns=COLUMNS, finish_reason="stop")
WRONG = trace(THOUGHT + "<answer>3 + 4 + 6</answer>", task="countdown", columns=COLUMNS, finish_reason="stop")


# ---------------------------------------------------------------------------------------------- traces


def test_traces_get_verdict_scores_and_score():
    right, wrong, free = score_traces([RIGHT, WRONG, trace("So 2 + 2 = 5.")], ScoreConfig())
    assert (right.verdict, wrong.verdict, free.verdict) == ("correct", "wrong_value", None)
    assert tuple(right.scores) == COMPONENTS
    words = len(RIGHT.completion.split())
    expected = {
        **{"correct": 1, "format": 1, "structure": 0.5 * 2 / 5 + 0.25, "faithfulness": 1},
        **{"length": round(1 - words / 2048, 6), "repetition": 20 / 22, "perplexity": None, "judge": None},
    }  # 25 words; the first four and the four from + on stand twice
    assert right.scores == pytest.approx(expected)
    mean = (1 + 0.5 * expected["structure"] + 1 + 0.5 * expected["length"] + 20 / 22) / 4
    assert right.score == pytest.approx((1 + mean) / 2, abs=1e-6)
    assert wrong.score == 0
    assert free.scores["correct"] is free.scores["faithfulness"] is None  # outside a thought nothing is claimed
    assert 0 < free.score < 1


def test_a_prefill_is_no_fault_of_the_trace():
    opened = "Let me solve this step by step.\n"
    ours = replace(RIGHT, completion=opened + RIGHT.completion, prompt="tinyzero")
    assert score_traces([ours], ScoreConfig())[0].scores["format"] == 1
    assert score_traces([replace(ours, prompt="")], ScoreConfig())[0].scores["format"] == 0


def test_tokens_are_counted_where_known():
    ours = replace(RIGHT, completion_ids=(1,) * 64)
    assert score_traces([ours], ScoreConfig(length_limit=256))[0].scores["length"] == 0.75


def test_an_unknown_task_says_where():
    with pytest.raises(UserError, match="^x.jsonl:3: unknown task 'chess'"):
        score_traces([trace("a", task="chess")], ScoreConfig(), ["x.jsonl:3"])


def test_summary_is_the_mean_where_it_applies():
    rows = {
        name: (mean, share) for name, mean, share in summary(score_traces([RIGHT, WRONG, trace("x")], ScoreConfig()))
    }
    assert rows["correct"] == (0.5, pytest.approx(2 / 3))
    assert rows["judge"] == (None, 0)
    assert list(rows) == [*COMPONENTS, "score"]


# ---------------------------------------------------------------------------------------------- perplexity


def test_own_probability_by_hand():
    assert own_probability(trace("a", logprobs=(math.log(0.5), math.log(0.125)))) == pytest.approx(0.25)
    assert own_probability(trace("a")) is own_probability(trace("a", logprobs=(0.0, 0.0))) is None


def direct(tiny, prompt, completion):
    """Compute exp(mean log p) of a completion by one whole forward pass and numpy's float64."""
    head, tail = (tiny.tokenizer.encode(text, add_special_tokens=False) for text in (prompt, completion))
    logits = np.array(tiny.model(mx.array([head + tail]))[0], np.float64)
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return math.exp(np.mean([logprobs[len(head) + at - 1, token] for at, token in enumerate(tail)]))


def test_perplexity_is_that_of_a_direct_forward_pass(tiny):
    texts = ["a short one", "x" * 60, "a longer text, to be padded against", "?"]
    found = mean_probabilities(tiny, [trace(text) for text in texts])
    prompt = "<|im_start|>user\nMake 30 from 3, 4, 6<|im_end|>\n<|im_start|>assistant\n"
    assert found == pytest.approx([direct(tiny, prompt, text) for text in texts], rel=1e-4)
    assert len({round(value, 6) for value in found}) == len(texts)


def test_all_turns_count_and_what_the_template_opens_is_not_the_trace(tiny):
    turns = ({"role": "system", "content": "S"}, {"role": "user", "content": "a"})
    turns += ({"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    prompt = "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns) + "<|im_start|>assistant\n"
    (found,) = mean_probabilities(tiny, [trace("d e f", messages=turns)])
    assert found == pytest.approx(direct(tiny, prompt, "d e f"), rel=1e-4)


def test_a_thought_that_the_template_opens_is_read_once(tiny):
    opening = make_tokenizer(CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    (found,) = mean_probabilities(wrap(opening, tiny.model), [trace("<think>\na b</think>c")])
    prompt = "<|im_start|>user\nMake 30 from 3, 4, 6<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert found == pytest.approx(direct(tiny, prompt, "a b</think>c"), rel=1e-4)


def test_a_broken_models_perplexity_is_refused(tiny):
    """NaN is neither a good nor a bad score."""
    with pytest.raises(UserError, match="^tiny: its outputs are not finite numbers"):
        mean_probabilities(wrap(make_tokenizer(), broken(make_model(1))), [trace("one two")])


def test_what_has_no_perplexity(tiny):
    assert mean_probabilities(tiny, [trace(""), trace("x" * 600), trace("a")])[:2] == [None, None]
    (bare,) = mean_probabilities(tiny, [trace("text alone", messages=())])
    stop = tiny.tokenizer.decode([min(tiny.stop_ids)])
    assert bare == pytest.approx(direct(tiny, stop, "text alone"), rel=1e-4)
    (some,) = mean_probabilities(tiny, [trace("text alone", messages=(), forced_text=((4, 10),))])
    assert some == pytest.approx(direct(tiny, stop, "text"), rel=1e-4)


# ---------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("Fine.\nScore: 0.8", 0.8),
        ("Score: 1", 1.0),
        ("Score:0\n", 0.0),
        ("<think>Score: 0.1</think>Good.\nScore: 1.0", 1.0),
        ("I would say 0.8", None),
        ("Score: 0.8 or so", None),
        ("Score: 0.8\nThat is all.", None),
        ("Score: 0.2\nNo:\nScore: 0.8", None),
        ("Score: 1.5", None),
        ("Score: 8", None),
        ("Score: 8/10", None),
        ("Score: .8", None),
        ("Score: -0.5", None),
        ("score: 0.5", None),
        ("<think>Score: 0.8", None),
        ("", None),
    ],
)
def test_only_one_exact_final_line_is_a_grade(reply, grade):
    assert parse_judgement(reply) == grade


@pytest.fixture
def rubric(tmp_path):
    file = tmp_path / "rubric.yaml"
    file.write_text("user: 'Q {question} T {trace}'\n")
    return ScoreConfig(judge_prompt=str(file), judge_cache=str(tmp_path / "deep" / "judge.jsonl"), judge_max_tokens=8)


@pytest.fixture
def replies(monkeypatch):
    """Replace the engine; returns the prompts that were put, and takes replies from a function of the prompt."""
    put = []

    def use(reply_of, loaded):
        def generate(_, requests, params, rows, **options):
            assert params.temperature == 0
            texts = [loaded.tokenizer.decode(request.prompt_ids) for request in requests]
            put.append(texts)
            order = reversed(range(len(requests)))  # as they finish
            return ((i, Rollout(requests[i].prompt_ids, (1,), reply_of(texts[i]), "stop")) for i in order)

        monkeypatch.setattr(mlx_traces.engine.generation, "generate", generate)
        return put

    return use


def test_grades_go_to_their_traces_and_nothing_is_asked_twice(tiny, rubric, replies):
    put = replies(lambda text: f"Hm.\nScore: 0.{text.count('x')}", tiny)
    traces = [trace("x"), trace("xxx"), trace("x"), trace("xx")]
    assert judge(tiny, traces, [None] * 4, rubric) == [0.1, 0.3, 0.1, 0.2]
    assert len(put[0]) == 3
    assert "Q Make 30 from 3, 4, 6 T xxx<|im_end|>" in put[0][1]
    assert judge(tiny, [*traces, trace("xxxx")], [None] * 5, rubric) == [0.1, 0.3, 0.1, 0.2, 0.4]
    assert [len(texts) for texts in put] == [3, 1]
    judge(tiny, traces, [None] * 4, rubric.model_copy(update={"judge_max_tokens": 9}))
    assert len(put[2]) == 3  # another setting is another question


def test_prose_is_no_grade_and_too_much_of_it_stops(tiny, rubric, replies):
    replies(lambda text: "Score: 0.5" if "x" in text else "Lovely!", tiny)
    some = [trace("x"), trace("xx"), trace("xxx"), trace("xxxx"), trace("a")]
    assert judge(tiny, some, [None] * 5, rubric) == [0.5, 0.5, 0.5, 0.5, None]  # a fifth, as allowed
    with pytest.raises(UserError, match=r"^tiny gave no 'Score: 0.8' line for 2 of 6 traces \(it says 'Lovely!'\)"):
        judge(tiny, [trace("b"), *some], [None] * 6, rubric)


def test_a_trace_too_long_for_the_judge_has_no_grade(tiny, rubric, replies):
    replies(lambda text: "Score: 0.5", tiny)
    traces = [*[trace("x" * n) for n in range(1, 5)], trace("x" * 600)]
    assert judge(tiny, traces, [None] * 5, rubric) == [0.5] * 4 + [None]


def test_a_real_model_judges(tiny, rubric):
    lenient = rubric.model_copy(update={"judge_failures": 1.0})
    score_traces([trace("x")], lenient.model_copy(update={"judge": "nano"}), used=(used := {}))
    assert used == {"judge": loading.load("nano").about()}
    assert judge(tiny, [trace("x"), trace("xx")], [None] * 2, lenient) == [None, None]  # random weights talk nonsense
    with pytest.raises(UserError, match="for 2 of 2 traces"):
        judge(tiny, [trace("x"), trace("xx")], [None] * 2, rubric)


def test_the_cache_survives_a_cut_line_and_refuses_a_broken_one(tmp_path):
    file = tmp_path / "judge.jsonl"
    Cache(file).add("k", "Score: 1")
    with file.open("a") as lines:
        lines.write('{"key": "l", "rep')
    cache = Cache(file)
    assert cache.replies == {"k": "Score: 1"}
    cache.add("l", "é\n")
    assert Cache(file).replies == {"k": "Score: 1", "l": "é\n"}
    file.write_text(file.read_text().removesuffix("\n"))
    Cache(file).add("m", "z")
    assert Cache(file).replies == {"k": "Score: 1", "l": "é\n", "m": "z"}
    file.write_text('{"key": 1, "reply": "x"}\n')
    with pytest.raises(UserError, match="judge.jsonl:1: 'key' and 'reply' must be texts"):
        Cache(file)


@pytest.mark.parametrize(
    "text", ["a thesis in one line", "one\ntwo", '{"key": "k", "reply": "x"}\n{"id": 1}\ntorn', "{"]
)
def test_a_file_that_is_no_cache_is_refused_and_stays_as_it_is(tmp_path, text):
    file = tmp_path / "thesis.txt"
    file.write_text(text)
    with pytest.raises(UserError, match="^.*thesis.txt:[12]: "):
        Cache(file)
    assert file.read_text() == text


# ---------------------------------------------------------------------------------------------- commands


@pytest.fixture
def raw(tmp_path):
    file = tmp_path / "raw.jsonl"
    file.write_text("".join(json.dumps(each.to_row()) + "\n" for each in (RIGHT, WRONG, RIGHT)))
    return file


def test_score_then_filter(raw, tmp_path):
    scored, kept = tmp_path / "processed" / "s.jsonl", tmp_path / "processed" / "f.jsonl"
    result = call("score", raw, "--out", scored, "--mix", "format=1", "--mix", "structure=1")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.output.splitlines() if "correct" in line)
    assert "0.667" in row and "100 %" in row
    assert "3 scored traces written" in result.output
    traces = [each for _, each in read_traces(scored)]
    assert traces[0].score == pytest.approx((1 + (1 + 0.45) / 2) / 2)
    manifest = manifest_of(scored)
    assert manifest["config"]["mix"] == {"format": 1, "structure": 1} and "models" not in manifest
    assert manifest["source_sha256"] == hashlib.sha256(raw.read_bytes()).hexdigest()
    result = call("filter", scored, "--out", kept, "--well-formed", "--min-score", "0.5", "--eval-task", "countdown")
    assert result.exit_code == 0, result.output
    assert [each for _, each in read_traces(kept)] == traces[:1]
    removed = {
        "correct only": 1,
        "well-formed": 0,
        "finished": 0,
        "score": 0,
        "duplicates": 1,
        "evaluation problems": 0,
    }
    assert manifest_of(kept)["counts"] == {"written": 1, "removed": removed}
    assert manifest_of(kept)["source_sha256"] == manifest["sha256"]
    loaded = get_task("countdown").load("test", None, None, 0)
    assert manifest_of(kept)["problems"] == ids_digest([problem.id for problem in loaded])
    assert "duplicates" in result.output


def test_evaluation_problems_of_a_file_are_left_out(raw, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(COLUMNS) + "\n")
    unlike = {**RIGHT.to_row(), "id": "countdown-3-4-6-to-30"}
    raw.write_text(raw.read_text() + json.dumps(unlike) + "\n")
    result = call("filter", raw, "--out", tmp_path / "f.jsonl", "--eval-task", "countdown", "--eval-data", held)
    assert result.exit_code == 0, result.output
    assert {each.id for _, each in read_traces(tmp_path / "f.jsonl")} == {"p"}


@pytest.mark.parametrize("command", ["score", "filter"])
def test_faults_are_one_line_and_leave_nothing(command, raw, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    result = call(command, raw, "--out", out)
    assert (result.exit_code, result.output.strip()) == (
        1,
        f"Error: {out} exists; remove it, or choose another --out",
    )
    assert out.read_text() == "mine"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert call(command, empty, "--out", tmp_path / "new.jsonl").output == f"Error: {empty} has no traces\n"
    assert not (tmp_path / "new.jsonl").exists()
    assert "cannot be read" in call(command, tmp_path / "none.jsonl", "--out", tmp_path / "new.jsonl").output


def test_settings_faults_are_one_line(raw, tmp_path):
    out = tmp_path / "new.jsonl"
    assert "Error: --mix format: give NAME=WEIGHT" in call("score", raw, "--out", out, "--mix", "format").output
    assert "Error: mix.foo" in call("score", raw, "--out", out, "--mix", "foo=1").output
    assert "name its task" in call("filter", raw, "--out", out, "--eval-data", "x.jsonl").output
    assert not out.exists()


def test_a_model_scores_from_the_command_line(raw, tmp_path, tiny_folder):
    result = call("score", raw, "--out", tmp_path / "s.jsonl", "--model", tiny_folder)
    assert result.exit_code == 0, result.output
    values = [each.scores["perplexity"] for _, each in read_traces(tmp_path / "s.jsonl")]
    assert all(0 < value < 1 for value in values) and values[0] == pytest.approx(values[2], rel=1e-3) != values[1]
