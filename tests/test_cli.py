"""The command line as a user types it, and the README's and the configurations' commands against it."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from factories import call

from mlx_traces.cli import main
from mlx_traces.cli.options import settings_options
from mlx_traces.cli.unused import unused
from mlx_traces.config import (
    CompareConfig,
    EvalConfig,
    FilterConfig,
    GRPOConfig,
    NanoConfig,
    PPOConfig,
    ReformatConfig,
    RoundsConfig,
    ScoreConfig,
    SFTConfig,
    StudyConfig,
    build,
    find_config,
    read_config,
)
from mlx_traces.errors import UserError

ROOT = Path(__file__).parent.parent


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_help_needs_no_mlx():
    code = (
        "import sys\nfrom mlx_traces.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'mlx', 'mlx.core', 'transformers', 'pandas', 'scipy', 'numpy', 'datasets', 'matplotlib', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    assert "compare" in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_modules_that_say_so_never_load_mlx():
    names = ["mlx_traces.pipelines.verify"]
    for path in (ROOT / "mlx_traces").rglob("*.py"):
        if "No MLX" in (ast.get_docstring(ast.parse(path.read_text())) or ""):
            names.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    assert len(names) > 10
    code = (
        f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n"
        "    assert not {'mlx.core', 'mlx_lm', 'transformers'} & set(sys.modules), name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("group", [[], ["data"], ["bench"], ["nano"]])
def test_a_group_lists_each_command_once_with_a_whole_sentence(group):
    command = main.commands[group[0]] if group else main
    text = call(*group, "--help").output
    for name, one in command.commands.items():
        (line,) = re.findall(rf"^  {name} +(.+)$", text, re.MULTILINE)
        assert line.endswith(".") and not line.endswith("...") and one.help.startswith(line)


def test_what_starts_fast_loads_neither_mlx_nor_other_large_packages():
    modules = "config tasks.gsm8k tasks.countdown tasks.qa evaluation.stats evaluation.evaluator report.tables "
    modules += "runtime.run_folder runtime.hub"  # of grade, report, watch and data
    code = (
        f"import sys, {', '.join(f'mlx_traces.{module}' for module in modules.split())}\n"
        "heavy = {'mlx.core', 'transformers', 'pandas', 'datasets', 'httpx2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_grade_judges_completions_made_anywhere(tmp_path):
    rows = [
        {"completion": "so <answer>3 * (4 + 6)</answer>", "nums": [3, 4, 6], "target": 30, "mine": "kept"},
        {"completion": "so <answer>3 + 4</answer>", "nums": [3, 4, 6], "target": 30},
        {"completion": "3 * (4 + 6)", "nums": [3, 4, 6], "target": 30},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = call("grade", "--task", "countdown", file)
    graded = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["verdict"] for row in graded] == ["correct", "wrong_numbers", "no_answer"]
    assert [row["correct"] for row in graded] == [True, False, False]
    assert graded[0] == {**rows[0], "correct": True, "verdict": "correct", "extracted": "3 * (4 + 6)"}
    assert "1 of 3 correct by answer: 33.3 % [6.1, 79.2]" in result.stderr
    call("grade", "--task", "countdown", "--extractor", "tolerant", "--out", tmp_path / "out.jsonl", file)
    assert [row["correct"] for row in lines(tmp_path / "out.jsonl")] == [True, False, True]


def test_grade_never_overwrites(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"completion": "18", "answer": "18"}\n')
    before = file.read_text()
    for out, message in ((file, "exists; remove it"), (tmp_path, "exists; remove it")):
        result = call("grade", "--task", "gsm8k", "--out", out, file)
        assert result.exit_code == 1 and message in result.output
    assert file.read_text() == before
    for out, message in ((file, "exists; remove it"), (tmp_path / ("x" * 300), "cannot be written (File name")):
        for command in (("grade", "--task", "gsm8k", tmp_path / "none.jsonl"), ("data", "countdown", "--n", 1)):
            result = call(*command, "--out", out)
            assert result.exit_code == 1 and message in result.output  # before anything is read
    assert call("grade", "--task", "gsm8k", "--out", tmp_path / "new" / "out.jsonl", file).exit_code == 0


def test_messages_stay_on_one_clean_line(tmp_path):
    result = call("eval", "--model", "./no\x1b[31m\npe")
    assert result.exit_code == 1 and result.output.count("\n") == 1 and "\x1b" not in result.output


def test_version_and_interrupt(monkeypatch):
    from mlx_traces.evaluation import run

    assert call("--version").exit_code == 0
    monkeypatch.setattr(run, "evaluate", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = call("eval")
    assert result.exit_code == 130 and "--resume" in result.stderr


def test_grade_needs_only_the_answer_for_gsm8k(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"completion": "It is \\\\boxed{1,200}.", "answer": "so 1200\\n#### 1200"}\n')
    assert json.loads(call("grade", "--task", "gsm8k", file).stdout)["correct"] is True
    file.write_text('{"completion": "18"}\n')
    assert "rows.jsonl:1: 'answer' is missing; this row has completion" in call("grade", "--task", "gsm8k", file).output
    file.write_text('{"completion": 18, "answer": "18"}\n')
    assert "rows.jsonl:1: 'completion' must be a text" in call("grade", "--task", "gsm8k", file).output


def test_data_countdown_writes_problems_once(tmp_path):
    out = tmp_path / "new" / "problems.jsonl"
    assert call("data", "countdown", "--n", 12, "--seed", 1, "--out", out).exit_code == 0
    rows = lines(out)
    assert len(rows) == 12 and all(row["solutions"] > 0 for row in rows)
    again = call("data", "countdown", "--n", 12, "--out", out)
    assert again.exit_code == 1 and "exists; remove it, or choose another --out" in again.output
    assert lines(out) == rows
    narrow = call("data", "countdown", "--numbers", 5, 3, "--out", tmp_path / "x.jsonl")
    assert "numbers 5-3 is not a range" in narrow.output and not (tmp_path / "x.jsonl").exists()


def test_eval_and_compare_from_the_command_line(tmp_path):
    common = ["--limit", 12, "--max-tokens", 96, "--runs-dir", tmp_path / "runs"]
    one = call("eval", "--model", "nano", "--json", *common)
    assert one.exit_code == 0, one.output
    result = json.loads(one.stdout)
    assert result["total_questions"] == 12 and result["prompt"] == "thinking"
    table = call(
        "compare",
        "--model",
        "nano",
        "--prompt",
        "direct",
        "--prompt",
        "thinking",
        "--format",
        "json",
        *common,
    )
    rows = json.loads(table.stdout)["rows"]
    assert [row["prompt"] for row in rows] == ["direct", "thinking"]
    assert rows[1]["correct_count"] == result["correct_count"] and rows[0]["p_value"] is None
    assert len(list((tmp_path / "runs").iterdir())) == 2  # the evaluation was not made twice
    runs = sorted((tmp_path / "runs").iterdir())
    shown = call("compare", *runs, "--extractors", "--out", tmp_path / "table")
    assert shown.exit_code == 0 and max(map(len, shown.stdout.splitlines())) <= 100
    for text in ("baseline", "3 operands", "tolerant", "of 12"):
        assert text in shown.stdout
    assert set(lines_of_csv(tmp_path / "table" / "per_question.csv")[0][:3]) == {
        "question_id",
        "question",
        "correct_answer",
    }
    source = json.loads((tmp_path / "table" / "results.json").read_text())
    assert set(source["models"][0]) == {"model_type", "accuracy", "correct", "total", "timestamp"}


def lines_of_csv(path):
    import csv

    with Path(path).open() as file:
        return list(csv.reader(file))


def test_errors_are_one_line_and_exit_with_1(tmp_path):
    for arguments in (
        ["eval", "--task", "nothing"],
        ["eval", "--model", "./nowhere"],
        ["eval", "--config", tmp_path / "none.yaml"],
        ["compare", tmp_path / "none"],
        ["grade", "--task", "gsm8k", tmp_path / "none.jsonl"],
    ):
        result = call(*arguments)
        assert result.exit_code == 1 and result.output.startswith("Error: ") and result.output.count("\n") == 1


@pytest.mark.parametrize("words", [["eval", "--out", "x\udcff"], ["report", "x\udcff"], ["data", "show", "x\udcff"]])
def test_words_that_are_not_utf_8_are_refused(words):
    result = call(*words)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert r"Error: 'x\udcff': not UTF-8, as files of a run are; rename it, or choose another" in result.output


def test_options_show_true_defaults_and_lists_are_repeated(tmp_path):
    for command in ("eval", "generate", "sft", "grpo", "ppo", "score", "filter", "reformat", "bench sft"):
        assert "Undefined" not in call(*command.split(), "--help").output
    assert re.search(r"--batch-size.*\[default: 8\]", call("bench", "sft", "--help").output)
    traces = tmp_path / "raw.jsonl"
    call("data", "countdown-traces", "--n", "4", "--out", traces)
    targets = ["--targets", "self_attn.q_proj", "--targets", "mlp.up_proj"]
    result = call("sft", "--data", traces, "--out", tmp_path / "run", "--valid-share", "0", *targets)
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["lora_parameters"]["keys"] == ["self_attn.q_proj", "mlp.up_proj"]


def test_settings_say_where_and_what_is_wrong(tmp_path):
    file = tmp_path / "eval.yaml"
    for content, message in (
        ("modle: nano\n", r"eval.yaml: unknown field 'modle'; did you mean 'model'"),
        ("limit: some\n", r"eval.yaml: limit: must be a whole number, not 'some'"),
        ("- nano\n", r"eval.yaml: expected 'field: value' lines, found list"),
        ("a: [\n", r"eval.yaml:2: not YAML from column 1 on: the end of the file; check indents, brackets"),
        ("a: 1\n\tb: 2\n", r"eval.yaml:2: not YAML from column 1 on: 'b: 2'; check indents"),
        ("a: \x01\n", r"eval.yaml: not YAML: a control character"),
        ("samples: 1.5\n", r"eval.yaml: samples: must be a whole number, not '1.5'"),
        ("weights: 4\n", r"eval.yaml: weights: must be 'quantized' or 'dense', not '4'"),
        ("stop: [a]\nsystem: [a]\n", r"eval.yaml: system: must be a text"),
        ("thinking: perhaps\n", r"eval.yaml: thinking: must be true or false"),
        ("top_p: 0\n", r"eval.yaml: top_p: must be above 0, not '0'"),
        ("template_args: {x: .nan}\n", r"eval.yaml: template_args: {'x': nan} is not JSON; give texts, finite numb"),
        ("template_args: {x: [!!binary aaaa]}\n", r"eval.yaml: template_args: .* is not JSON"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_config(EvalConfig, file, {})
    file.write_text("evals:\n- {model: nano, prmpt: direct}\n")
    with pytest.raises(UserError, match=r"unknown field 'evals.0.prmpt'; did you mean 'prompt'"):
        read_config(CompareConfig, file, {})
    file.write_text("limit: 7\n")
    assert read_config(EvalConfig, file, {"seed": 3}) == EvalConfig(limit=7, seed=3)


STUDY = "name: x\ntasks: [{}]\nmodels: [{model: nano}]\n"


@pytest.mark.parametrize(
    ("kind", "content", "told"),
    [
        (EvalConfig, "limit: yes", "limit: must be a whole number, not true (yes, on); null leaves it out"),
        (EvalConfig, "think_tokens: off", "think_tokens: must be a whole number, not false (no, off); null.*"),
        (EvalConfig, "top_k: no", "top_k: must be a whole number, not false (no, off)"),
        (GRPOConfig, "learning_rate: on", "learning_rate: must be a number, not true (yes, on)"),
        (GRPOConfig, "rewards: {correct: yes}", "rewards: must be a number, not true (yes, on)"),
        (GRPOConfig, "betas: [0.9, on]", "betas: must be a number, not true (yes, on)"),
        (StudyConfig, STUDY + "budgets: [off, 64]", "budgets: must be a whole number, not false (no, off); null.*"),
        (CompareConfig, "tasks: [{rows: on}]", "tasks.0.rows: must be a whole number, not true (yes, on)"),
    ],
)
def test_a_switch_is_no_number(kind, content, told, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=told.replace("(", r"\(").replace(")", r"\)") + "$"):
        read_config(kind, file, {})
    assert EvalConfig(thinking=False, template_args={"a": True}).template_args == {"a": True}


def test_a_required_field_that_is_missing_is_named_with_what_it_is_and_where_to_give_it(tmp_path):
    result = call("sft")
    assert result.output == (
        "Error: data is missing (File of traces, JSON lines; see data/README.md): pass --data, or a configuration that "
        "has it\n"
    )
    file = tmp_path / "mine.yaml"
    for kind, content, message in (
        (SFTConfig, "epochs: 2\n", r"mine.yaml: data is missing \(File of .*README.md\): add 'data: ...' there"),
        (RoundsConfig, "task: countdown\n", r"mine.yaml: name is missing \(Prefix of .*: add 'name: ...' there"),
        (StudyConfig, "name: x\ntasks: [{}]\nmodels: [{bits: 4}]\n", r"mine.yaml: models.0.model is missing \(nano,"),
        (StudyConfig, "name: x\ntasks: []\nmodels: [{model: nano}]\n", "tasks: needs 1 or more, not"),
        (SFTConfig, "data: x\nbetas: [0.9]\n", "mine.yaml: betas.1 is missing: the list is too short"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_config(kind, file, {})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("rounds", "CONFIG is missing: a YAML file, or .* shipped one .*: mlx-traces rounds rounds_countdown_nano"),
        ("study", "CONFIG is missing: a YAML file, or .* shipped one .*: mlx-traces study study_countdown_nano"),
        ("score", "IN is missing: mlx-traces score IN --out PATH; --help says more"),
        ("filter x.jsonl", "--out is missing: mlx-traces filter IN --out PATH; --help says more"),
        ("push runs/a", "USER/NAME is missing: mlx-traces push ADAPTER USER/NAME; --help says more"),
        ("data import", "FILE is missing: mlx-traces data import FILE --format TEXT; --help says more"),
    ],
)
def test_what_a_command_lacks_is_said_in_one_line_with_how_it_is_called(words, told):
    result = CliRunner().invoke(main, words.split(), prog_name="mlx-traces")
    assert result.exit_code == 1 and re.fullmatch(f"Error: {told}\n", result.output)


def test_every_shipped_configuration_is_valid_and_starts_with_its_command():
    kinds = {
        "compare": CompareConfig,
        "eval": EvalConfig,
        "grpo": GRPOConfig,
        "nano build": NanoConfig,
        "ppo": PPOConfig,
        "rounds": RoundsConfig,
        "sft": SFTConfig,
        "study": StudyConfig,
    }
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert files
    for file in files:
        command = file.read_text().partition("\n")[0]
        assert f"configs/{file.name}" in command, file
        kind = next(kind for name, kind in kinds.items() if command.startswith(f"# mlx-traces {name} "))
        read_config(kind, file, {})


def test_configurations_are_listed_and_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = call("configs")
    assert max(map(len, listed.stdout.splitlines()[1:])) <= 80
    for file in (ROOT / "configs").glob("*.yaml"):
        assert f"\n{file.stem}  (mlx-traces " in listed.stdout
    assert (
        "\nnano_build_countdown  (mlx-traces nano build)\n  The embedded model, as it comes with the package.\n"
        in listed.stdout
    )
    for name in ("grpo_countdown_nano", "grpo_countdown_nano.yaml", "configs/grpo_countdown_nano.yaml"):
        assert find_config(name) == ROOT / "configs" / "grpo_countdown_nano.yaml"
    for home in ("configs", "."):  # the nearer one wins
        (tmp_path / home).mkdir(exist_ok=True)
        (tmp_path / home / "grpo_countdown_nano.yaml").write_text("num_steps: some\n")
        for name in ("grpo_countdown_nano", "grpo_countdown_nano.yaml"):
            assert find_config(name) == Path(home, "grpo_countdown_nano.yaml")
    assert "grpo_countdown_nano.yaml: num_steps: must be a whole number" in call("grpo", "grpo_countdown_nano").output
    for name in ("grpo_countdown_nanu", "./x/grpo_countdown_nano", "\0", "x" * 5_000):
        with pytest.raises(UserError, match="no such configuration file"):
            find_config(name)
    assert "did you mean 'grpo_countdown_nano'" in call("grpo", "grpo_countdown_nanu").output


def test_every_command_takes_a_configuration_by_name(tmp_path, monkeypatch):
    def commands(group, words=()):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, (*words, name))
            else:
                yield (*words, name), command

    monkeypatch.chdir(tmp_path)
    seen = 0
    for words, command in commands(main):
        for param in command.params:
            if param.name == "config_file":
                seen += 1
                assert param.type_cast_value(None, "nano_build_countdown") == str(
                    ROOT / "configs" / "nano_build_countdown.yaml"
                ), words
    assert seen >= 13
    shown = call("study", "study_countdown_nano", "--dry-run")  # whose adapters are those shipped
    assert shown.exit_code == 0 and "nano-epoch2" in shown.stdout


def test_help_says_where_null_can_be_given():
    assert "null in a YAML file: none." in " ".join(call("ppo", "--help").output.split())


def test_the_package_is_run_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_traces", "--version"], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.startswith("mlx-traces, version ")


def readmes():
    """Every README that is written by hand: not the model cards of adapters."""
    return sorted(path for path in ROOT.rglob("README.md") if path.parent.parent != ROOT / "adapters")


def readme_commands():
    pages = "\n".join(path.read_text() for path in readmes())
    text = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", pages, re.DOTALL)).replace("\\\n", " ")
    for line in text.splitlines():
        for part in re.split(r"&&|\|", line.partition(" #")[0]):
            words = shlex.split(part)
            if words[:1] == ["mlx-traces"]:
                yield words[1:]


@pytest.mark.parametrize("words", sorted(set(map(tuple, readme_commands()))), ids=" ".join)
def test_the_readme_names_commands_and_options_that_exist(words):
    command, rest = main, list(words)
    while rest and hasattr(command, "commands") and rest[0] in command.commands:
        command = command.commands[rest.pop(0)]
    assert command is not main or rest == ["--help"]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{word} in {words}"


def test_no_command_of_a_document_has_a_comment():
    """At its prompt zsh, a Mac's default shell, takes a comment for arguments."""
    files = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in set(files.stdout.splitlines()):
        for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE):
            wrong = [line for line in block.splitlines() if " #" in line or line.startswith("#")]
            assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("readme", ["README.md", "mlx_traces/evaluation/README.md", "mlx_traces/rl/README.md"])
def test_the_readmes_python_example_runs_also_again(readme, tmp_path, monkeypatch):
    block = re.search(r"```python\n(import mlx_traces\n.*?)```", (ROOT / readme).read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        exec(compile(block, "README.md", "exec"), {})
    assert list((tmp_path / "runs").iterdir())


def test_settings_that_change_nothing_are_noted(tmp_path):
    common = ["--limit", 2, "--max-tokens", 8, "--runs-dir", tmp_path / "runs"]
    plain = call("eval", *common)
    assert plain.exit_code == 0 and "note:" not in plain.stderr
    again = call("eval", *common, "--top-p", 0.9, "--top-k", 5, "--min-p", 0.1, "--shots", 3)
    assert again.stderr.startswith(
        "note: top_p 0.9 changes nothing at temperature 0 (greedy)\n"
        "note: top_k 5 changes nothing at temperature 0 (greedy)\n"
        "note: min_p 0.1 changes nothing at temperature 0 (greedy)\n"
        "note: shots 3 changes nothing for a prompt without examples\n"
    )
    assert again.exit_code == 1 and "exists; pass --resume to continue it" in again.stderr  # it is the same run
    table = call("compare", "--model", "nano", *common, "--top-p", 0.9, "--extractors", "--format", "csv")
    assert table.exit_code == 0 and len(list((tmp_path / "runs").iterdir())) == 1
    assert table.stderr.count("note: top_p") == 1 and "--extractors changes nothing in --format csv" in table.stderr
    (run,) = (tmp_path / "runs").iterdir()
    about = json.loads((run / "run.json").read_text())
    about["identity"] |= {"top_p": 0.9, "shots": 3}  # as it was stored once
    (run / "run.json").write_text(json.dumps(about))
    (run / "result.json").unlink()
    for given in ([], ["--top-p", 0.9], ["--top-k", 3]):
        assert call("eval", *common, "--resume", *given).exit_code == 0
    sampled = call("eval", *common, "--temperature", 1, "--top-p", 0.9)
    assert sampled.exit_code == 0 and "note:" not in sampled.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (build(EvalConfig, {"task": "gsm8k", "prompt": "fewshot", "shots": 3}), []),
        (build(EvalConfig, {"task": "gsm8k", "prompt": "direct", "shots": 3}), ["shots 3"]),
        (build(EvalConfig, {"top_p": 1.0, "shots": 5}), []),
        (build(EvalConfig, {"stop_in_thoughts": True}), ["stop_in_thoughts True changes nothing for a prompt without"]),
        (build(EvalConfig, {"stop_in_thoughts": True, "prompt": "mine.yaml"}), []),
        (build(EvalConfig, {"task": "gsm8k", "prompt": "fewshot-chat", "stop_in_thoughts": True}), []),
        (
            build(EvalConfig, {"think_then": "So", "think_more": "Hm"}),
            ["think_more Hm", "think_then So changes nothing"],
        ),
        (build(EvalConfig, {"think_then": "So", "think_tokens": 0}), []),
        (build(ScoreConfig, {"thinking": True}), ["thinking True changes nothing without model"]),
        (build(ScoreConfig, {"thinking": True, "model": "nano"}), []),
        (build(GRPOConfig, {"shots": 3, "overlong_tokens": 4, "importance_cap": 3}), ["shots", "overl", "importance_"]),
        (build(GRPOConfig, {"patience": 3, "probe_samples": 2}), ["patience 3", "probe_samples 2"]),
        (build(GRPOConfig, {"evaluate": {}, "patience": 3, "pass_rate_low": 0.1, "probe_samples": 2}), []),
        (
            build(SFTConfig, {"data": "x", "kind": "full", "rank": 4, "valid": "y", "valid_share": 0.1}),
            ["rank", "valid"],
        ),
        (
            build(SFTConfig, {"data": "x", "valid_share": 0, "patience": 3}),
            ["patience 3 changes nothing without a"],
        ),
        (build(SFTConfig, {"data": "x", "valid_share": 0, "valid": "y", "patience": 3}), ["valid_share 0.0 "]),
        (
            build(SFTConfig, {"data": "x", "kind": "full", "dropout": 0.1, "targets": ["self_attn.q_proj"]}),
            ["dropout 0.1 changes nothing where all", "targets ['self_attn.q_proj'] changes nothing where all"],
        ),
        (build(SFTConfig, {"data": "x", "dropout": 0.1, "targets": ["self_attn.q_proj"]}), []),
        (build(GRPOConfig, {"dropout": 0.1}), ["dropout 0.1 changes nothing in grpo and ppo, where"]),
        (build(PPOConfig, {"dropout": 0.1, "kind": "full"}), ["dropout 0.1 changes nothing where all"]),
        (
            build(GRPOConfig, {"loss": "reinforce", "clip_eps": 0.1, "clip_eps_high": 0.3}),
            ["clip_eps 0.1 changes nothing for loss reinforce", "clip_eps_high 0.3"],
        ),
        (
            build(GRPOConfig, {"loss": "cispo", "clip_eps": 0.1, "clip_eps_high": 0.3}),
            ["clip_eps 0.1 changes nothing for loss cispo beside"],
        ),
        (build(GRPOConfig, {"loss": "cispo", "clip_eps": 0.1}), []),
        (build(GRPOConfig, {"clip_eps": 0.1, "clip_eps_high": 0.3}), []),
        (build(GRPOConfig, {"tags": "r1"}), ["tags r1 changes nothing without a reward that reads them"]),
        (build(GRPOConfig, {"tags": "r1", "rewards": {"correct": 1, "format": 0.1}}), []),
        (build(FilterConfig, {"prefer": "best", "bins": 3}), ["prefer best", "bins 3"]),
        (
            build(FilterConfig, {"eval_task": "gsm8k", "eval_seed": 3, "seed": 4}),
            ["eval_seed 3", "seed 4 changes noth"],
        ),
        (build(FilterConfig, {"eval_task": "gsm8k", "eval_seed": 3, "eval_limit": 9, "balance": 1, "seed": 4}), []),
        (build(FilterConfig, {"per_problem": 1, "prefer": "random", "seed": 4}), []),
        (build(FilterConfig, {"balance": 1, "difficulty": "stratum", "bins": 3}), ["bins 3 changes nothing where dif"]),
        (build(ScoreConfig, {"rows": 3, "device": "cpu"}), ["rows 3 changes nothing without judge", "device cpu"]),
        (build(ScoreConfig, {"rows": 3, "device": "cpu", "judge": "nano"}), []),
        (build(ReformatConfig, {"trust_remote_code": True}), ["trust_remote_code True changes nothing without model"]),
        (build(ReformatConfig, {"max_tokens": 7}), ["max_tokens 7 changes nothing without model"]),
        (build(CompareConfig, {"block": 9}), ["block 9 changes nothing without stop_when_decided"]),
        (build(CompareConfig, {"block": 9, "stop_when_decided": True}), []),
        (build(CompareConfig, {"evals": [{"top_p": 0.5}, {"top_p": 0.5, "temperature": 1}]}), ["top_p 0.5"]),
        (build(RoundsConfig, {"name": "x", "score": {"judge_max_tokens": 3}}), ["judge_max_tokens 3"]),
        (build(RoundsConfig, {"name": "x", "epoch1": {"kind": "full", "rank": 4}}), ["rank 4 changes nothing"]),
    ],
)
def test_which_settings_change_nothing(config, told):
    lines = list(unused(config))
    assert len(lines) == len(told) and all(line.startswith(start) for line, start in zip(lines, told, strict=True))


@pytest.mark.parametrize("kind", [SFTConfig, GRPOConfig, PPOConfig, NanoConfig])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", -1, "seed: must be at least 0, not '-1'"),
        ("betas", [0.9, 1.0], "betas.1: must be below 1, not '1.0'"),
        ("rank", 10**10, "rank: must be at most 65536, not '10000000000'"),
        ("logits_mb", 1e305, "logits_mb: must be at most 524288, not '1e[+]305'"),
    ],
)
def test_training_settings_out_of_range(kind, name, value, said):
    if name in kind.model_fields:
        with pytest.raises(UserError, match=f"^{said}$"):
            build(kind, {"data": "x", name: value} if kind is SFTConfig else {name: value})


@pytest.mark.parametrize("given", ["eval_limit", "eval_split"])
def test_a_filter_for_no_evaluation_is_refused(tmp_path, given):
    flag, value = f"--{given.replace('_', '-')}", {"eval_limit": 9, "eval_split": "valid"}[given]
    result = call("filter", tmp_path / "raw.jsonl", "--out", tmp_path / "kept.jsonl", flag, value)
    told = f"{given} {value} changes nothing without eval_task; name its task with --eval-task, or leave {given} out\n"
    assert result.exit_code == 1 and result.output == f"Error: {told}"
    with pytest.raises(UserError, match="name its task with --eval-task"):
        list(unused(build(RoundsConfig, {"name": "x", "filter": {given: value}})))


def test_shipped_configurations_set_nothing_that_changes_nothing():
    for kind, pattern in (
        (GRPOConfig, "grpo_*"),
        (RoundsConfig, "*rounds*"),
        (SFTConfig, "sft_*"),
        (PPOConfig, "ppo_*"),
    ):
        for file in (ROOT / "configs").glob(f"{pattern}.yaml"):
            assert not list(unused(read_config(kind, file, {}))), file


@pytest.mark.parametrize("command", ["eval", "generate", "sft", "grpo", "ppo"])
def test_help_is_in_sections_with_every_option_once(command):
    text = call(command, "--help").output
    titles = re.findall(r"^([A-Z][a-z ]+):$", text, re.MULTILINE)
    every = ["Model", "Task and data", "Sampling", "Training", "Output", "More"]
    assert titles == [title for title in every if title in titles] and {"Model", "Output", "More"} <= set(titles)
    assert ("Training" in titles) == (command in ("sft", "grpo", "ppo")) and text.index("--model") < text.index(
        "--seed"
    )
    listed = re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.MULTILINE)
    options = [param.opts[0] for param in main.commands[command].params if param.param_type_name == "option"]
    assert sorted(listed) == sorted([*options, "--help"])


def test_a_pair_of_numbers_is_given_as_the_setting_has_it():
    @click.command()
    @settings_options(NanoConfig)
    def command(settings):
        click.echo(json.dumps(settings))

    result = CliRunner().invoke(command, ["--betas", "0.9", "0.98", "--operands", "3", "4"])
    assert result.exit_code == 0 and json.loads(result.output) == {"betas": [0.9, 0.98], "operands": [3, 4]}


def test_variables_of_the_template_are_given_by_name():
    @click.command()
    @settings_options(EvalConfig)
    def command(settings):
        click.echo(json.dumps(settings))

    given = ["--template-arg", "effort=high", "--template-arg", "budget=512", "--template-arg", "tools=true"]
    result = CliRunner().invoke(command, [*given, "--date", "2025-03-01"])
    assert json.loads(result.output) == {
        "template_args": {"effort": "high", "budget": 512, "tools": True},
        "date": "2025-03-01",
    }
    assert json.loads(CliRunner().invoke(command, []).output) == {}
    assert "give NAME=VALUE" in str(CliRunner().invoke(command, ["--template-arg", "effort"]).exception)
    for value, shown in (("NaN", "nan"), ('"\\ud800"', "'\\ud800'")):
        result = call("generate", "--template-arg", f"x={value}")
        assert result.exit_code == 1 and f"template_args: {{'x': {shown}}} is not JSON" in result.output


def test_a_date_among_the_variables_of_the_template_becomes_text(tmp_path):
    file = tmp_path / "eval.yaml"
    file.write_text("template_args: {day: 2026-01-31, days: [2026-01-31 10:00:00], n: {a: 1.5, b: null}}\n")
    given = {"day": "2026-01-31", "days": ["2026-01-31T10:00:00"], "n": {"a": 1.5, "b": None}}
    assert read_config(EvalConfig, file, {}).template_args == given
