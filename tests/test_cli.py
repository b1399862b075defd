"""The command line as a user types it, and the README's and the configurations' commands against it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_traces.cli import main
from mlx_traces.cli.options import settings_options
from mlx_traces.config import (
    CompareConfig,
    EvalConfig,
    GRPOConfig,
    NanoConfig,
    PPOConfig,
    RoundsConfig,
    SFTConfig,
    StudyConfig,
    read_config,
)
from mlx_traces.errors import UserError

ROOT = Path(__file__).parent.parent


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="mlx-traces")


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


@pytest.mark.parametrize("module", ["config", "tasks.gsm8k", "tasks.countdown", "tasks.qa", "stats", "tables", "runs"])
def test_these_rooms_never_load_mlx(module):
    code = f"import sys, mlx_traces.{module}\nassert not any(name.startswith('mlx.') for name in sys.modules)"
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
    assert call("grade", "--task", "gsm8k", "--out", tmp_path / "new" / "out.jsonl", file).exit_code == 0


def test_messages_stay_on_one_clean_line(tmp_path):
    result = call("eval", "--model", "./no\x1b[31m\npe")
    assert result.exit_code == 1 and result.output.count("\n") == 1 and "\x1b" not in result.output


def test_version_and_interrupt(monkeypatch):
    from mlx_traces import evaluation

    assert call("--version").exit_code == 0
    monkeypatch.setattr(evaluation, "evaluate", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
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
        ("limit: some\n", r"eval.yaml: limit: .* not 'some'"),
        ("- nano\n", r"eval.yaml: expected 'field: value' lines, found list"),
        ("a: [\n", r"eval.yaml: not a YAML file"),
        ("top_p: 0\n", r"eval.yaml: top_p: input should be greater than 0"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_config(EvalConfig, file, {})
    file.write_text("evals:\n- {model: nano, prmpt: direct}\n")
    with pytest.raises(UserError, match=r"unknown field 'evals.0.prmpt'; did you mean 'prompt'"):
        read_config(CompareConfig, file, {})
    file.write_text("limit: 7\n")
    assert read_config(EvalConfig, file, {"seed": 3}) == EvalConfig(limit=7, seed=3)


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


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    for line in text.splitlines():
        for part in re.split(r"&&|\|", line.partition(" #")[0]):
            words = shlex.split(part)
            if words[:1] == ["mlx-traces"]:
                yield words[1:]


@pytest.mark.parametrize("words", list(readme_commands()), ids=" ".join)
def test_the_readme_names_commands_and_options_that_exist(words):
    command, rest = main, list(words)
    while rest and hasattr(command, "commands") and rest[0] in command.commands:
        command = command.commands[rest.pop(0)]
    assert command is not main or rest == ["--help"]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{word} in {words}"


def test_the_readmes_python_example_runs(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert list((tmp_path / "runs").iterdir())


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
