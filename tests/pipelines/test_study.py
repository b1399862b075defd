"""Studies: tables and sentences against hand-computed values, conversions, and every kind of model end to end."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from factories import BASE, BETTER, CHATML, R1, make_config, make_run, make_tokenizer, randomized, rendered
from mlx.utils import tree_flatten
from scipy.stats import binomtest

from mlx_traces.cli import main
from mlx_traces.config import CompareConfig, StudyConfig, build
from mlx_traces.errors import UserError
from mlx_traces.evaluation import budgets, comparison, pairs
from mlx_traces.evaluation.pairs import Pair
from mlx_traces.models import convert, loading
from mlx_traces.pipelines import compare, study
from mlx_traces.report import tables

PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
QWEN25 = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML
IDS = mx.array([[5, 9, 30, 61, 12, 77, 20, 8]])


def make_folder(folder: Path, template: str = CHATML, seed: int = 1, **changes) -> Path:
    """Write a tiny random float16 model of any architecture that mlx_lm has."""
    from mlx_lm.utils import _get_classes

    config = make_config(max_position_embeddings=2048, **changes)
    model_class, arguments = _get_classes(config)
    model = randomized(model_class(arguments.from_dict(config)), seed)
    model.set_dtype(mx.float16)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("dense") / "dense")


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def unwritten(monkeypatch):
    """Leave out a study's files, where its runs and tables are looked at."""
    monkeypatch.setattr(study, "write", lambda config, parts: None)


def config_of(tmp_path, questions, *rows, **changes):
    task = {"task": "qa", "data": str(questions), "prompts": ["plain", "boxed"], "max_tokens": 12, "rows": 4}
    settings = {"name": "tiny", "tasks": [task], "models": list(rows), "runs_dir": str(tmp_path / "runs")}
    return build(StudyConfig, {**settings, "out": str(tmp_path / "out"), **changes})


# ------------------------------------------------------------------------------------------ findings


def three_runs():
    return [
        make_run("base", BASE),
        make_run("better", BETTER, prompt="thinking"),
        make_run("same", BASE, prompt="boxed"),
    ]


def test_summary_by_hand():
    first, second, _ = pairs.summary(three_runs()).to_dict("records")
    assert (first["total_cases"], first["correct"], first["incorrect"], first["success_rate"]) == (8, 2, 6, 0.25)
    assert (first["ci_low"], first["ci_high"]) == pytest.approx((0.0715, 0.5907), abs=1e-4)
    assert (second["model"], second["correct"], second["incorrect"]) == ("nano_thinking", 6, 2)
    headings, rows = tables.summary_cells(pairs.summary(three_runs()))
    assert headings == ["model", "total cases", "success rate", "95 % interval", "correct", "incorrect"]
    assert rows[0] == ["nano_plain", "8", "25.0 %", "[7.1, 59.1]", "2", "6"]


def test_every_pair_by_hand_with_holm():
    found = pairs.pairs(three_runs())
    names = [(pair.a, pair.b) for pair in found]
    assert names == [
        ("nano_thinking", "nano_plain"),
        ("nano_boxed", "nano_plain"),
        ("nano_boxed", "nano_thinking"),
    ]
    assert [(pair.wins, pair.losses, pair.diff) for pair in found] == [(5, 1, 0.5), (0, 0, 0.0), (1, 5, -0.5)]
    p = binomtest(5, 6).pvalue  # the sign test on the six problems that tell the two apart
    assert [pair.p for pair in found] == pytest.approx([p, 1, p])
    assert [pair.p_holm for pair in found] == pytest.approx([3 * p, 1, 3 * p])  # 3 p, then max(3 p, 2 p)
    assert {pair.family for pair in found} == {3} and {pair.cut_a for pair in found} == {1 / 8}
    assert found[0].low < 0.5 < found[0].high and (found[2].low, found[2].high) == (-found[0].high, -found[0].low)


def test_ratios_stand_beside_differences():
    found = pairs.pairs(three_runs())
    assert [pair.ratio for pair in found] == pytest.approx([3, 1, 1 / 3])  # 6, 2 and 2 of 8
    assert found[0].ratio_low < 3 < found[0].ratio_high
    turned = replace(CLEAR, ratio=2.0, ratio_low=1.25, ratio_high=4.0).swapped()
    assert (turned.ratio, turned.ratio_low, turned.ratio_high) == (0.5, 0.25, 0.8)
    none = pairs.pairs([make_run("none", [0] * 8), make_run("some", BASE)])[0]
    assert none.ratio == math.inf and none.swapped().ratio == 0
    text = rendered(tables.pairs_table([*found, none]), 80)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for piece in ("ratio", "3.00", "0.33", "∞", "[∞, ∞]", "+50.0", "against nano_plain"):
        assert piece in text, text
    assert tables.records(tables.pairs_frame([none]))[0]["ratio"] is None  # JSON has no infinity
    assert "| 3.00 | [" in tables.cells_to_markdown(tables.pairs_cells(found))


def test_the_sentence_has_a_ratio_where_a_difference_is_shown():
    """As in the study that this follows: 627 against 98 of 1,000 is 6.4 times."""
    pair = replace(CLEAR, ratio=627 / 98, ratio_low=5.3, ratio_high=12.04)
    assert "+10.0 points [7.3, 12.8], 6.40 times as often [5.30, 12.0], on 1,000 problems" in pairs.sentence(pair)
    assert pairs.sentence(pair.swapped()) == pairs.sentence(pair)
    for other in (replace(pair, p_holm=0.06), replace(pair, ratio=math.inf)):
        assert "times as often" not in pairs.sentence(other)


def test_the_abstract_and_the_key_points_say_what_the_tests_allow():
    clear = [[1] * 40 + [0] * 40, [1] * 10 + [0] * 70, [1] * 41 + [0] * 39]
    runs = [make_run("a", clear[0]), make_run("b", clear[1], prompt="direct"), make_run("c", clear[2], adapter="sft")]
    found = pairs.pairs(runs)
    assert pairs.abstract(runs, found, "gsm8k, greedy") == (
        "3 runs on the same 80 problems (gsm8k, greedy). Success rates are from 12.5 % [6.9, 21.5] (nano_direct) to "
        "51.2 % [40.5, 61.9] (nano+sft_plain). Of 3 pairs tested, 2 differ (paired test, p after Holm below "
        "0.05); in the other 1 no difference is shown."
    )
    adjusted = pairs.abstract(runs, [replace(found[0], p=0.01, p_holm=0.06)], "x")
    assert "No difference is shown in the one pair tested (" in adjusted  # Holm's p counts
    assert "No difference is shown in any of the 2 pairs tested (" in pairs.abstract(
        runs, [replace(found[0], p_holm=1)] * 2, ""
    )
    points = pairs.key_points(runs, found)
    assert len(points) == 2  # direct against the adapter's thinking differs in two things
    assert points[0].startswith("nano_plain is right more often than nano_direct: +37.5 points")
    assert points[1].startswith("No difference shown between nano+sft_plain and nano_plain: +1.2 points")
    few = pairs.key_points(runs, found, most=1)
    assert few == [points[0], "1 more pairs that differ in one thing are in the table of pairs."]
    joined = comparison.recipe("r", [runs[0], make_run("d", clear[2])])
    for shown, said in (
        (runs, "one model answering once, greedily or from one seed: it says nothing about another training run, "),
        (
            [runs[1], joined],
            "one model, or several trainings of one recipe, answering once, greedily or from one seed: ",
        ),
        (
            [make_run("e", [[1, 0]] * 9)],
            "one model answering several times, greedily or from one seed: it says nothing",
        ),
    ):
        part = study.Part("x", shown, 0, comparison.compare_runs(shown), None, [], [], [])
        assert part.scope.startswith(f"Each row is {said}")
    two_things = [make_run(name, clear[0], adapter=name, prompt=name) for name in "abc"]
    assert pairs.key_points(two_things, pairs.pairs(two_things), most=1)[1:] == [
        "2 more pairs are in the table of pairs."
    ]
    alone = pairs.abstract(runs[:1], [], "x")
    assert alone == "1 run on the same 80 problems (x). The success rate is 50.0 % [39.3, 60.7] (nano_plain)."
    assert pairs.key_points(runs[1:], pairs.pairs(runs[1:]))[0].startswith("nano+sft_plain is right more often")


def test_pairs_with_the_baseline_alone_are_a_smaller_family():
    found = pairs.pairs(three_runs(), baseline=1)
    assert [(pair.a, pair.b) for pair in found] == [("nano_plain", "nano_thinking"), ("nano_boxed", "nano_thinking")]
    assert [pair.p_holm for pair in found] == pytest.approx([2 * binomtest(5, 6).pvalue] * 2)
    assert pairs.pairs(three_runs()[:1]) == []


def test_pairs_of_several_samples_count_problems():
    one, two = make_run("a", [[1, 1], [1, 0], [0, 0], [1, 1]]), make_run("b", [[1, 0], [1, 1], [0, 0], [1, 0]])
    (pair,) = pairs.pairs([one, two])
    assert (pair.wins, pair.losses, pair.problems, pair.diff) == (1, 2, 4, -0.125)
    single = make_run("c", [1, 1, 0, 0])  # one sample against two: shares are compared, not counts
    (pair,) = pairs.pairs([single, one])
    assert (pair.wins, pair.losses) == (1, 1)


CLEAR = Pair("thinking", "direct", 1000, 150, 50, 0.1, 0.073, 0.128, 1e-12, 1.5e-11, 15)


def test_the_sentence_on_a_difference():
    text = (
        "thinking is right more often than direct: +10.0 points [7.3, 12.8] on 1,000 problems, 150 won and 50 lost "
        "(p < 1e-4; after Holm over 15 pairs < 1e-4)."
    )
    assert pairs.sentence(CLEAR) == text
    assert pairs.sentence(CLEAR.swapped()) == text  # the better one is named first, whoever was `a`
    assert CLEAR.swapped().swapped() == CLEAR and CLEAR.swapped().low == -0.128
    alone = replace(CLEAR, family=1, p=0.03, p_holm=0.03)
    assert pairs.sentence(alone).endswith("150 won and 50 lost (p = 0.030).")


def test_the_sentence_on_no_difference_says_what_is_still_possible():
    close = replace(CLEAR, wins=60, losses=40, diff=0.02, low=-0.0005, high=0.04, p=0.0569, p_holm=0.85)
    assert pairs.sentence(close) == (
        "No difference shown between thinking and direct: +2.0 points [-0.1, 4.0] on 1,000 problems, 60 won and 40 "
        "lost (p = 0.057; after Holm over 15 pairs = 0.850); a difference of up to 4.0 points either way is compatible."
    )
    # p alone would do, Holm's does not: nothing is claimed
    lucky = replace(CLEAR, p=0.01, p_holm=0.15)
    text = pairs.sentence(lucky)
    assert text.startswith("No difference shown between thinking and direct: +10.0 points [7.3, 12.8]")
    assert text.endswith("a difference of up to 12.8 points is compatible; after Holm, none is compatible too.")
    alone = replace(lucky, p=0.0625, p_holm=0.0625, family=1)  # five of five problems won: the bootstrap excludes 0
    assert pairs.sentence(alone).endswith("12.8 points is compatible; by the test, none is compatible too.")
    assert pairs.sentence(replace(lucky, p_holm=0.0501)).startswith("No difference")
    assert pairs.sentence(replace(lucky, p_holm=0.0499)).startswith("thinking is right more often")


def test_no_disagreement_is_not_called_equality():
    same = replace(CLEAR, wins=0, losses=0, diff=0.0, low=0.0, high=0.0, p=1.0, p_holm=1.0)
    assert pairs.sentence(same) == (
        "No difference shown between thinking and direct: they are right on the same ones of 1,000 problems; a "
        "difference of up to 0.4 points either way is compatible."  # Wilson's upper end of 0 in 1,000: 0.38 %
    )
    few = pairs.sentence(replace(same, clusters=5))
    assert few.endswith("up to 43.4 points either way is compatible.")  # of 0 in 5


def test_a_ratio_is_given_where_problems_are_all_that_varies():
    runs = [make_run(name, [1, 0] * 20) for name in "abc"]
    clusters = [replace(run, clusters={f"p{i}": str(i // 10) for i in range(40)}) for run in runs]
    three, better = comparison.recipe("three", runs), make_run("d", [1, 1, 1, 0] * 10)
    (alone,), (recipe,), (grouped,) = (pairs.pairs(two) for two in ([runs[0], better], [three, better], clusters[:2]))
    assert alone.ratio == pytest.approx(1.5) and alone.clusters is None
    assert np.isnan(recipe.ratio) and np.isnan(grouped.ratio) and grouped.clusters == 4


def test_the_sentence_names_answers_that_were_cut_off():
    assert "Cut off" not in pairs.sentence(replace(CLEAR, cut_a=0.019))
    text = pairs.sentence(replace(CLEAR, cut_a=0.3, cut_b=0.02))
    assert text.endswith(". Cut off at the token cap: 30.0 % of thinking and 2.0 % of direct.")


def test_bits_are_compared_with_the_most_of_them():
    runs = [make_run("four", BETTER), make_run("sixteen", BASE, prompt="thinking")]
    facts = [
        {"bits": 4, "group_size": 64, "bits_per_weight": 4.5, "file_mb": 0.5, "ran_as": "quantized float32 on cpu"},
        {"bits": 16, "group_size": None, "bits_per_weight": 16.0, "file_mb": 1700.4, "ran_as": "dense float32 on cpu"},
    ]
    frame = pairs.bits_frame(runs, facts)
    four, sixteen = frame.to_dict("records")
    assert np.isnan(sixteen["diff"]) and (four["diff"], four["p_value"]) == (0.5, pytest.approx(0.21875))
    headings, rows = tables.bits_cells(frame)
    assert len(headings) == len(rows[0]) == 13
    assert rows[0][:7] == ["nano_plain", "4", "64", "4.50", "0.50", "–", "123"]
    assert rows[1][:5] == ["nano_thinking", "16", "–", "16.00", "1,700"] and rows[1][-1] == "–"
    text = rendered(tables.bits_table(frame, "bits"))
    assert "+50.0" in text and max(map(len, text.splitlines())) <= 100
    assert study.ran_as(frame) == (
        "Weights that computed the answers: quantized float32 on cpu: nano_plain; dense float32 on cpu: nano_thinking. "
        "File: weights on disk; peak: of the whole process."
    )
    frame["ran_as"] = "dense float32 on cpu"
    assert "speed and memory cannot differ here" in study.ran_as(frame)


# ------------------------------------------------------------------------------------------ conversion


@pytest.mark.parametrize("group_size", [32, 64])
def test_fewer_bits_are_smaller_files_and_greater_errors(dense, tmp_path, group_size):
    truth = loading.load(str(dense), weights="quantized", dtype="float32").model(IDS)
    spread, errors, sizes = truth.std().item(), [], []
    for bits in (8, 6, 4):
        wanted = convert.conversion(str(dense), bits, group_size, tmp_path)
        folder = convert.convert(wanted)
        assert wanted.label == f"dense-{bits}bit-g{group_size}" and folder.name.startswith(wanted.label)
        loaded = loading.load(str(folder), weights="quantized", dtype="float32")
        errors.append(mx.abs(loaded.model(IDS) - truth).mean().item() / spread)
        facts = convert.describe(folder)
        assert (facts["bits"], facts["group_size"]) == (bits, group_size)
        # a float16 scale and bias for each group; norms and Qwen2's biases stay 16 bits
        assert facts["bits_per_weight"] == pytest.approx(bits + 32 / group_size, rel=0.03)
        sizes.append(facts["file_mb"])
        assert loaded.tokenizer.chat_template == CHATML
        about = json.loads((folder / "converted.json").read_text())
        assert (about["bits"], about["origin"], about["model"]) == (bits, None, str(dense))
    assert errors[0] < 0.05 < errors[2] and errors == sorted(errors), errors
    assert sizes == sorted(sizes, reverse=True) and sizes[0] < 0.6 * convert.describe(dense)["file_mb"]


def test_the_weights_are_what_mlx_makes_of_them(dense, tmp_path):
    folder = convert.convert(convert.conversion(str(dense), 4, 32, tmp_path))
    ours, own = (mx.load(str(path / "model.safetensors")) for path in (folder, dense))
    name = "model.layers.0.mlp.up_proj"
    for part, expected in zip(
        ("weight", "scales", "biases"), mx.quantize(own[f"{name}.weight"], group_size=32, bits=4), strict=True
    ):
        assert mx.array_equal(ours[f"{name}.{part}"], expected), part


def test_a_quantized_origin_is_expanded_and_named(tiny_folder, tmp_path):
    own = loading.load(str(tiny_folder), weights="dense", dtype="float32").model(IDS)
    assert convert.origin(str(tiny_folder)) == {"bits": 4, "group_size": 32}
    wide = convert.convert(convert.conversion(str(tiny_folder), 16, 64, tmp_path))
    assert convert.origin(str(wide)) is None and "quantization" not in json.loads((wide / "config.json").read_text())
    assert json.loads((wide / "converted.json").read_text())["origin"] == {"bits": 4, "group_size": 32}
    ours = loading.load(str(wide)).model(IDS)
    assert mx.abs(ours - own).max().item() < 0.02 * own.std().item()  # one float16 rounding
    assert convert.describe(wide)["bits_per_weight"] == 16
    assert convert.describe(wide)["group_size"] is None
    eight = convert.convert(convert.conversion(str(tiny_folder), 8, 32, tmp_path))
    ours = loading.load(str(eight), weights="dense", dtype="float32").model(IDS)
    assert mx.abs(ours - own).mean().item() < 0.05 * own.std().item()


def test_a_conversion_is_made_once_and_follows_its_source(dense, tmp_path):
    wanted = convert.conversion(str(dense), 4, 64, tmp_path / "models")
    folder = convert.convert(wanted)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert convert.convert(wanted) == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in (tmp_path / "models").iterdir()] == [folder.name]  # no scratch folder is left
    # 16 bits have no groups; another group size, or other files, are another model
    assert (
        convert.conversion(str(dense), 16, 32, tmp_path).path == convert.conversion(str(dense), 16, 64, tmp_path).path
    )
    assert convert.conversion(str(dense), 4, 32, tmp_path / "models").path != folder
    changed = tmp_path / "dense"
    shutil.copytree(dense, changed)
    before = convert.conversion(str(changed), 4, 64, tmp_path).path
    (changed / "chat_template.jinja").write_text(QWEN25)
    assert convert.conversion(str(changed), 4, 64, tmp_path).path != before
    hub = convert.conversion("Qwen/Qwen2.5-0.5B-Instruct@main", 8, 64, tmp_path)  # nothing is asked of the hub
    assert hub.label == "Qwen2.5-0.5B-Instruct-8bit-g64"


def test_conversions_that_cannot_be(dense, tmp_path):
    folder = convert.conversion(str(dense), 4, 64, tmp_path)
    narrow = make_folder(tmp_path / "narrow", hidden_size=32, intermediate_size=32, num_attention_heads=1,
                         num_key_value_heads=1)  # fmt: skip
    with pytest.raises(UserError, match="no layer's width is a multiple of the group size 128"):
        convert.convert(convert.conversion(str(narrow), 4, 128, tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"broken: cannot be loaded \("):
        convert.convert(convert.conversion(str(broken), 4, 64, tmp_path))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        convert.convert(replace(folder, path=file / "model"))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"narrow", "broken", "file"}


# ------------------------------------------------------------------------------------------ the study


def test_a_study_is_made_once_and_resumed(tiny_folder, tmp_path, questions, monkeypatch, unwritten):
    config = config_of(tmp_path, questions, {"model": str(tiny_folder)}, {"model": str(tiny_folder), "bits": 8})
    lines = list(study.preview(config))
    assert [line[:10].strip() for line in lines] == ["to make", "to make", "to convert", "to make", "to make"]
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()

    made, run = [], compare.run
    monkeypatch.setattr(
        compare, "run", lambda plan, path, *rest, **more: made.append(path) or run(plan, path, *rest, **more)
    )
    said = []
    (part,) = study.run(config, said.append)
    assert len(made) == 4 and len(said) == 1 and said[0].startswith(f"converting {tiny_folder} to ")
    assert part.comparison["total_questions"].tolist() == [6] * 4 and len(part.pairs) == 6
    assert part.summary["model"].tolist() == [
        "tiny-4bit_plain", "tiny-4bit_boxed", "tiny-4bit-8bit-g64_plain", "tiny-4bit-8bit-g64_boxed",
    ]  # fmt: skip
    assert len(part.bits) == 2 and part.bits[0]["bits"].tolist() == [4, 8]  # one for each prompt
    assert any("comes with 4-bit weights" in note for note in part.notes)
    assert all(line.startswith("finished") for line in study.preview(config))

    study.run(config, said.append)
    assert len(made) == 4 and len(said) == 1  # nothing is made again
    cut = made[2]
    whole = (cut / "samples.jsonl").read_text().splitlines(keepends=True)
    (cut / "result.json").unlink()
    (cut / "samples.jsonl").write_text("".join(whole[:2]) + whole[2][:20])
    assert [line[:10].strip() for line in study.preview(config)].count("to finish") == 1
    study.run(config)
    assert made[4:] == [cut]
    without = [{k: v for k, v in json.loads(line).items() if k != "elapsed"} for line in whole]
    again = [json.loads(line) for line in (cut / "samples.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "elapsed"} for row in again] == without


def test_the_files_of_a_study(tiny_folder, tmp_path, questions, monkeypatch):
    monkeypatch.setattr(study.quality, "true_equations", lambda run: 0.25)
    config = config_of(tmp_path, questions, {"model": str(tiny_folder)}, {"model": str(tiny_folder), "bits": 4})
    out = tmp_path / "out"
    out.mkdir()
    (out / "budgets.csv").write_text("of an earlier study")
    (part,) = study.run(config)
    assert not (out / "budgets.csv").exists()
    names = {path.name for path in out.iterdir()}
    assert {"summary.csv", "pairs.csv", "bits.csv", "bits-2.csv", "study.md", "study.json", "table.csv"} <= names
    assert {"per_question.csv", "results.json", "accuracy.png"} <= names and "strata.csv" not in names
    header = (out / "summary.csv").read_text().splitlines()[0]
    assert header == "model,total_cases,success_rate,correct,incorrect,ci_low,ci_high"
    assert (out / "table.csv").read_text().startswith("model,adapter,prompt,accuracy,correct_count,total_questions,")
    page = (out / "study.md").read_text()
    for line in (
        "# tiny: qa",
        "## Abstract",
        "## Key points",
        "## Summary",
        "## Comparison",
        "## Pairs",
        "## Bits",
        "## Notes",
        *map(tables.escape_markdown, study.said(part)),
    ):
        assert line in page
    assert json.loads((out / "provenance.json").read_text())["config"] == config.model_dump(mode="json")
    stored = json.loads((out / "study.json").read_text())
    assert [row["sentence"] for row in stored["pairs"]] == study.said(part)
    assert tables.escape_markdown(stored["abstract"]) in page and tables.bullets(stored["key_points"]) in page
    html = (out / "report.html").read_text()
    assert "<h1>tiny</h1>" in html and "<h2>Abstract</h2>" in html and stored["key_points"]
    assert stored["summary"][0]["total_cases"] == 6 and stored["comparison"][0]["p_value"] is None
    assert {row["true_equations"] for row in stored["comparison"]} == {0.25}
    assert {"bits", "group_size", "bits_per_weight", "file_mb", "peak_memory_gb", "tokens_per_second"} <= set(
        stored["bits"][0][0]
    )
    items = study.to_terminal(part)
    text = "".join(item if isinstance(item, str) else rendered(item) for item in items)
    assert "total cases" in text and "success rate" in text and study.said(part)[0] in text


def test_budgets_are_used_with_every_model_and_drawn(tiny_folder, tmp_path, questions):
    task = {"task": "qa", "data": str(questions), "prompts": ["plain"], "max_tokens": 6, "prefill": "<think>\n"}
    rows = [{"model": str(tiny_folder), "label": name} for name in "ab"]
    config = config_of(tmp_path, questions, *rows, tasks=[task], budgets=[0, 4, None], pairs="baseline")
    (part,) = study.run(config)
    prompts = ["plain ≤0", "plain ≤4", "plain"] * 2
    assert part.comparison["prompt"].tolist() == prompts
    assert [run.result["think_tokens"] for run in part.runs] == [0, 4, None] * 2
    assert [curve.name for curve in part.curves] == ["a_plain", "b_plain"]
    for budget, run in zip((0, 4), part.runs, strict=False):
        assert all(row["tokens"] <= 6 + budget for row in run.samples) and any("forced" in row for row in run.samples)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"budgets.csv", "accuracy-by-budget.png", "accuracy-by-tokens.png"} <= names
    whole = json.loads((tmp_path / "out" / "study.json").read_text(), parse_constant=pytest.fail)
    stored = whole["budgets"]
    assert stored[0]["pairs"][0]["ratio"] is None  # none is right
    assert [curve["sentence"] for curve in stored] == [budgets.sentence(curve) for curve in part.curves]
    said = budgets.sentence(part.curves[0])
    terminal = "".join(item if isinstance(item, str) else rendered(item, 80) for item in study.to_terminal(part))
    page = (tmp_path / "out" / "report.html").read_text()
    assert said in terminal and said in page
    assert tables.escape_markdown(said) in (tmp_path / "out" / "study.md").read_text()
    assert "budgets: a_plain" in terminal and "Accuracy by budget of thought" in page
    assert terminal.count("accuracy % by budget of the thought    accuracy % by tokens really used") == 2
    assert "bounds thought and answer together" in said
    assert "![Accuracy by tokens](accuracy-by-tokens.png)" in (tmp_path / "out" / "study.md").read_text()
    assert len(list(study.preview(config))) == 6
    own = config_of(tmp_path, questions, {**rows[0], "settings": {"think_tokens": 3}}, tasks=[task], budgets=[0])
    with pytest.raises(UserError, match=r"models\.0\.settings: 'think_tokens' is filled in by budgets"):
        study.run(own)


def test_several_tasks_have_a_folder_each_and_strata(tiny_folder, tmp_path, questions):
    qa = {"task": "qa", "data": str(questions), "prompts": ["plain"], "max_tokens": 4}
    countdown = {"task": "countdown", "prompts": ["direct"], "limit": 8, "max_tokens": 4}
    folder = make_folder(tmp_path / "long", seed=3)
    config = config_of(tmp_path, questions, {"model": str(folder)}, tasks=[qa, countdown, {**qa, "max_tokens": 5}])
    parts = study.run(config)
    assert [part.name for part in parts] == ["qa", "countdown", "qa-2"] and parts[0].pairs == []
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"qa", "countdown", "qa-2"}
    strata = (tmp_path / "out" / "countdown" / "strata.csv").read_text()
    assert "3 operands" in strata and "4 operands" in strata
    assert "By stratum" in (tmp_path / "out" / "countdown" / "study.md").read_text()


def test_labels_settings_and_adapters_that_are_not_there_yet(tiny_folder, tmp_path, questions, unwritten):
    rows = (
        {"model": str(tiny_folder), "label": "short"},
        {"model": str(tiny_folder), "label": "long", "settings": {"max_tokens": 20}, "prompts": ["boxed"]},
        {"model": str(tiny_folder), "label": "later", "adapter": str(tmp_path / "none"), "optional": True},
    )
    said = []
    (part,) = study.run(config_of(tmp_path, questions, *rows, pairs="baseline", baseline="long_boxed"), said.append)
    assert part.summary["model"].tolist() == ["short_plain", "short_boxed", "long_boxed"]
    assert part.comparison["max_tokens"].tolist() == [12, 12, 20]
    assert [pair.b for pair in part.pairs] == ["long_boxed"] * 2
    assert said == [f"later is left out: there is no adapter in {tmp_path / 'none'} yet"]
    assert any(note.startswith("max_tokens differs: 12 in ") for note in part.notes)


def test_apart_is_the_same_evaluation_with_its_own_memory(tiny_folder, tmp_path, questions):
    config = config_of(tmp_path, questions, {"model": str(tiny_folder)})
    plan = compare.entries(config, config.tasks[0])[0][0].plan()
    here = compare.obtain(plan, tmp_path / "here")
    there = compare.obtain(plan, tmp_path / "there", apart=True)
    assert [row["completion"] for row in here.samples] == [row["completion"] for row in there.samples]
    assert 0 < there.result["peak_memory_gb"] < here.result["peak_memory_gb"]  # this process has run other tests
    broken = replace(plan, config=plan.config.model_copy(update={"model": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="no such folder"):  # a UserError over there is one here
        compare.obtain(broken, tmp_path / "broken", apart=True)


def test_compare_and_study_read_one_shape_and_make_the_same_runs(tiny_folder, tmp_path, questions, unwritten):
    rows = {"model": str(tiny_folder), "label": "own"}, {"model": str(tiny_folder), "bits": 8, "prompts": ["plain"]}
    config = config_of(tmp_path, questions, *rows)
    asked = config.model_dump(include={"tasks", "models", "runs_dir"}, exclude_unset=True)
    asked["models"].append({"model": "nano", "adapter": "./none", "label": "later", "optional": True})
    said = []
    frame, *_ = compare.compared(build(CompareConfig, {**asked, "baseline": "own_boxed"}), say=said.append)
    assert said[0] == "later is left out: there is no adapter in ./none yet"
    assert len(said) == 2 and said[1].startswith("converting ")
    (part,) = study.run(config)
    assert frame["run"].tolist() == part.comparison["run"].tolist()  # and a study has nothing left to make
    assert frame["label"].tolist() == ["own_plain", "own_boxed", "tiny-4bit-8bit-g64_plain"]
    assert frame["diff"].isna().tolist() == [False, True, False]
    task = asked["tasks"][0]
    old = [{**task, "model": str(tiny_folder), "prompt": prompt} for prompt in task.pop("prompts")]
    old = [{name: value for name, value in settings.items() if name != "prompts"} for settings in old]
    before = compare.collect(build(CompareConfig, {"evals": [*old, old[0]], "runs_dir": asked["runs_dir"]}))
    assert [run.name for run in before] == frame["run"].tolist()[:2]


def test_settings_of_the_command_win_over_those_of_tasks(questions):
    config = build(CompareConfig, {"tasks": [{"task": "qa", "data": str(questions)}], "models": [{"model": "nano"}]})
    (task,) = compare.requested(config, prompts=["plain"], settings={"limit": 3}).tasks
    assert (task.prompts, task.limit, task.data) == (["plain"], 3, str(questions))
    with pytest.raises(UserError, match="models: there are no tasks for them"):
        compare.collect(build(CompareConfig, {"models": [{"model": "nano"}]}))
    with pytest.raises(UserError, match=r"evals\.1: its 2 problems of countdown are not the 3 of evals\.0"):
        compare.collect(build(CompareConfig, {"evals": [{"limit": 3}, {"limit": 2}]}))


@pytest.mark.parametrize(
    ("template", "opened", "changes"),
    [
        (PHI4, "", {"model_type": "phi3", "tie_word_embeddings": False}),
        (R1, "<think>\n", {"tie_word_embeddings": False}),
        (QWEN25, "", {}),
    ],
    ids=["phi-4", "deepscaler", "qwen2.5"],
)
def test_the_shipped_studies_models_run_as_tiny_random_ones(template, opened, changes, tmp_path, questions, unwritten):
    folder = make_folder(tmp_path / "tiny", template, seed=4, **changes)
    rows = [{"model": str(folder)}, {"model": str(folder), "bits": 4, "group_size": 32}]
    tasks = [
        {"task": "countdown", "prompts": ["thinking"], "limit": 4, "max_tokens": 12},
        {"task": "qa", "data": str(questions), "prompts": ["boxed"], "limit": 4, "max_tokens": 12},
    ]
    config = config_of(tmp_path, questions, *rows, tasks=tasks)
    parts = study.run(config)
    assert [len(part.runs) for part in parts] == [2, 2] and [len(part.bits) for part in parts] == [1, 1]
    loaded, plan = loading.load(str(folder)), compare.entries(config, config.tasks[0])[0][1].plan()
    assert loaded.render(plan.prompt, plan.problems[0]).opened == opened
    for part in parts:
        for run in part.runs:
            assert all(row["prompt"].endswith(opened) and row["tokens"] for row in run.samples)
            assert len({row["completion"] for row in run.samples}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "tasks: needs 1 or more"),
        ({"models": []}, "models: needs 1 or more"),
        ({"tasks": [{"task": "qa", "prompts": ["plain"], "model": "nano"}]}, "'model' is filled in; name it"),
        ({"tasks": [{"task": "qa", "promts": ["plain"]}]}, "unknown field 'tasks.0.promts'; did you mean 'prompts'"),
        ({"models": [{"model": "nano", "bits": 7}]}, "models.0.bits: .* not '7'"),
        ({"models": [{"model": "nano", "settings": {"max_tokns": 3}}]}, "models.0.settings: unknown field 'max_tokns'"),
        ({"models": [{"model": "nano", "settings": {"prompt": "x"}}]}, "'prompt' is a field of its own"),
        ({"models": [{"model": "nano+a", "adapter": "b"}]}, "two adapters, a and b"),
        ({"models": [{"model": "nano", "adapter": "./none"}]}, "no such adapter folder"),
        ({"models": [{"model": "nano", "adapter": "./none", "optional": True}]}, "no model is left to evaluate"),
        ({"models": [{"model": "./none", "bits": 8}]}, "no such folder"),
        ({"tasks": [{"task": "qa", "prompts": ["none"]}]}, "unknown prompt of qa 'none'|--data"),
        ({"baseline": "nobody"}, "unknown baseline 'nobody'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(changes, message, tiny_folder, tmp_path, questions):
    with pytest.raises(UserError, match=message):
        study.run(config_of(tmp_path, questions, {"model": str(tiny_folder)}, **changes))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("baseline", "row"),
    [("base", 2), ("base_boxed", 3), ("other", 0), ("other_boxed", 1), ("tiny-4bit-8bit-g64_boxed", 5), (None, 0)],
)
def test_the_baseline_is_found_by_what_its_row_is_called(baseline, row, tiny_folder, tmp_path, questions):
    rows = [{"model": str(tiny_folder), "label": name} for name in ("other", "base")]
    rows.append({"model": str(tiny_folder), "bits": 8})
    config = config_of(tmp_path, questions, *rows, baseline=baseline)
    (part,) = study.lay_out(config)
    assert part.baseline == row
    named = config.model_copy(update={"baseline": part.plans[1].label})
    assert study.lay_out(named)[0].baseline == 1  # the name of its run


def test_the_baseline_of_the_tables_is_the_one_that_was_named(tiny_folder, tmp_path, questions):
    rows = [{"model": str(tiny_folder), "label": name, "settings": {"seed": i}} for i, name in enumerate("ab")]
    task = {"task": "qa", "data": str(questions), "prompts": ["plain"], "max_tokens": 2, "rows": 4}
    parts = study.run(config_of(tmp_path, questions, *rows, tasks=[task, {**task, "max_tokens": 3}], baseline="b"))
    for part in parts:
        assert part.comparison["diff"].isna().tolist() == [False, True]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No run is above the baseline, b" in page


def test_a_baseline_that_one_task_lacks_is_refused_with_its_place(tiny_folder, tmp_path, questions):
    qa = {"task": "qa", "data": str(questions), "prompts": ["plain"]}
    tasks = [qa, {"task": "countdown", "prompts": ["direct"], "limit": 2}]
    rows = {"model": str(tiny_folder), "label": "base"}
    config = config_of(tmp_path, questions, rows, tasks=tasks, baseline="base_plain")
    for look in (study.run, lambda config: list(study.preview(config))):
        with pytest.raises(UserError, match=r"tasks\.1: unknown baseline 'base_plain'.*base_direct"):
            look(config)
    assert [part.baseline for part in study.lay_out(config.model_copy(update={"baseline": "base"}))] == [0, 0]


@pytest.mark.parametrize("look", [study.run, lambda config: list(study.preview(config))], ids=["run", "preview"])
def test_what_the_plan_shows_is_refused_before_anything_is_evaluated(look, tiny_folder, tmp_path, questions):
    whole, few = {"model": str(tiny_folder)}, {"model": str(tiny_folder), "settings": {"limit": 5}}
    with pytest.raises(UserError, match=r"models\.1: its 5 problems of qa are not the 6 of models\.0"):
        look(config_of(tmp_path, questions, whole, few))
    with pytest.raises(UserError, match="unknown baseline 'nobody'"):
        look(config_of(tmp_path, questions, whole, baseline="nobody"))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


def test_the_command(tiny_folder, tmp_path, questions, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"name: Mine\ntasks:\n- {{task: qa, data: {questions}, prompts: [plain, boxed], max_tokens: 8}}\n"
        f"models:\n- {{model: {tiny_folder}}}\n"
    )
    shown = CliRunner().invoke(main, ["study", str(file), "--dry-run"])
    assert shown.exit_code == 0 and shown.output.count("to make") == 2 and not (tmp_path / "tables").exists()
    result = CliRunner().invoke(main, ["study", str(file)])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 100
    for text in (
        "qa: summary",
        "total cases",
        "incorrect",
        "baseline",
        "No difference shown between",
        "Each row is one",
    ):
        assert text in result.stdout
    assert (tmp_path / "tables" / "mine" / "study.md").exists() and "written to tables/mine" in result.stderr
    elsewhere = CliRunner().invoke(main, ["study", str(file), "--out", "x", "--runs-dir", "y", "--dry-run"])
    assert "y/qa-" in elsewhere.output
