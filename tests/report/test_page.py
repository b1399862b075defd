"""The page: what is in it, hostile completions in it, and what a real browser makes of it."""

import http.server
import json
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from factories import BASE, BETTER, make_run, write_evaluation, write_training

import mlx_traces
from mlx_traces import text
from mlx_traces.cli import main
from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison
from mlx_traces.report import figures, run_view
from mlx_traces.report import page as report_page
from mlx_traces.report.page import TEMPLATES, embedded, evaluated, training_row, write

VOID = {"meta", "link", "br", "input", "img", "hr"}
HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</script><script>document.title = 'taken'</script>",
    "<!--<script>",
    "]]> <!-- </style><img src=x onerror=\"document.title='taken'\">",
    '"><svg onload="document.title=\'taken\'">',
    "\x1b[31mred\x1b]0;title\x07 \u202eesrever \x00\x9b",
    "\u2028\u2029 {{ 7 * 7 }} {% raw %} &lt;b&gt; `${1}`",
]


class Page(HTMLParser):
    """The texts, tags and scripts of a page, with a check that tags are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.scripts, self.text = [], [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


def page_of(*runs, out, **more):
    file, *_ = write(runs, out, **more)
    return Page(file.read_text())


def test_a_comparison_two_trainings_and_a_lone_evaluation(tmp_path):
    runs = [write_evaluation(tmp_path / "base", BASE), write_training(tmp_path / "rl", finished=True)]
    runs += [write_evaluation(tmp_path / "better", BETTER, adapter="runs/sft-01")]
    runs += [write_evaluation(tmp_path / "alone", [1, 0]), write_training(tmp_path / "rl2", evaluate={"limit": 40})]
    page = page_of(*runs, out=tmp_path / "out" / "page.html")
    frame = comparison.compare_runs([evaluated(run_view.read(run)) for run in (runs[0], runs[2])])
    row = frame.to_dict("records")[1]
    assert "Countdown: 2 runs on the same problems" in page.text and "Countdown: nano" in page.text
    assert f"+50.0 points {text.interval(row['diff_low'], row['diff_high'])} over nano (thinking)" in page.text
    assert "5 won and 1 lost, Holm-adjusted p = 0.219, not significant." in page.text
    assert "75.0 %[40.9, 92.9]" in page.text
    assert "Reinforcement learning: 2 runs" in page.text and "step 6 of 10" in page.text
    assert page.text.count("not finished") == 1 and "25.0 % → 50.0 %" in page.text
    for title in ("Accuracy by difficulty", "Accuracy by extractor", "Problems won and lost", "Held-out accuracy"):
        assert title in page.text
    assert (
        "all extractors judge the same, correct or not: nano_thinking 25.0 %, nano+sft-01_thinking 75.0 %." in page.text
    )
    assert "Constant, so not drawn: Entropy, nats a token 0.5" in page.text
    data = page.data
    assert data["runs"] == ["base", "rl", "better", "alone", "rl2"] and data["total"] == len(data["rows"]) == 22
    assert data["rows"][0] == {
        **{"run": 0, "id": "p0", "question": "question 0", "thought": "hm", "solution": "5", "verdict": "correct"},
        **{"extracted": "5", "gold": "5", "tokens": 10, "stratum": "3 operands"},
    }
    rollout, held_out = (row for row in data["rows"] if row["run"] == 1)
    assert (rollout["verdict"], rollout["reward"], rollout["rewards"]) == (
        "correct",
        1.2,
        {"correct": 1, "format": 0.2},
    )
    assert held_out["verdict"] == "wrong_value" and held_out["cut"] is True


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    runs = [write_evaluation(tmp_path / "a", BASE), write_training(tmp_path / "b", finished=True)]
    html = write(runs, tmp_path / "page.html")[0].read_text()
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import", html)
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "img", "base", "form", "foreignobject")
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        link = attributes.get("href") or attributes.get("xlink:href") or "#"
        assert link.startswith("#") or link == "data:,"
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    colors = set(re.findall(r"#[0-9a-f]{6}", html.partition("</style>")[2]))
    assert not colors & set(figures.VARIABLES), "a figure has a colour that does not follow dark mode"


def test_hostile_completions_stay_data(tmp_path):
    run = write_evaluation(
        tmp_path / "a", [1, 0] * 4, completion=[*HOSTILE, "x" * 50_000], model="<script>$a$</script>"
    )
    html = write([run], tmp_path / "page.html")[0].read_text()
    page = Page(html)
    assert len(page.scripts) == 2 and html.count("<script") == 2 and "<!--" not in html
    texts = [row["solution"] for row in page.data["rows"]]
    assert texts[:2] == HOSTILE[:2] and texts[4] == HOSTILE[4]
    assert texts[5] == "␛[31mred␛]0;title␇ ⟨U+202E⟩esrever ␀⟨U+009B⟩"
    assert len(texts[7]) < 20_100 and "[… 30,000 characters left out …]" in texts[7]
    assert not set("\x1b\x07\x00\u202e\x9b") & set(html)
    assert "<script>$a$" in page.text


def test_the_baseline_is_a_row_and_not_a_name(tmp_path):
    """Of two run folders with one name, in a comparison, on its page, and on the page of its folder."""
    asked = {"task": "countdown", "limit": 2, "max_tokens": 2}
    for prompt in ("direct", "thinking"):
        mlx_traces.evaluate(out=tmp_path / prompt / "run", prompt=prompt, **asked)
    folders, out = [tmp_path / prompt / "run" for prompt in ("direct", "thinking")], tmp_path / "out"
    for prompt in ("direct", "thinking"):
        frame = mlx_traces.compare(*folders, baseline=f"nano_{prompt}", out=out)
        assert frame["prompt"][frame["diff"].isna()].item() == prompt
        again = write([out], tmp_path / "again.html")[0]
        for page in (out / "report.html", again):
            assert f"No run is above the baseline, nano ({prompt})" in Page(page.read_text()).text


def test_what_a_study_says_first_is_text(tmp_path):
    fronts = [report_page.Front(name, f"{name} <b>abstract</b>", ["point one"], "limits") for name in ("one", "two")]
    runs = [write_evaluation(tmp_path / "a", BASE), write_training(tmp_path / "b")]
    page = Page(write(runs, tmp_path / "page.html", title="A <i>title</i>", fronts=fronts)[0].read_text())
    assert "A <i>title</i>" in page.text and "one: abstract" in page.text and "two <b>abstract</b>" in page.text
    assert page.text.index("point one") < page.text.index("Accuracy") and "limits" in page.text
    assert "the trained model answers the next round" in page.text  # the pipeline, as there is a training
    alone = Page(write(runs[:1], tmp_path / "alone.html")[0].read_text())
    assert "the trained model" not in alone.text and "Abstract" not in alone.text


def test_the_page_has_every_figure_at_k_and_says_what_stopping_spoils(tmp_path):
    shares = {"pass_at_k": {"1": 0.5, "2": 0.75}, "pass_hat_k": {"1": 0.5, "2": 0.25}}
    fixed, growing = (
        [write_evaluation(tmp_path / kind / name, BASE, growing=kind == "growing") for name in "ab"]
        for kind in ("fixed", "growing")
    )
    for run in fixed:
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | shares))
    shown = Page(write(fixed, tmp_path / "page.html")[0].read_text()).text
    assert "pass@2" in shown and "pass^2" in shown and "pass^1" not in shown and comparison.GREW not in shown
    assert comparison.GREW in Page(write(growing, tmp_path / "page.html")[0].read_text()).text


def test_many_samples_are_cut_down_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "MOST_TRACES", 20)
    runs = [write_evaluation(tmp_path / name, [1, 0] * 20, model=name) for name in "ab"]
    page = page_of(*runs, out=tmp_path)
    rows = page.data["rows"]
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(10)] * 2
    assert "20 samples; 60 more are in the run folders" in page.text
    monkeypatch.setattr(report_page, "MOST_CHARACTERS", 500)
    assert len(embedded([run_view.read(run) for run in runs])["rows"]) < 20


def test_unfinished_and_empty_runs(tmp_path):
    cut = write_evaluation(tmp_path / "cut", [1, 0, 1, 1, 1], finished=False, samples=2, limit=9)
    with (cut / "samples.jsonl").open("a") as file:
        file.write('{"id": "p2", "sam')
    begun = write_evaluation(tmp_path / "begun", [], finished=False)
    started = write_training(tmp_path / "started", steps=0)
    (started / "metrics.jsonl").write_text("")
    page = page_of(cut, begun, started, out=tmp_path)
    assert "Not finished: samples 5 of 18" in page.text
    assert "75.0 %" in page.text and "of 2 × 2" in page.text  # the third problem lacks a sample
    assert "No sample is finished." in page.text and "No step yet." in page.text


@pytest.mark.parametrize("gone", [True, False])
def test_a_finished_evaluation_without_its_samples_is_not_called_unfinished(tmp_path, gone):
    run = write_evaluation(tmp_path / "a", BASE)
    (run / "samples.jsonl").unlink() if gone else (run / "samples.jsonl").write_text("")
    text = page_of(run, write_evaluation(tmp_path / "b", BASE), out=tmp_path).text
    assert text.count("its samples are gone: result.json is there, samples.jsonl is missing or empty.") == 1
    assert "Not finished" not in text and "No sample is finished" not in text


def test_texts_in_the_place_of_numbers_are_left_out(tmp_path):
    trained = write_training(tmp_path / "t", finished=True, num_steps="many")
    changes = {"best_step": "three", "tokens_per_second": "fast", "notes": 5}
    (trained / "result.json").write_text(json.dumps(changes))
    row = training_row(0, run_view.read(trained))
    assert (row["cells"]["kept step"], row["cells"]["tokens/s"]) == ("–", "–")
    (trained / "result.json").write_text(json.dumps({"best_step": 1200, "tokens_per_second": 0}))
    row = training_row(0, run_view.read(trained))
    assert (row["cells"]["kept step"], row["cells"]["tokens/s"]) == ("1,200", "–")
    cut = write_evaluation(tmp_path / "e", BASE, finished=False)
    about = json.loads((cut / "run.json").read_text())
    about["identity"] |= {"samples": "x", "limit": "y"}
    (cut / "run.json").write_text(json.dumps(about))
    done = write_evaluation(tmp_path / "d", BASE)
    result = json.loads((done / "result.json").read_text())
    (done / "result.json").write_text(json.dumps(result | {"tokens_per_second": "fast", "notes": 5}))
    text = page_of(trained, cut, done, out=tmp_path).text
    assert f"Not finished: samples {len(BASE)}, " in text


def test_runs_already_read_and_a_folder_to_write_to(tmp_path):
    run = evaluated(run_view.read(write_evaluation(tmp_path / "a", BASE)))
    assert write([run], tmp_path / "out") == [tmp_path / "out" / "report.html"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_runs_already_read_keep_their_trainings_clusters_and_how_they_were_made(tmp_path):
    base, *own = (make_run(name, [1] * (30 + i) + [0] * 30) for i, name in enumerate("xyz"))
    own = [replace(run, samples=run.samples[:60]) for run in own]
    base = replace(base, about={"versions": {"mlx": "0.1"}})
    runs = [base, comparison.recipe("three", [replace(run, about={"versions": {"mlx": "0.2"}}) for run in own])]
    row = comparison.compare_runs(runs).to_dict("records")[1]
    shown = Page(write(runs, tmp_path / "page.html")[0].read_text()).text
    assert text.interval(row["ci_low"], row["ci_high"]) in shown and text.p_text(row["p_value"]) in shown
    assert "Student's t over trainings and problems" in shown and "versions differ: mlx 0.1 in x" in shown
    for run in runs[:1]:
        for i, sample in enumerate(run.samples):
            sample["columns"] = {"document": str(i // 3)}
    grouped = comparison.clustered([base, replace(base, name="again")], "document")
    assert "cluster-robust" in Page(write(grouped, tmp_path / "page.html")[0].read_text()).text


def test_pictures(tmp_path):
    runs = [write_evaluation(tmp_path / "a", BASE), write_evaluation(tmp_path / "b", BETTER, model="two")]
    runs += [write_training(tmp_path / "c"), write_evaluation(tmp_path / "d", [1])]
    _, *pictures = write(runs, tmp_path / "page.html", png=tmp_path / "png")
    names = {path.name for path in pictures}
    assert names >= {"accuracy.png", "accuracy-2.png", "wins.png", "difficulty.png", "reinforcement-reward-mean.png"}
    assert names == {path.name for path in (tmp_path / "png").iterdir()}
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in pictures)


def test_the_command_and_its_errors(tmp_path):
    a, b = (write_evaluation(tmp_path / name, outcomes) for name, outcomes in (("a", BASE), ("b", BETTER)))
    call = CliRunner().invoke
    result = call(main, ["report", str(a), str(b), "--out", str(tmp_path / "p.html"), "--baseline", "b"])
    assert result.exit_code == 0 and f"written to {tmp_path / 'p.html'}" in result.stdout
    assert "No run is above the baseline" in (tmp_path / "p.html").read_text()
    for arguments, message in (
        ([a, "--baseline", "c"], "unknown baseline 'c'"),
        ([tmp_path / "none"], "no such run folder"),
        ([a, "--out", a / "run.json" / "x.html"], "cannot be written"),
    ):
        result = call(
            main, ["report", *map(str, arguments), *(["--out", str(tmp_path)] if len(arguments) == 1 else [])]
        )
        assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    with pytest.raises(UserError, match="there are no runs"):
        write([], tmp_path)


# ------------------------------------------------------------------------------------------------ a browser


@pytest.fixture
def browse(tmp_path):
    """Return a function from a file to (the page as the browser has it, what it logged)."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium to open the page in")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000"

    def open_(file):
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [browser, *quiet.split(), profile, "--dump-dom", file.resolve().as_uri()],
            capture_output=True,
            timeout=120,
        )
        return done.stdout.decode(), done.stderr.decode("utf-8", "replace")

    return open_


def test_a_browser_shows_hostile_completions_as_text_and_fetches_nothing(tmp_path, browse):
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    server = http.server.HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    lures = [
        f'<img src="{address}/a">',
        f"<link rel=stylesheet href={address}/b>",
        f"<script src={address}/c></script>",
    ]
    completions = [*HOSTILE, *lures, *["5"] * 30]
    run = write_evaluation(tmp_path / "a", [1, 0] * (len(completions) // 2), completion=completions)
    runs = [run, write_training(tmp_path / "b", finished=True)]
    document, log = browse(write(runs, tmp_path / "page.html")[0])
    server.shutdown()
    assert asked == []
    assert "CONSOLE" not in log, log
    assert "<title>2 runs on countdown</title>" in document  # not taken
    assert document.count("<article") == 20 and "20 of 42 shown" in document
    assert "&lt;script&gt;document.title = 'taken'&lt;/script&gt;" in document
    for count, verdict in ((42, "all"), (21, "correct"), (21, "wrong value")):
        assert f">{verdict}<span>{count}</span></button>" in document


# What protan, deutan and tritan eyes see of linear RGB (Machado, Oliveira and Fernandes, 2009, severity 1).
EYES = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)


def lab(color, eyes):
    """Return a colour in CIE Lab, seen by some eyes."""
    parts = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(eyes) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    x, y, z = np.where((t := xyz / (0.9505, 1, 1.089)) > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_are_told_apart_by_all_eyes_in_light_and_dark():
    style = (TEMPLATES / "report.css").read_text()
    sets = [re.findall(r"--c\d+: (#[0-9a-f]{6})", part) for part in style.split("prefers-color-scheme: dark")]
    assert sets[0] == list(figures.COLORS) and len(sets[1]) == len(figures.COLORS) >= 12
    for colors, added, all_of_them in ((sets[0], 23, 9), (sets[1], 22, 6)):
        for eyes in EYES:
            seen = [lab(color, eyes) for color in colors]
            for i, later in enumerate(seen):
                for earlier in seen[:i]:
                    assert np.linalg.norm(later - earlier) > (added if i >= 7 else all_of_them)


def test_many_runs_differ_in_colour_or_look(tmp_path):
    count = 14
    looks = {(figures.color(i), str(figures.look(i))) for i in range(48)}
    assert len(looks) == 48
    runs = [write_evaluation(tmp_path / f"e{i}", BASE, max_tokens=64 + i) for i in range(count)]
    runs += [write_training(tmp_path / f"t{i}") for i in range(count)]
    html = write(runs, tmp_path / "page.html")[0].read_text()
    swatches = re.findall(
        r'<th scope="row"><span class="(swatch look\d)" style="(background-color: var\(--c\d+\))"', html
    )
    assert len(swatches) == 2 * count and len(set(swatches[:count])) == len(set(swatches[count:])) == count
    assert "stroke-dasharray" in html and "url(#" in html  # dashes of lines, hatching of bars
    for name in ("look1", "look2", "look3"):
        assert f".{name} {{" in html
