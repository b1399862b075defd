"""The comparison table against hand-computed values; its renderings and files as they will be read."""

import csv
import io
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import BASE, BETTER, make_run, rendered
from scipy.stats import t as student_t

from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison, pairs, power, stats, variance
from mlx_traces.evaluation.comparison import Run
from mlx_traces.report import export, tables
from mlx_traces.text import p_text, percent


def three_runs() -> list[Run]:
    return [
        make_run("base", BASE),
        make_run("better", BETTER, prompt="thinking", adapter="runs/sft-01"),
        make_run("same", BASE, prompt="boxed"),
    ]


def many_runs(count: int, size: int = 1319) -> list[Run]:
    rng = np.random.default_rng(0)
    hardness = rng.random(size)
    runs = []
    for i in range(count):
        correct = (0.7 * hardness + 0.3 * rng.random(size) < 0.3 + 0.05 * i).astype(int).tolist()
        model = f"mlx-community/Qwen2.5-Coder-{i}.5B-Instruct-with-a-very-long-name-4bit"
        runs.append(make_run(f"run-{i}", correct, model=model, adapter="adapters/" + "long-" * 8 + "name"))
    return runs


def test_compare_runs_on_eight_problems_by_hand():
    frame = comparison.compare_runs(three_runs())
    base, better, same = frame.to_dict("records")
    assert (base["accuracy"], base["correct_count"], base["total_questions"]) == (0.25, 2, 8)
    assert (base["ci_low"], base["ci_high"]) == pytest.approx((0.0715, 0.5907), abs=1e-4)
    assert frame.loc[0, ["diff", "diff_low", "diff_high", "p_value", "p_holm"]].isna().all()
    assert (better["accuracy"], better["diff"]) == (0.75, 0.5)
    assert -0.1 <= better["diff_low"] < 0.5 < better["diff_high"] <= 1
    assert better["p_value"] == pytest.approx(2 * (1 + 6) / 64)  # 5 wins, 1 loss
    assert better["p_holm"] == pytest.approx(2 * better["p_value"])
    assert (same["diff"], same["diff_low"], same["diff_high"], same["p_value"]) == (0, 0, 0, 1)
    assert base["tokens_per_answer"] == 13.5
    assert base["tokens_per_second"] == 123.4
    assert base["truncated"] == 1 / 8
    assert (better["model"], better["adapter"], better["prompt"]) == ("org/nano", "runs/sft-01", "thinking")


@pytest.mark.parametrize("baseline", [1, -2, "better", "nano+sft-01_thinking"])
def test_baseline_by_index_name_or_label(baseline):
    frame = comparison.compare_runs(three_runs(), baseline)
    assert frame["diff"].isna().tolist() == [False, True, False]
    assert frame["diff"].tolist()[0] == -0.5


def test_unknown_baseline_names_the_runs():
    with pytest.raises(UserError, match=r"unknown baseline 'bettr'.*base, nano_plain, .*did you mean 'better'"):
        comparison.compare_runs(three_runs(), "bettr")
    with pytest.raises(UserError, match="there are 3 runs"):
        comparison.compare_runs(three_runs(), 3)
    with pytest.raises(UserError, match="no runs to compare"):
        comparison.compare_runs([])


def test_pairing_is_by_problem_id_not_by_line():
    runs = three_runs()
    expected = comparison.compare_runs(runs)
    shuffled = [replace(run, samples=run.samples[i:] + run.samples[:i]) for i, run in enumerate(runs)]
    assert comparison.compare_runs(shuffled).equals(expected)


def test_several_samples_cluster_by_problem():
    a = [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    b = [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    frame = comparison.compare_runs([make_run("a", a), make_run("b", b, prompt="boxed")])
    base, other = frame.to_dict("records")
    assert (base["accuracy"], base["correct_count"], base["total_questions"]) == (7 / 20, 7, 20)
    assert (base["ci_low"], base["ci_high"]) == stats.wilson_clustered([2, 4, 0, 1, 0], 4)
    assert base["ci_high"] - base["ci_low"] > np.diff(stats.wilson(7, 20))[0] * 1.3
    assert other["diff"] == pytest.approx(5 / 20)
    assert other["p_value"] == pytest.approx(2 / 8)  # differences 1, 2, 2: only one sign pattern of 8 is as extreme
    by_problem = stats.paired_bootstrap([0.75, 1, 0.5, 0.75, 0], [0.5, 1, 0, 0.25, 0])
    assert (other["diff"], other["diff_low"], other["diff_high"]) == by_problem


def test_one_sample_against_several():
    greedy = make_run("greedy", [1, 0, 0, 1])
    sampled = make_run("sampled", [[1, 0, 0], [1, 1, 1], [0, 0, 1], [1, 1, 1]], prompt="boxed")
    for baseline, sign in ((0, 1), (1, -1)):
        row = comparison.compare_runs([greedy, sampled], baseline).to_dict("records")[1 - baseline]
        assert row["diff"] == pytest.approx(sign * (-2 / 3 + 1 + 1 / 3 + 0) / 4)
        assert row["p_value"] == pytest.approx(stats.sign_flip([-2, 3, 1, 0]))


def test_different_problems_are_refused_with_the_ids():
    one, two = make_run("one", [1] * 8), make_run("two", [1] * 9)
    two = replace(two, samples=[row for row in two.samples if row["id"] not in ("p0", "p3", "p4", "p5", "p6")])
    expected = r"runs one and two .* 5 only in one \(p0, p3, p4, \.\.\.\), 1 only in two \(p8\); .*--limit"
    for compare in (comparison.compare_runs, comparison.per_question):
        with pytest.raises(UserError, match=expected) as refused:
            compare([one, two])
        assert "\n" not in str(refused.value)


def test_unfinished_and_broken_runs_are_refused():
    with pytest.raises(UserError, match="run empty has no samples"):
        comparison.compare_runs([replace(make_run("empty", [1]), samples=[])])
    run = make_run("cut", [[1, 0], [1, 1]])
    with pytest.raises(UserError, match=r"run cut: problem p1 has 1 samples where others have 2.*--resume"):
        comparison.compare_runs([replace(run, samples=run.samples[:-1])])
    with pytest.raises(UserError, match="run cut: sample 1 of problem p1 occurs twice"):
        comparison.compare_runs([replace(run, samples=[*run.samples, run.samples[-1]])])


def test_differences_between_settings_are_named_and_prompts_may_differ():
    runs = three_runs()
    assert comparison.differences(runs) == []
    runs[1].result["max_tokens"] = 2048
    runs[2].result["extractor"] = "strict"
    assert comparison.differences(runs) == [
        "extractor differs: tolerant in base, better; strict in same",
        "max_tokens differs: 400 in base, same; 2048 in better",
    ]


def test_labels_are_short_and_unique():
    runs = [
        make_run("a", [1], model="org/M-4bit"),
        make_run("b", [1], model="other/M-4bit"),
        make_run("c", [1], model="/models/M-4bit/", adapter="runs/sft/adapter/"),
        make_run("d", [1], model="nano", adapter="runs/grpo-02"),
        make_run("d", [1], model="nano", adapter="old/grpo-02"),
    ]
    assert comparison.labels(runs) == [
        "M-4bit_plain_a",
        "M-4bit_plain_b",
        "M-4bit+sft/adapter_plain",
        "nano+grpo-02_plain_d_4",
        "nano+grpo-02_plain_d_5",
    ]


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.012, "0.012"), (0.00042, "0.0004"), (3e-9, "<1e-4"), (1.0, "1.000"), (float("nan"), "–")],
)
def test_p_text(p, text):
    assert p_text(p) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0324, "+3.2"), (-0.0321, "-3.2"), (0.0, "0.0"), (-0.0001, "0.0"), (1.0, "+100.0")]
)
def test_signed_percent(share, text):
    assert percent(share, signed=True) == text


@pytest.mark.parametrize("count", [1, 2, 12])
def test_terminal_table_fits_100_columns_and_shows_everything(count):
    runs = many_runs(count)
    text = rendered(tables.to_terminal(comparison.compare_runs(runs)))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "Qwen2.5-Coder-0.5B- " in text  # folded at a dash
    assert text.count("of 1,319") == count
    assert "gsm8k test · tolerant extractor · at most 400 tokens · greedy" in text
    if count > 1:
        for piece in ("baseline", "difference", "Holm", "<1e-4", "McNemar", "bootstrap", "Wilson"):
            assert piece in text


def test_terminal_table_reads_as_promised():
    text = rendered(tables.to_terminal(comparison.compare_runs(three_runs())))
    for piece in ("25.0 %", "[7.1, 59.1]", "+50.0", "0.219", "0.438", "12.5 %", "123/s", "nano+sft-01"):
        assert piece in text


def test_a_long_prompt_name_is_folded_and_not_cut():
    text = rendered(tables.to_terminal(comparison.compare_runs([make_run("r", [1, 0], prompt="ß" * 40)])))
    assert text.count("ß") == 40
    assert max(map(len, text.splitlines())) <= 100


def test_terminal_and_markdown_show_pass_at_k():
    outcomes = [[1, 0], [0, 0], [1, 1]]
    run = make_run("k", outcomes, pass_at_k={"1": 0.5, "2": 2 / 3}, maj_at_k={"1": 2 / 3, "2": 0.6}, temperature=0.7)
    frame = comparison.compare_runs([run, make_run("k2", outcomes, prompt="boxed")])
    text = rendered(tables.to_terminal(frame))
    for piece in (
        "pass@2 66.7 %",
        "maj@2 60.0 %",
        "of 3 × 2",
        "temperature 0.7 /",
        "2 samples a problem",
    ):
        assert piece in text
    assert text.count("pass@2") == 1
    assert "sign-flip" in text
    assert "| pass@2 |" in tables.to_markdown(frame)
    reliable = comparison.compare_runs([make_run("k", outcomes, pass_hat_k={"2": 1 / 3}, temperature=0.7)])
    assert "pass^2 33.3 %" in rendered(tables.to_terminal(reliable))
    assert "| pass^2 |" in tables.to_markdown(reliable)


def test_another_extractor_counts_its_own_pass_at_k():
    run = make_run("k", [[1, 0], [0, 0], [1, 1]], pass_at_k={"1": 0.5, "2": 2 / 3})
    assert comparison.by_extractor(run, "tolerant").result["pass_at_k"] == {"1": 0.5, "2": 2 / 3}
    for row in run.samples:
        row["verdicts"]["strict"], row["extractions"]["strict"] = ("correct" if row["sample"] else "no_answer"), "42"
    strict = comparison.by_extractor(run, "strict")
    (row,) = comparison.compare_runs([strict]).to_dict("records")
    assert row["accuracy"] == row["pass@1"] == 0.5 and row["pass@2"] == 1
    assert (row["pass^2"], row["maj@1"], row["maj@2"]) == (0, 0, 1)


HOSTILE = "org/[red]x[bold] |$a$ <b>\x1b[31m\u202e\n=1+1"


def test_hostile_warnings_stay_text(tmp_path):
    runs = [make_run("a", [1, 0], split="<img src=x>`|"), make_run("b", [1, 0])]
    (tmp_path / "quality.csv").write_text("of an earlier comparison")
    export.write_all(runs, comparison.compare_runs(runs), tmp_path)
    assert not (tmp_path / "quality.csv").exists()
    assert (tmp_path / "table.md").read_text().endswith("* split differs: \\<img src=x\\>\\`\\| in a; test in b\n")


def test_hostile_names_stay_text(tmp_path):
    runs = [make_run("r\x1b]0;t\x07", [1, 0], model=HOSTILE), make_run("s", [0, 1], prompt="=cmd|x\n\x00")]
    frame = comparison.compare_runs(runs)
    for text in (rendered(tables.to_terminal(frame)), tables.to_markdown(frame), *comparison.labels(runs)):
        assert not any(c in text for c in "\x1b\x07\x00\u202e")
    assert "[red]x[bold]" in rendered(tables.to_terminal(frame))
    row = next(line for line in tables.to_markdown(frame).splitlines() if "red" in line)
    assert row.replace("\\|", "").count("|") == 14
    assert "<b>" not in row.replace("\\<", "")
    export.write_all(runs, frame, tmp_path)
    header = next(csv.reader((tmp_path / "per_question.csv").open(newline="")))
    assert len(header) == 7


def test_markdown_table_is_complete():
    lines = tables.to_markdown(comparison.compare_runs(three_runs())).splitlines()
    assert lines[0] == "gsm8k test · tolerant extractor · at most 400 tokens · greedy"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(row) for row in cells} == {13}
    assert cells[3][:9] == [
        "nano+sft-01",
        "thinking",
        "75.0 %",
        "[40.9, 92.9]",
        "6",
        "8",
        "+50.0",
        cells[3][7],
        "0.219",
    ]


def test_a_comparison_shows_the_share_of_true_equations_where_it_is_known():
    frame = comparison.compare_runs(many_runs(3)).assign(true_equations=[math.nan, 0.984, 1.0])
    text = rendered(tables.to_terminal(frame))
    assert max(map(len, text.splitlines())) <= 100 and "true eq." in text and "98.4 %" in text
    lines = tables.to_markdown(frame).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    place = cells[0].index("true equations")
    assert [row[place] for row in cells[2:]] == ["–", "98.4 %", "100.0 %"]
    assert [row["true_equations"] for row in tables.to_json(frame)["rows"]] == [None, 0.984, 1.0]
    nowhere = frame.assign(true_equations=math.nan)
    assert "true" not in rendered(tables.to_terminal(nowhere)) + tables.to_markdown(nowhere)


def test_json_has_exactly_the_documented_keys():
    table = tables.to_json(comparison.compare_runs(three_runs()))
    rows = json.loads(json.dumps(table, allow_nan=False))["rows"]
    keys = "model adapter prompt accuracy correct_count total_questions ci_low ci_high diff diff_low diff_high "
    keys += "p_value p_holm tokens_per_answer tokens_per_second"
    assert all(list(row) == keys.split() for row in rows)
    assert rows[0]["diff"] is rows[0]["p_holm"] is rows[0]["adapter"] is None
    assert rows[1]["correct_count"] == 6
    alone = tables.to_json(comparison.compare_runs([make_run("x", [1], tokens_per_second=None)]))["rows"][0]
    assert alone["tokens_per_second"] is alone["p_value"] is None


def test_a_table_without_a_difference_says_what_it_could_not_see():
    frame = comparison.compare_runs([make_run("a", [1, 0] * 50), make_run("b", [1, 0] * 45 + [0, 1] * 5, prompt="x")])
    missed = power.detectable(100, 0.1, 0.5)
    assert list(frame["missed"])[1] == missed
    said = f"with 100 problems a difference below {100 * missed:.1f} points would have been missed half of the time"
    assert f"No difference shown: {said} or more." in tables.to_markdown(frame)
    two = comparison.compare_runs([make_run("a", [1, 0] * 50), *(make_run(f"b{i}", [0, 1] * 50) for i in "12")])
    assert two["missed"][1] == power.detectable(100, 1.0, 0.5, 0.025)  # Holm's first step of two
    shown = comparison.compare_runs([make_run("a", [0] * 50), make_run("b", [1] * 50, prompt="x")])
    assert shown["missed"].isna().all() and "No difference" not in tables.to_markdown(shown)
    sampled = comparison.compare_runs([make_run("a", [[1, 0], [0, 0]] * 20), make_run("b", [[0, 1], [0, 0]] * 20)])
    assert math.isnan(sampled["missed"][1]) and "missed half" not in tables.to_markdown(sampled)  # nothing varies
    sampled = comparison.compare_runs([make_run("a", [[1, 0], [0, 0]] * 20), make_run("b", [[0, 0], [1, 0]] * 20)])
    student = student_t.ppf(0.975, 39) * 0.5 * math.sqrt(1 / 39)  # differences are half a problem each
    assert sampled["missed"][1] == pytest.approx(student)
    one = comparison.compare_runs([make_run("a", [[1, 0]]), make_run("b", [[0, 0]])])
    assert math.isnan(one["missed"][1])


def test_trainings_of_a_recipe_are_one_row():
    runs = [make_run(f"g{i}", ([1] * (50 + i) + [0] * 50)[:100]) for i in (0, 4, 8)]
    joined = comparison.recipe("grpo", runs)
    base = make_run("base", [1] * 30 + [0] * 70)
    frame = comparison.compare_runs([base, joined])
    row = frame.to_dict("records")[1]
    found = variance.estimate(comparison.shares(joined, [f"p{i}" for i in range(100)]))
    assert (row["ci_low"], row["ci_high"]) == found.share_interval() and row["accuracy"] == pytest.approx(0.54)
    assert (row["trainings"], row["spread"], row["test"]) == (3, pytest.approx(0.04), "trainings")
    for table in (pairs.summary([base, joined]), comparison.extractors([base, joined])):
        assert found.share_interval() in zip(table["ci_low"], table["ci_high"], strict=True)
    wrong = comparison.recipe("wrong", [make_run(name, [0] * 40) for name in "ab"])
    (row,) = comparison.compare_runs([wrong]).to_dict("records")
    assert (row["ci_low"], row["ci_high"]) == stats.wilson(0, 40)  # not an interval without width
    few = [make_run(name, [1, 0, 1], strata=("x", "y", "y")) for name in "abc"]
    alone = comparison.strata([few[0], comparison.recipe("r", few[1:])])  # x is one problem, which has no variance
    assert alone.iloc[1]["part"] == "x" and (alone.iloc[1]["ci_low"], alone.iloc[1]["ci_high"]) == stats.wilson(1, 1)
    text = " ".join(rendered(tables.to_terminal(frame)).split())
    assert "3 trainings" in text and "sd 4.0" in text and "Student's t over trainings and problems" in text
    assert tables.to_json(frame)["rows"][1]["spread"] == pytest.approx(0.04) and "| sd |" in tables.to_markdown(frame)
    with pytest.raises(UserError, match="max_tokens is 400 and 9; only their training and seed may differ"):
        comparison.recipe("grpo", [runs[0], make_run("x", [1] * 100, max_tokens=9)])
    alike = comparison.compare_runs([make_run("base", [1] * 50 + [0] * 50), joined]).to_dict("records")[1]
    assert alike["missed"] == pytest.approx(alike["diff_high"] - alike["diff"]) and alike["p_holm"] > 0.05
    with pytest.raises(UserError, match="recipe grpo: its runs have one problem"):
        comparison.recipe("grpo", [make_run(name, [1]) for name in "ab"])
    with pytest.raises(UserError, match="recipe grpo: name two or more runs, each once \\(got 1\\)"):
        comparison.recipe("grpo", runs[:1])
    with pytest.raises(UserError, match="over different problems"):
        comparison.recipe("grpo", [runs[0], make_run("x", [1] * 9)])


def test_problems_of_a_cluster_count_together():
    a, b = make_run("a", [1, 1, 0, 0] * 10), make_run("b", [1, 1, 1, 0] * 10, prompt="x")
    for run in (a, b):
        for i, row in enumerate(run.samples):
            row["columns"] = {"document": f"d{i // 4}"}
    frame = comparison.compare_runs(comparison.clustered([a, b], "document"))
    row = frame.to_dict("records")[1]
    assert row["test"] == "clusters" and row["p_value"] == pytest.approx(2 / 2**10)  # ten documents, all won
    assert "cluster-robust for the difference" in tables.to_markdown(frame)
    one, two = comparison.clustered([a, b], "document")
    assert comparison.paired(two, one)["p_value"] == row["p_value"]
    for table in (pairs.summary([one, two]), comparison.extractors([one, two])):
        assert (row["ci_low"], row["ci_high"]) in zip(table["ci_low"], table["ci_high"], strict=True)
    for run in (a, b):
        for i, row in enumerate(run.samples):
            row["columns"]["half"] = i // 20
    halves = comparison.compare_runs(comparison.clustered([a, b], "half"))  # p is 0.5 or more, whatever the difference
    assert halves["p_value"][1] == 0.5 and math.isnan(halves["missed"][1])
    with pytest.raises(UserError, match="--cluster page: problem p0 has no such column; the data are not on this"):
        comparison.compare_runs(comparison.clustered([a, b], "page"))
    with pytest.raises(UserError, match="--cluster gold: all problems have the same value"):
        comparison.compare_runs(comparison.clustered([a, b], "gold"))


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd", "'+cmd"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\n=1"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("-5", "-5"),
        ("+1,234.50", "+1,234.50"),
        ("-3e5", "-3e5"),
        ("75%", "75%"),
        ("-1\n=2", "'-1\n=2"),
        ("18", "18"),
        ("a=b", "a=b"),
    ],
)
def test_csv_cells_are_no_formulas(text, cell):
    run = make_run("r", [0], extracted=text)
    rows = list(csv.reader(io.StringIO(tables.to_csv(comparison.per_question([run])), newline="")))
    assert rows[1][3] == cell


def test_csv_holds_unpaired_surrogates_and_fractions():
    run = make_run("r", [0, 1, 1], extracted="\ud800x")
    tables.to_csv(comparison.per_question([run])).encode()
    row = next(csv.DictReader(io.StringIO(tables.to_csv(comparison.compare_runs([run])))))
    assert float(row["accuracy"]) == 2 / 3
    assert (row["correct_count"], row["p_value"], row["adapter"]) == ("2", "", "")


def test_per_question_rows():
    frame = comparison.per_question(three_runs())
    assert list(frame.columns[:5]) == [
        "question_id",
        "question",
        "correct_answer",
        "nano_plain_prediction",
        "nano_plain_correct",
    ]
    assert frame.iloc[2].tolist() == ["p2", "question 2", "42", "1", False, "42", True, "1", False]
    assert frame["nano+sft-01_thinking_correct"].sum() == 6


def test_per_question_of_several_samples_is_the_majority_and_its_share():
    run = make_run("k", [[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    run.samples[-1]["extracted"] = run.samples[-2]["extracted"] = run.samples[-3]["extracted"] = None
    frame = comparison.per_question([run])
    assert frame["nano_plain_prediction"].tolist() == ["1", "42", None]
    assert frame["nano_plain_correct"].tolist() == pytest.approx([1 / 3, 2 / 3, 0])


def test_source_results():
    runs = three_runs()
    runs[1].result["timestamp"] = "2025-03-01T00:00:00+00:00"
    results = comparison.source_results(runs)
    assert results["timestamp"] == "2025-03-01T00:00:00+00:00"
    assert results["models"][1] == {
        "model_type": "nano+sft-01_thinking",
        "accuracy": 0.75,
        "correct": 6,
        "total": 8,
        "timestamp": "2025-03-01T00:00:00+00:00",
    }


def test_accuracy_by_stratum_and_by_extractor():
    runs = [
        make_run("a", BASE, strata=("4 numbers", "3 numbers")),
        make_run("b", BETTER, strata=("4 numbers", "3 numbers"), prompt="thinking"),
    ]
    frame = comparison.strata(runs)
    assert frame["part"].tolist() == ["3 numbers", "3 numbers", "4 numbers", "4 numbers"]
    assert frame["correct_count"].tolist() == [1, 2, 1, 4]
    assert frame["total_questions"].tolist() == [4] * 4
    assert "100.0 % [51.0, 100.0] 4 of 4" in tables.cells_to_markdown(tables.parts_cells(frame))
    assert "4 of 4" in rendered(tables.strata_table(runs))
    assert tables.strata_table(three_runs()) is None
    many = [make_run(name, [1, 0] * 4, strata=tuple(f"Part {i} of six" for i in range(6))) for name in "ab"]
    for shown in (many, many[:1]):  # no word or number is broken in 60 columns
        text = rendered(tables.strata_table(shown), 60)
        assert (
            text.count("Part 5 of six") == len(shown) and text.count("[5.5, 94.5]") + text.count("[20.7, 100.0]") >= 1
        )
    assert comparison.extractors(three_runs())["correct_count"].tolist() == [2, 0, 6, 0, 2, 0]
    text = rendered(tables.extractors_table(many_runs(2)))
    assert "tolerant" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("count", [1, 12])
def test_write_all_leaves_whole_files_only(tmp_path, count):
    runs = many_runs(count, size=40)
    frame = comparison.compare_runs(runs)
    out = tmp_path / "new" / "folder"
    written = export.write_all(runs, frame, out)
    assert written == export.write_all(runs, frame, out)
    names = [
        "accuracy.png",
        "per_question.csv",
        "provenance.json",
        "results.json",
        "table.csv",
        "table.json",
        "table.md",
    ]
    assert sorted(path.name for path in out.iterdir()) == names
    assert sorted(path.name for path in written) == names
    assert (out / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((out / "table.json").read_text()) == tables.to_json(frame)
    assert len((out / "per_question.csv").read_text().splitlines()) == 41


def test_write_all_into_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    runs = three_runs()
    with pytest.raises(UserError, match=r"cannot be written.*choose another --out"):
        export.write_all(runs, comparison.compare_runs(runs), tmp_path / "out")


WHOLE_PROCESS = """
import json, sys
from pathlib import Path
from rich.console import Console
from mlx_traces.evaluation import comparison
from mlx_traces.report import tables
assert not {"pandas", "matplotlib", "scipy", "mlx.core"} & set(sys.modules)
from mlx_traces.report import export
folder = Path(sys.argv[1])
runs = [comparison.Run(**json.loads(path.read_text())) for path in sorted(folder.glob("run-*.json"))]
frame = comparison.compare_runs(runs)
Console(width=100).print(tables.to_terminal(frame))
export.write_all(runs, frame, folder / "out")
assert not {"matplotlib.pyplot", "scipy", "mlx.core"} & set(sys.modules)
"""


def test_comparing_two_whole_test_sets_takes_under_three_seconds(tmp_path):
    for run in many_runs(2):
        (tmp_path / f"{run.name}.json").write_text(json.dumps(vars(run)))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(Path(tables.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_PROCESS, tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert "of 1,319" in done.stdout
