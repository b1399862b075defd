"""Bounds on thoughts in evaluations: settings and samples, curves, and the sentence on where more stops paying."""

import json
from dataclasses import replace

import numpy as np
import pytest
from factories import call, make_run, rendered

from mlx_traces import evaluate, generate
from mlx_traces.cli.evaluate import summary
from mlx_traces.config import EvalConfig, GRPOConfig, ValidationConfig, build
from mlx_traces.errors import UserError
from mlx_traces.evaluation import budgets, comparison, evaluator
from mlx_traces.evaluation.budgets import Curve
from mlx_traces.evaluation.comparison import read_run
from mlx_traces.pipelines import verify
from mlx_traces.report import page, tables, terminal
from mlx_traces.train import loop

NANO = {"task": "countdown", "prompt": "thinking", "limit": 6, "max_tokens": 40, "rows": 4}


def test_an_evaluation_stores_its_bounds_and_marks_what_was_put_there(tmp_path):
    result = evaluate(out=tmp_path / "bounded", think_tokens=9, think_at_least=6, **NANO)
    rows = [json.loads(line) for line in (tmp_path / "bounded" / "samples.jsonl").read_text().splitlines()]
    assert (result.think_tokens, result.think_at_least, result.forced) == (9, 6, 6)
    for row in rows:
        put = [row["completion"][start:end] for start, end in row["forced"]]
        assert put[-1].endswith("\n</think>\n") and row["tokens"] <= 49
        assert row["completion"].count("</think>") >= 1
    lines = summary(result)
    assert any(line == "  thought      at least 6 and at most 9 tokens, forced in 6 of 6" for line in lines)
    assert verify.verify(tmp_path / "bounded")[1] == []
    with pytest.raises(UserError, match="think_tokens"):
        evaluate(out=tmp_path / "bounded", resume=True, think_tokens=10, think_at_least=6, **NANO)
    (marked,) = [
        row for row in page.embedded([page.run_view.read(tmp_path / "bounded")])["rows"] if row["id"] == rows[0]["id"]
    ]
    assert "⟦closed here by the budget⟧" in marked["thought"] and marked["forced"]


def test_text_that_was_put_there_is_in_brackets():
    text = "<think>\nabWait\ncd\n</think>\n5"
    spans = [[10, 14], [17, 27]]
    assert page.marked(text, spans) == "<think>\nab⟦Wait⟧\ncd\n⟦closed here by the budget⟧\n</think>\n5"
    then = text[:-1] + "<answer>5</answer>"
    assert page.marked(then, [[17, 35]]) == text[:17] + "\n⟦closed here by the budget⟧\n</think>\n⟦<answer>⟧5</answer>"
    assert page.marked(text, None) == page.marked(text, [[1], "x", [1, None]]) == page.marked(text, 7) == text
    assert page.marked(text, [[8, 10], [9, 14], [10, 14], [27, 3]]) == text[:8] + "⟦ab⟧⟦Wait⟧" + text[14:]  # damaged
    many = page.marked("x" * 100_000, [[0, 100_000]] * 10_000)
    assert many == f"⟦{'x' * 100_000}⟧"


def test_runs_without_bounds_are_named_as_before():
    plain = evaluator.plan(EvalConfig(**NANO))
    assert not any(name.startswith("think_") for name in plain.identity())
    assert evaluator.plan(EvalConfig(**NANO, think_tokens=0)).label != plain.label
    assert "think_tokens" not in loop.validation_of(GRPOConfig(evaluate=ValidationConfig())).model_dump(mode="json")
    own = GRPOConfig(think_tokens=5, evaluate=ValidationConfig(think_tokens=None))
    assert loop.validation_of(own).think_tokens is None


def test_a_result_from_before_budgets_is_read(tmp_path):
    evaluate(out=tmp_path / "run", **NANO)
    file = tmp_path / "run" / "result.json"
    result = json.loads(file.read_text())
    for name in ("think_tokens", "think_at_least", "forced"):
        del result[name]
    file.write_text(json.dumps(result))
    run = read_run(tmp_path / "run")
    assert run.result["think_tokens"] is None and comparison.prompt_of(run.result) == "thinking"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"think_at_least": 9, "think_tokens": 8}, "think_at_least: 9 is above think_tokens"),
        ({"think_tokens": -1}, "think_tokens: must be at least 0"),
        ({"think_more": ""}, "think_more: "),
        ({"think_then": 3}, "think_then: "),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    for kind in (EvalConfig, GRPOConfig):
        with pytest.raises(UserError, match=message):
            build(kind, settings)


def test_no_thought_to_bound_is_one_line(tmp_path):
    with pytest.raises(
        UserError, match=r"nano, prompt 1 of \d+: neither the model .*--prompt thinking\), or .*--prefill"
    ):
        evaluate(out=tmp_path / "run", **{**NANO, "prompt": "direct"}, think_tokens=4)
    assert not (tmp_path / "run").exists()
    told = call("eval", "--endpoint", "http://127.0.0.1:1", "--model", "x", "--think-tokens", 4)
    assert (
        told.exit_code == 1 and "--think-tokens and --think-at-least are for a model that is loaded here" in told.output
    )
    with pytest.raises(UserError, match="think_at_least: nano, prompt 2 of 2: neither the model nor the prompt"):
        generate("nano", ["Write <think> first.", "hello"], think_at_least=4)


# ------------------------------------------------------------------------------------------ curves


def made(budget, right, total=200, **more):
    """Return a run with a budget that answers the first ``right`` problems correctly."""
    return make_run(f"b{budget}", [1] * right + [0] * (total - right), think_tokens=budget, **more)


def test_curves_are_of_runs_that_differ_in_the_budget():
    runs = [made(16, 90), made(0, 50), made(None, 120), made(None, 60, model="other"), made(4, 60, prompt="boxed")]
    (curve,) = budgets.curves(runs)
    assert curve.name == "nano_plain" and [point.budget for point in curve.points] == [0, 16, None]
    assert [point.accuracy for point in curve.points] == [0.25, 0.45, 0.6]
    assert curve.points[0].tokens == np.mean([10 + i for i in range(200)]) and curve.points[0].forced == 0
    assert [(pair.a, pair.b, pair.wins) for pair in curve.pairs] == [
        ("nano_plain ≤16", "nano_plain ≤0", 40),
        ("nano_plain", "nano_plain ≤0", 70),
        ("nano_plain", "nano_plain ≤16", 30),
    ]
    assert budgets.curves(runs[2:]) == []
    assert len(budgets.frame([curve])) == 3
    headings, rows = tables.budgets_cells(curve)
    assert headings[0] == "budget" and [row[0] for row in rows] == ["0 tokens", "16 tokens", "no budget"]
    assert rows[0][1:3] == ["25.0 %", "[19.5, 31.4]"] and max(len("  ".join(row)) for row in rows) < 80


def test_models_with_one_short_name_and_runs_with_one_budget_have_curves_of_their_own():
    models = ("qwen/4bit", "llama/4bit")
    runs = [made(budget, 50 + budget, model=model) for model in models for budget in (0, 16)]
    again = [made(budget, 30, model="qwen/4bit", temperature=0.5) for budget in (0, 16)]
    found = budgets.curves([*runs, *again])
    assert [curve.name for curve in found] == ["qwen/4bit_plain", "llama/4bit_plain", "4bit_plain (2)"]
    assert [[point.accuracy for point in curve.points] for curve in found] == [[0.25, 0.33], [0.25, 0.33], [0.15, 0.15]]


def points(*rows):
    return [budgets.Point(budget, share, low, high, tokens, 0.0) for budget, share, low, high, tokens in rows]


def test_the_terminal_draws_accuracy_against_budget_and_tokens_with_intervals():
    found = points((0, 0.4, 0.3, 0.5, 12), (16, 0.8, 0.7, 0.9, 30), (256, 0.9, 0.9, 1.0, 48), (None, 0.7, 0.6, 0.8, 39))
    curve = Curve("nano", found, [])
    text = rendered(terminal.budget_plots(curve), 80)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80 and len(lines) == 12
    left, right = ([line[at : at + 37].rstrip() for line in text.splitlines()] for at in (0, 39))
    assert left[0] == "accuracy % by budget of the thought" and right[0] == "accuracy % by tokens really used"
    assert left[-1].split() == ["0", "16", "256", "none"] and right[-1].split() == ["12", "30", "39", "48"]
    assert (left[1][:5], left[5][:5], left[9][:5]) == ("100 ┤", " 65 ┤", " 30 ┤")
    column = left[-1].index("0")  # of the budget 0: 0.4 on a bar from 0.3 to 0.5, in steps of 0.0875
    assert [line[column] for line in left[7:10]] == ["┬", "●", "┴"]
    best = right[-1].index("48") + 1  # of 0.9 on a bar from 0.9 to 1
    assert [line.ljust(37)[best] for line in right[1:4]] == ["┬", "●", " "]
    assert all("·" in "".join(half) for half in (left, right))
    narrow = [line.rstrip() for line in rendered(terminal.budget_plots(curve), 60).splitlines()]
    assert narrow == left + right  # one below the other


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 0.0, 0.0, 0.0, 5), (16, 0.0, 0.0, 0.0, 5)],
        [(0, 1.0, 1.0, 1.0, None), (16, 1.0, 0.99, 1.0, None)],
        [(2**i, 0.5, 0.0, 1.0, 10**i) for i in range(40)],
    ],
)
def test_plots_of_odd_curves_keep_their_size(rows):
    text = rendered(terminal.budget_plots(Curve("x", points(*rows), [])), 80)
    assert max(map(len, text.splitlines())) <= 80 and "●" in text
    assert ("tokens really used" in text) == (rows[0][-1] is not None)


def test_the_sentence_says_what_bounds_a_run_without_a_budget():
    runs = [made(0, 50, max_tokens=128), made(None, 60, max_tokens=128)]
    runs[1].samples[0]["finish_reason"] = "length"
    for row in runs[1].samples[1:]:
        row["finish_reason"] = "stop"
    (curve,) = budgets.curves(runs)
    said = (
        "Without a budget, max_tokens (128) bounds thought and answer together: 0.5 % of the completions were cut off"
    )
    assert said in budgets.sentence(curve) and "Without a budget" not in sentence_of(50, 90)
    assert tables.budgets_cells(curve)[1][1][-1] == "0.5 %"


def sentence_of(*rights):
    (curve,) = budgets.curves([made(budget, right) for budget, right in zip((0, 16, 64, 256), rights, strict=False)])
    assert isinstance(curve, Curve)
    return budgets.sentence(curve)


def test_the_sentence_says_where_more_thinking_stops_paying():
    text = sentence_of(50, 90, 120, 121)
    assert text.startswith("nano_plain: thinking beyond 16 tokens pays, 64 tokens +15.0 points [")
    assert " on 200 problems, p < 1e-4 after Holm over 6 pairs; beyond 64 tokens no gain is shown: 256 tokens" in text
    assert "256 tokens +0.5 points [0.0, 1.5] on 200 problems, p = 1.000 after Holm over 6 pairs; a gain of up" in text
    assert text.endswith("a gain of up to 1.9 points is compatible.")  # Wilson's end for 0 of 200
    assert sentence_of(50, 90, 120, 160).endswith("256 tokens is the largest budget that was tried.")
    none = sentence_of(50, 51, 50, 49)
    assert none.startswith("nano_plain: no thinking beyond 0 tokens is shown to pay: 16 tokens +0.5 points")
    assert "pays" not in none and none.endswith("points is compatible.")
    worse = sentence_of(50, 120, 119, 60)
    assert "thinking beyond 0 tokens pays, 16 tokens +35.0 points" in worse
    assert "beyond 16 tokens no gain is shown: 64 tokens -0.5 points" in worse
    assert "With 256 tokens it is right less often (-30.0 points" in worse


def test_a_gain_that_holm_takes_away_is_not_claimed():
    """5 won and none lost have p = 0.06; 6 have 0.03, which the other pairs take away."""
    two = budgets.curves([made(0, 50), made(16, 56)])
    assert "thinking beyond 0 tokens pays" not in sentence_of(50, 56, 56, 56)
    assert budgets.sentence(two[0]).startswith("nano_plain: thinking beyond 0 tokens pays, 16 tokens +3.0 points")
    again = replace(two[0], pairs=[replace(two[0].pairs[0], p_holm=0.2)])
    assert "no thinking beyond 0 tokens is shown to pay" in budgets.sentence(again)
