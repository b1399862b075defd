"""The quality of stored answers: by hand, against the traces that `generate` would make, and in every output."""

import json
import math
import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from factories import rendered, write_evaluation
from scipy.stats import t as student_t

from mlx_traces.cli import main
from mlx_traces.config import CompareConfig, EvalConfig, ScoreConfig, build
from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison, evaluator, run, stats
from mlx_traces.evaluation.comparison import read_run
from mlx_traces.models import loading
from mlx_traces.pipelines import compare, quality
from mlx_traces.records import EvalResult
from mlx_traces.report import page, tables
from mlx_traces.traces import encoding, perplexity
from mlx_traces.traces.equations import checked

TRUE = "<think>\n2 + 3 = 5 yes\n</think>\n<answer>2 + 3</answer>"
HALF = "<think>\n2 + 3 = 5, 5 + 1 = 7 yes\n</think>\n<answer>2 + 3</answer>"
BARE = "2 + 3"


def stored(folder, *arguments, **more):
    """Write a finished evaluation with every field of a result."""
    path = write_evaluation(folder, *arguments, **more)
    result = dict.fromkeys(EvalResult.__dataclass_fields__) | json.loads((path / "result.json").read_text())
    (path / "result.json").write_text(json.dumps(result))
    return read_run(path)


def two_runs(folder):
    """Four problems; the first run is right on 0 and 1, the second on 1, 2 and 3."""
    one = stored(folder / "one", [1, 1, 0, 0], completion=[TRUE, HALF, BARE, BARE])
    return [one, stored(folder / "two", [0, 1, 1, 1], completion=[HALF, TRUE, TRUE, BARE], adapter="runs/sft-01")]


def figures(frame, answers, measure):
    rows = frame[(frame["answers"] == answers) & (frame["measure"] == measure)]
    return rows.to_dict("records")


def test_means_and_pairs_by_hand(tmp_path):
    frame = quality.compare_quality(two_runs(tmp_path), ScoreConfig(), [(1, 0)])
    assert list(frame["measure"].unique()) == ["format", "structure", "faithfulness", "repetition", "tokens"]
    base, later = figures(frame, "all", "format")
    assert (base["mean"], later["mean"], later["diff"], later["paired"]) == (0.5, 0.75, 0.25, 4)
    assert later["p_value"] == 1.0 and math.isnan(base["diff"]) and later["against"] == base["label"]
    base, later = figures(frame, "correct", "format")
    assert (base["mean"], base["problems"], later["mean"], later["problems"]) == (1.0, 2, pytest.approx(2 / 3), 3)
    assert (later["diff"], later["paired"]) == (0.0, 1)  # both are right on problem 1 alone
    base, later = figures(frame, "all", "faithfulness")  # no equation without a thought: problems 2 and 3, and 3
    assert (base["mean"], base["problems"]) == (0.75, 2) and (later["mean"], later["problems"]) == (2.5 / 3, 3)
    assert (later["diff"], later["paired"]) == (0.0, 2)  # -0.5 on problem 0, +0.5 on problem 1
    base, later = figures(frame, "correct", "faithfulness")
    assert (later["diff"], later["paired"]) == (0.5, 1)
    base, later = figures(frame, "all", "tokens")
    assert (base["mean"], later["diff"], later["p_value"]) == (11.5, 0.0, 1.0)
    for answers in ("all", "correct"):
        tested = [row for row in frame.to_dict("records") if row["answers"] == answers and row["paired"]]
        assert [row["p_holm"] for row in tested] == stats.holm([row["p_value"] for row in tested])
        assert len(tested) == 5 or answers == "correct"


def test_clusters_of_problems_are_what_varies(tmp_path):
    """12 problems in 3 clusters, in two of which the later run is longer: 3 signs have no p-value below 1/4."""
    one = stored(tmp_path / "one", [1] * 12, completion=TRUE)
    two = stored(tmp_path / "two", [1] * 12, completion=TRUE, adapter="a")
    for place, row in enumerate(two.samples):
        row["tokens"] += 3 * (place < 8)
    apart = figures(quality.compare_quality([one, two], ScoreConfig(), [(1, 0)]), "all", "tokens")[1]
    assert (apart["diff"], apart["p_value"]) == (2.0, 2 * 0.5**8) and apart["diff_low"] > 1
    place = {f"p{i}": str(i // 4) for i in range(12)}
    runs = [replace(run, clusters=place) for run in (one, two)]
    frame = quality.compare_quality(runs, ScoreConfig(), [(1, 0)])
    found = figures(frame, "all", "tokens")[1]
    reach = student_t.ppf(0.975, 2)  # of cluster means 3, 3 and 0, whose standard error is 1
    assert (found["diff"], found["p_value"]) == (2.0, 0.5)
    assert (found["diff_low"], found["diff_high"]) == pytest.approx((2 - reach, 2 + reach))
    assert "jackknife over clusters; p: exact sign-flip test of the clusters' sums" in tables.quality_caption(frame)
    together = [replace(run, clusters=dict.fromkeys(place, "x")) for run in (one, two)]
    assert not quality.compare_quality(together, ScoreConfig(), [(1, 0)])["paired"].any()


def test_several_samples_of_a_problem_are_one_value(tmp_path):
    one = stored(tmp_path / "one", [1, 0, 1, 1], completion=[TRUE, BARE, HALF, TRUE], samples=2)
    two = stored(tmp_path / "two", [0, 0], completion=[BARE, BARE])
    frame = quality.compare_quality([one, two], ScoreConfig(), [(1, 0)])
    base, later = figures(frame, "all", "format")
    assert (base["mean"], base["problems"], later["diff"]) == (0.75, 2, -0.75)
    base, later = figures(frame, "correct", "faithfulness")
    assert base["mean"] == (1.0 + 0.75) / 2 and later["problems"] == later["paired"] == 0
    assert math.isnan(later["mean"]) and math.isnan(later["p_holm"])


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A run of nano, and the prompts and problems that it was made with."""
    folder = tmp_path_factory.mktemp("answered") / "run"
    planned = evaluator.plan(EvalConfig(task="countdown", prompt="thinking", limit=12, max_tokens=64))
    run.run(planned, folder)
    return planned, folder


def test_samples_are_scored_as_their_traces_would_be(answered, monkeypatch):
    planned, folder = answered
    monkeypatch.setattr(loading, "load", None)  # no model runs
    found = quality.answers_of(read_run(folder))
    for problem, (trace, own), row in zip(planned.problems, found, read_run(folder).samples, strict=True):
        assert list(trace.messages) == planned.prompt.messages(problem) and own == problem
        assert trace.completion == row["opened"] + row["completion"] and trace.prompt == "thinking"
    frame = quality.compare_quality([read_run(folder)], ScoreConfig(), [])
    assert figures(frame, "all", "tokens")[0]["mean"] == pytest.approx(read_run(folder).result["mean_tokens"])


def test_perplexity_leaves_out_the_words_that_a_budget_forced(tmp_path):
    """Against the model's own greedy log-probabilities: of the tokens that were sampled, and of no other."""
    planned = evaluator.plan(EvalConfig(task="countdown", prompt="thinking", limit=6, max_tokens=24, think_tokens=8))
    run.run(planned, tmp_path / "run")
    loaded, answers = loading.load("nano"), quality.answers_of(read_run(tmp_path / "run"))
    assert sum(trace.forced_text is not None for trace, _ in answers) >= 4
    found = perplexity.mean_probabilities(loaded, [trace for trace, _ in answers])
    for (trace, _), row, value in zip(answers, read_run(tmp_path / "run").samples, found, strict=True):
        for (start, end), (first, last) in zip(trace.forced_text or (), row.get("forced", ()), strict=True):
            assert trace.completion[start:end] == row["completion"][first:last] == "\n</think>\n"
        example = encoding.encode(loaded, trace, None)
        logits = np.array(loaded.model(mx.array([example.ids[:-1]]))[0], np.float64)
        values = logits[np.arange(len(logits)), list(example.ids[1:])] - np.logaddexp.reduce(logits, axis=-1)
        texts = [loaded.tokenizer.decode(example.ids[:end]) for end in range(1, len(example.ids) + 1)]
        turn = len(texts[-1]) - len(trace.completion)
        spans = [(start + turn, end + turn) for start, end in trace.forced_text or ()]
        kept = [
            value
            for value, before, after in zip(values, texts, texts[1:], strict=False)
            if len(before) >= turn and not any(start < len(after) and len(before) < end for start, end in spans)
        ]
        assert value == pytest.approx(np.exp(np.mean(kept)), rel=1e-4)


def test_runs_of_earlier_versions_are_scored_from_what_they_hold(answered, tmp_path):
    """Without `opened` it is read from the prompt; without run.json the question stands for the turn."""
    _, folder = answered
    old = tmp_path / "old"
    old.mkdir()
    lines = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    stripped = [{key: value for key, value in row.items() if key != "opened"} for row in lines]
    for row in stripped:  # as if the template had opened the thought
        assert row["completion"].startswith("<think>")
        row |= {"prompt": row["prompt"] + "<think>", "completion": row["completion"].removeprefix("<think>")}
    (old / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stripped))
    for name in ("result.json", "run.json"):
        (old / name).write_text((folder / name).read_text())
    new = quality.compare_quality([read_run(folder)], ScoreConfig(), [])
    again = quality.compare_quality([read_run(old)], ScoreConfig(), [])
    assert list(again["mean"].fillna(-1)) == list(new["mean"].fillna(-1))
    (old / "run.json").unlink()
    trace, problem = quality.answers_of(read_run(old))[0]
    assert problem is None and trace.messages[0]["content"] == lines[0]["question"]
    assert len(quality.compare_quality([read_run(old)], ScoreConfig(), [])) == 10


def test_perplexity_and_judge_only_where_they_are_asked_for(answered, tmp_path):
    _, folder = answered
    config = ScoreConfig(
        model="nano", judge="nano", judge_failures=1, judge_cache=str(tmp_path / "j.jsonl"), judge_max_tokens=4
    )
    frame = quality.compare_quality([read_run(folder)], config, [])
    loaded = loading.load("nano")
    expected = perplexity.mean_probabilities(loaded, [trace for trace, _ in quality.answers_of(read_run(folder))])
    assert figures(frame, "all", "perplexity")[0]["mean"] == pytest.approx(sum(expected) / len(expected))
    assert figures(frame, "all", "judge")[0]["problems"] == 0  # nano gives no grade
    assert 0.5 < figures(frame, "all", "perplexity")[0]["mean"] < 1  # its own greedy tokens
    assert "perplexity" not in set(quality.compare_quality([read_run(folder)], ScoreConfig(), [])["measure"])


def test_the_reward_is_that_of_a_rollout(answered, tmp_path):
    """The verdict, the share of true equations, and the penalty for length by the training's limit, by hand."""
    _, folder = answered
    (tmp_path / "grpo.yaml").write_text(
        "rewards: {correct: 1, equations: 0.5}\nmax_tokens: 30\noverlong: penalty\noverlong_tokens: 16\n"
    )
    made = read_run(folder)
    expected = []
    for row in made.samples:
        steps = [true for *_, true in checked(row["opened"] + row["completion"])]
        penalty = min(max(row["tokens"] - 14, 0) / 16, 1)
        expected.append(row["correct"] + 0.5 * (sum(steps) / len(steps) if steps else 0) - penalty)
    assert len({round(value, 2) for value in expected}) > 4  # the three parts differ from sample to sample
    (found,) = quality.rewards_of([made], compare.training_config(str(tmp_path / "grpo.yaml")))
    assert found == pytest.approx(expected)
    called = ["compare", str(folder), str(folder), "--rewards", str(tmp_path / "grpo.yaml"), "--format", "json"]
    result = CliRunner().invoke(main, called)
    row = next(row for row in json.loads(result.stdout)["quality"] if row["measure"] == "reward")
    assert row["mean"] == pytest.approx(sum(expected) / len(expected))
    assert row["mean_low"] < row["mean"] < row["mean_high"]


def test_a_reward_that_samples_cannot_have_is_refused(answered, tmp_path, monkeypatch):
    _, folder = answered
    (tmp_path / "by_ids.py").write_text(
        "def ids(texts, completion_ids):\n    return [len(one) for one in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    for text, said in (
        ("rewards: {'by_ids:ids': 1}", "reward by_ids:ids: takes completion_ids"),
        ("task: gsm8k\nrewards: {correct: 1}", "is for gsm8k, and run is of countdown"),
        ("rewards: {corect: 1}", "did you mean 'correct'"),
        ("rewards: {correct: 1}\nnum_step: 3", "did you mean 'num_steps'"),
    ):
        (tmp_path / "grpo.yaml").write_text(text)
        with pytest.raises(UserError, match=re.escape(said)):
            quality.rewards_of([read_run(folder)], compare.training_config("grpo.yaml"))
    (tmp_path / "ppo.yaml").write_text("rewards: {correct: 1}\nminibatches: 2\n")
    assert compare.training_config("ppo.yaml").minibatches == 2


def test_the_table_fits_80_columns_and_the_page_has_it(tmp_path):
    runs = two_runs(tmp_path)
    frame = quality.compare_quality(runs, ScoreConfig(), [(1, 0)])
    text = rendered(tables.quality_table(frame), 80)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for piece in ("faithfulness", "against", "+25.0", "(4)", "(1)", "sign-flip", "Holm-adjusted over 5 and 5 tests"):
        assert piece in " ".join(text.split()), text
    alone = rendered(tables.quality_table(quality.compare_quality(runs[:1], ScoreConfig(), [])), 80)
    assert "difference" not in alone and "Holm" not in alone and "75.0" in alone
    assert "| faithfulness | 83.3 (3) | 0.0 [" in tables.quality_markdown(frame)
    html = page.write([tmp_path / "one", tmp_path / "two"], tmp_path / "p.html", quality=frame)[0].read_text()
    assert html.count("Quality of the answers") == 1 and "<small>(3)</small>" in html
    other = page.write([tmp_path / "one"], tmp_path / "q.html", quality=frame)[0].read_text()
    assert "Quality of the answers" not in other  # not of these runs


def test_compare_prints_and_writes_it(tmp_path):
    two_runs(tmp_path)
    names = [str(tmp_path / "one"), str(tmp_path / "two")]

    def call(*options):
        result = CliRunner().invoke(main, ["compare", *names, *options])
        assert result.exit_code == 0, result.output
        return result

    assert "faithfulness" not in call().stdout
    assert "faithfulness" in call("--quality").stdout
    rows = json.loads(call("--format", "json", "--quality").stdout)["quality"]
    assert rows[0]["measure"] == "format" and rows[0]["diff"] is None and rows[0]["against"] is None
    assert "quality" not in json.loads(call("--format", "json").stdout)
    assert "| format |" in call("--format", "markdown", "--quality").stdout
    assert "quality.csv" in call("--format", "csv", "--quality").stderr
    none = json.loads(call("--format", "json", "--score", "tags=none").stdout)["quality"]
    assert none[0]["mean"] == 1.0  # any text that was not cut off is well-formed
    out = tmp_path / "out"
    call("--quality", "--out", str(out))
    assert (
        (out / "quality.csv")
        .read_text()
        .startswith("run,label,against,answers,measure,mean,mean_low,mean_high,problems,diff,")
    )
    assert "## " not in (out / "table.md").read_text() and "| tokens |" in (out / "table.md").read_text()
    assert json.loads((out / "provenance.json").read_text())["config"]["quality"]["tags"] == "think"
    for wrong, said in (("tags", "give NAME=VALUE"), ("tags=x", "must be 'think'"), ("tag=x", "did you mean 'tags'")):
        result = CliRunner().invoke(main, ["compare", *names, "--score", wrong])
        assert result.exit_code == 1 and said in result.output and result.output.count("\n") == 1


def test_the_baseline_of_the_table_is_that_of_the_quality(tmp_path):
    two_runs(tmp_path)
    settings = {"runs": [str(tmp_path / name) for name in ("one", "two")], "baseline": "two", "quality": {}}
    done = compare.compared(build(CompareConfig, settings))
    assert figures(done.quality, "all", "format")[0]["diff"] == -0.25
    assert done.quality["against"].dropna().unique() == [comparison.labels(done.runs)[1]]
