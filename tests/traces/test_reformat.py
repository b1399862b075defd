"""Traces rewritten as thought and solution: what each rule makes of them, what is dropped and why, the command."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from factories import call

from mlx_traces.config import ReformatConfig
from mlx_traces.errors import UserError
from mlx_traces.records import Rollout, Trace
from mlx_traces.tasks import get_task
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.tasks.thoughts import restyle
from mlx_traces.traces.files import manifest_of, read_traces
from mlx_traces.traces.quality import format_score, headline, problem_of
from mlx_traces.traces.reformat import REWRITING, by_rule, reformat, reformat_file

ASKED = ({"role": "user", "content": "Make 30 from 3, 4, 6."},)
WORK, ANSWER = "4 + 6 = 10, 10 * 3 = 30 yes", "<answer>3 * (4 + 6)</answer>"
COLUMNS = {"nums": [3, 4, 6], "target": 30}
RIGHT = Trace("p", ASKED, f"<think>\n{WORK}\n</think>\n{ANSWER}", task="countdown", columns=COLUMNS, source="solver")
WORDS = Trace("q", ASKED, f"First 4 + 6.\n{WORK}\nSo {ANSWER}.", task="countdown", columns=COLUMNS)
SKY = "<|begin_of_thought|>\n\n{}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n{}\n\n<|end_of_solution|>"


def reformatted(*traces, prompt=REWRITING, **settings):
    dropped = Counter()
    problems = [problem_of(trace, "here") for trace in traces]
    return list(reformat(traces, problems, ReformatConfig(**settings), prompt, dropped)), dict(dropped)


# ---------------------------------------------------------------------------------- by rule


@pytest.mark.parametrize(
    ("text", "thought", "solution"),
    [
        (RIGHT.completion, WORK, ANSWER),
        (f"[THINK]{WORK}[/THINK]<solution>So {ANSWER}</solution>", WORK, f"So {ANSWER}"),
        (WORDS.completion, f"First 4 + 6.\n{WORK}", f"So {ANSWER}."),
        ("One.\nTwo makes 2.\n#### 2", "One.\nTwo makes 2.", "#### 2"),
        ("One is \\boxed{1}.\nNo:\nit is \\boxed{2}.\nDone.", "One is \\boxed{1}.\nNo:", "it is \\boxed{2}.\nDone."),
        ("One.\n<answer>\n2\n</answer>", "One.", "<answer>\n2\n</answer>"),
        ("It is:\n\\[\n\\boxed{2}\n\\]", "It is:", "\\[\n\\boxed{2}\n\\]"),
        ("It is\n\n```\n#### 2\n```", "It is", "```\n#### 2\n```"),
        ("$$\n1\n$$\nis it:\n$$\n\\boxed{2}\n$$", "$$\n1\n$$\nis it:", "$$\n\\boxed{2}\n$$"),
        ("$$\n1\n$$\n#### 2", "$$\n1\n$$", "#### 2"),
        (
            "So\n\\[\n\\begin{aligned}\nx &= 1 + 1 \\\\\n&= \\boxed{2}\n\\end{aligned}\n\\]",
            "So",
            "\\[\n\\begin{aligned}\nx &= 1 + 1 \\\\\n&= \\boxed{2}\n\\end{aligned}\n\\]",
        ),
        ("```\n1 + 1\n#### 2\n```", "```\n1 + 1", "#### 2\n```"),
    ],
)
def test_where_thought_and_solution_are_found(text, thought, solution):
    assert by_rule(text) == SKY.format(thought, solution)
    assert by_rule(by_rule(text)) == by_rule(text)
    assert format_score(by_rule(text), None, "sky-t1") == 1


@pytest.mark.parametrize(
    "text", ["#### 2", "It is 2.", "", "<think>It is \\boxed{2}", "<think>x</think>", "\\boxed{2}"]
)
def test_what_has_no_thought_or_no_solution_is_not_in_form(text):
    assert format_score(by_rule(text), None, "sky-t1") == 0


def test_only_what_is_still_correct_is_kept_and_the_rest_is_counted():
    traces = [
        replace(RIGHT, completion_ids=(1, 2), logprobs=(-1.0, -2.0), finish_reason="stop", scores={"format": 1.0}),
        WORDS,
        replace(RIGHT, completion=RIGHT.completion.replace("(4 + 6)", "4 + 6")),
        replace(RIGHT, finish_reason="length"),
        replace(RIGHT, task="", columns={}),
        replace(RIGHT, completion=ANSWER),
        replace(RIGHT, completion=f"<think>\n{ASKED[0]['content']}\n</think>\n{ANSWER}"),
        replace(RIGHT, completion=f"<think>\n{WORK}\n</think>\n<answer>3</answer>{ANSWER}"),
    ]
    for to in ("sky-t1", "think"):
        (one, two), dropped = reformatted(*traces, to=to)
        assert one.completion == restyle(SKY.format(WORK, ANSWER), to)
        assert two.completion == restyle(SKY.format(f"First 4 + 6.\n{WORK}", f"So {ANSWER}."), to)
        assert (one.completion_ids, one.logprobs, one.scores, one.verdict) == (None, None, {}, "correct")
        assert one.source == "solver" and one.finish_reason == "stop" and one.columns == COLUMNS
        assert dropped == {
            "wrong before": 1,
            "cut off": 1,
            "no task can judge it": 1,
            "not a thought and a solution": 3,  # no thought, the prompt for one, a second answer
        }


def test_what_was_forced_stays_marked_in_every_form(rewriter, tmp_path):
    thought, closing = WORK + "Wait, yes", "\n</think>\n"
    text = f"<think>\n{thought}{closing}{ANSWER}"
    spans = [(text.index(words), text.index(words) + len(words)) for words in ("Wait", closing)]
    bounded = replace(RIGHT, completion=text, completion_ids=(1, 2, 3), forced=(1, 2), forced_text=tuple(spans))
    (sky,), dropped = reformatted(bounded, to="sky-t1")
    assert sky.forced is None and not dropped
    put = [sky.completion[start:end] for start, end in sky.forced_text]
    assert put == ["Wait", "\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n"]
    assert reformatted(sky, to="think")[0] == [replace(sky, completion=text, forced_text=tuple(spans))]
    prefill = get_task("countdown").prompts["tinyzero"].prefill.removesuffix("<think>")
    moved = tuple((start + len(prefill), end + len(prefill)) for start, end in spans)
    opened = replace(bounded, prompt="tinyzero", completion=prefill + text, forced_text=moved)
    assert reformatted(opened, to="sky-t1")[0][0].forced_text == sky.forced_text
    rewriter(lambda _: "")
    for trace in (bounded, sky):
        kept, dropped = reformatted(trace, model="m", cache=str(tmp_path / "c.jsonl"))
        assert not kept and dropped == {"a model would rewrite the words that were forced into it": 1}
    old = replace(bounded, forced_text=None)
    assert reformatted(old) == ([], {"it does not say which words were forced into it": 1})


def test_what_the_rewriting_breaks_is_dropped():
    number = {"question": "How many?", "answer": "#### 7"}
    turns = ({"role": "user", "content": "How many?"},)
    # A \boxed{} goes before a ####; cut before the latter's line it is part of the thought.
    broken = Trace("n", turns, "3 + 4 is \\boxed{7}.\nTwo more are\n#### 9", task="gsm8k", columns=number)
    assert headline(get_task("gsm8k"), problem_of(broken, ""), broken.completion).correct
    assert reformatted(broken) == ([], {"wrong after": 1})
    fine = replace(broken, completion="<think>3 + 4 = 7</think>\nIt is 7.")
    assert reformatted(fine)[0][0].completion == SKY.format("3 + 4 = 7", "It is 7.")


def test_a_prefill_is_not_taken_for_a_thought():
    opened = get_task("countdown").prompts["tinyzero"].prefill
    trace = replace(RIGHT, prompt="tinyzero", completion=f"{opened}\n{WORK}\n</think>\n{ANSWER}")
    assert opened.endswith("<think>") and len(opened) > len("<think>")
    assert reformatted(trace)[0][0].completion == SKY.format(WORK, ANSWER)


# ---------------------------------------------------------------------------------- by a model


@pytest.fixture
def rewriter(tiny, monkeypatch):
    """A model whose replies are a function of the prompt; returns what was put."""
    put = []

    def use(reply_of):
        def generate(_, requests, params, rows, **options):
            assert params.temperature == 0
            texts = [tiny.tokenizer.decode(request.prompt_ids) for request in requests]
            put.extend(texts)
            return ((i, Rollout(requests[i].prompt_ids, (1,), reply_of(text), "stop")) for i, text in enumerate(texts))

        monkeypatch.setattr("mlx_traces.models.loading.load", lambda name, **_: tiny)
        monkeypatch.setattr("mlx_traces.engine.generation.generate", generate)
        return put

    return use


ASK = Prompt("ask", "Q {question} A {trace}")


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (SKY.format("Four and six.", f"So {ANSWER}"), None),
        (f"<think>I shall.</think>\n{SKY.format('Four and six.', ANSWER)}\n", None),
        (SKY.format("Four and six.", "<answer>3 + 4 + 6</answer>"), "wrong after"),
        (SKY.format("Four and six.", "It is 30."), "wrong after"),
        (f"Here you are: {SKY.format('Four.', ANSWER)}", "not a thought and a solution"),
        (SKY.format("Four.", ANSWER) + "\nShall I go on?", "not a thought and a solution"),
        (SKY.format("", ANSWER), "not a thought and a solution"),
        (SKY.format("Make 30 from 3, 4, 6.", ANSWER), "not a thought and a solution"),
        (SKY.format(ANSWER, ANSWER), "not a thought and a solution"),
        (SKY.format("Four.", ANSWER) * 2, "not a thought and a solution"),
        (f"<think>\nFour.\n</think>\n{ANSWER}", "not a thought and a solution"),
        ("", "not a thought and a solution"),
    ],
)
def test_a_models_reply_is_taken_in_exactly_one_form(rewriter, tmp_path, reply, fault):
    rewriter(lambda _: reply)
    kept, dropped = reformatted(RIGHT, prompt=ASK, model="m", max_tokens=8, cache=str(tmp_path / "c.jsonl"), to="think")
    assert dropped == ({fault: 1} if fault else {})
    if not fault:
        assert kept[0].completion.startswith("<think>\nFour and six.\n</think>\n")
        assert headline(get_task("countdown"), problem_of(RIGHT, ""), kept[0].completion).correct
        assert kept[0].source == "solver, rewritten by m"


def test_a_model_is_asked_about_correct_traces_only_and_once(rewriter, tmp_path):
    put = rewriter(lambda text: SKY.format("Four and six.", ANSWER))
    wrong = replace(RIGHT, completion=RIGHT.completion.replace("4 + 6)", "4 - 6)"))
    long = replace(RIGHT, completion=f"<think>\n{'so ' * 400}\n</think>\n{ANSWER}")
    settings = {"prompt": ASK, "model": "m", "max_tokens": 8, "cache": str(tmp_path / "deep" / "c.jsonl")}
    kept, dropped = reformatted(RIGHT, wrong, long, WORDS, RIGHT, **settings)
    assert len(kept) == 3 and dropped == {"wrong before": 1, "too long for the model": 1} and len(put) == 2
    assert f"Q {ASKED[0]['content']} A {RIGHT.completion}" in put[0]
    assert reformatted(RIGHT, WORDS, **settings)[0] == kept[:2] and len(put) == 2


def test_a_model_of_random_weights_gives_none(tiny_folder, tmp_path):
    settings = {"prompt": ASK, "model": str(tiny_folder), "max_tokens": 8, "cache": str(tmp_path / "c.jsonl")}
    assert reformatted(RIGHT, **settings, device="cpu") == ([], {"not a thought and a solution": 1})


# ---------------------------------------------------------------------------------- files


def test_the_command(tmp_path):
    raw, out = tmp_path / "raw.jsonl", tmp_path / "new" / "sky.jsonl"
    assert call("data", "countdown-traces", "--n", 20, "--out", raw).exit_code == 0
    with raw.open("a") as file:
        file.write(json.dumps(WORDS.to_row() | {"completion": "It is 30."}) + "\n")
    before = [trace for _, trace in read_traces(raw)]
    result = call("reformat", raw, "--to", "sky-t1", "--out", out)
    assert result.exit_code == 0 and result.stderr.endswith("; 1 dropped (wrong before)\n"), result.output
    after = [trace for _, trace in read_traces(out)]
    assert [trace.id for trace in after] == [trace.id for trace in before[:-1]]
    assert all(format_score(trace.completion, None, "sky-t1") == 1 for trace in after)
    manifest = manifest_of(out)
    assert manifest["counts"] == {"written": len(after), "dropped": {"wrong before": 1}}
    assert manifest["source"] == str(raw) and manifest["config"]["to"] == "sky-t1"
    assert call("reformat", out, "--to", "think", "--out", tmp_path / "back.jsonl").exit_code == 0
    assert [trace.completion for _, trace in read_traces(tmp_path / "back.jsonl")] == [
        t.completion for t in before[:-1]
    ]


def test_faults_are_one_line_and_leave_nothing(tmp_path):
    raw, out = tmp_path / "raw.jsonl", tmp_path / "out.jsonl"
    for content, message in (
        ("", "raw.jsonl has no traces"),
        (json.dumps(replace(RIGHT, task="chess").to_row()), "raw.jsonl:1: unknown task 'chess'"),
        (json.dumps(replace(RIGHT, columns={}).to_row()), "raw.jsonl:1: "),
        (json.dumps(replace(RIGHT, completion="30").to_row()), "no traces to write; counted: 1 dropped (wrong before)"),
    ):
        raw.write_text(content)
        result = call("reformat", raw, "--out", out)
        assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1, result.output
        assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]
    out.write_text("mine")
    with pytest.raises(UserError, match="out.jsonl exists"):
        reformat_file(tmp_path / "none.jsonl", out, ReformatConfig())
    assert out.read_text() == "mine"
