"""The benches of a whole machine: steps that end, hang or fail, the file that they leave, and how it is shown."""

import io
import json
import os
import re
import resource
import shlex
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mlx_traces.cli import main
from mlx_traces.diagnostics import bench_all, bench_file
from mlx_traces.diagnostics.bench_all import Planned, plan, run
from mlx_traces.diagnostics.bench_file import BenchFile, Condition, Machine, Step, read
from mlx_traces.diagnostics.bench_generate import GenerateRow
from mlx_traces.diagnostics.bench_rl import GRPORow
from mlx_traces.diagnostics.bench_sft import SFTRow
from mlx_traces.errors import UserError
from mlx_traces.report import tables

ROOT = Path(__file__).parents[2]
SPEED = {"completion_tokens": 9, "seconds": 1.0, "prompt_tokens_per_second": 5.0, "ms_per_step": 2.0}
SPEED |= {"first_token_seconds": 0.1, "occupancy": 1.0, "peak_memory_gb": 1.0, "warmup_seconds": 1.0}


def generated(rows, speed, peer=None):
    more = {"peer": "mlx-lm", "peer_tokens_per_second": peer, "ratio": speed / peer} if peer else {}
    return asdict(GenerateRow(rows=rows, prompts=rows, tokens_per_second=speed, **SPEED, **more))


def step(kind, *rows, name="", status="done", arguments=("--weights", "dense"), **more):
    return Step(name=name or kind, kind=kind, arguments=[*arguments], status=status, rows=[*rows], **more)


def file(*steps, device="Apple M4 Max (Metal)", backend="metal", **more):
    machine = Machine(device=device, backend=backend, memory_gb=64.0, cores=16, platform="Darwin arm64")
    about = {"model": "nano", "quick": False, "started": "2026-01-01T00:00:00+00:00", "versions": {"mlx": "0.32.4"}}
    return BenchFile(machine=machine, before=Condition(), steps=[*steps], **{**about, **more})


def shown(*files):
    with redirect_stdout(io.StringIO()) as text:
        bench_file.show(files)
    return text.getvalue()


# ------------------------------------------------------------------------------------------------ steps


def parses(arguments):
    """Whether a command exists and takes these options; its help ends it before it does anything."""
    return CliRunner().invoke(main, [*arguments, "--help"]).exit_code == 0


@pytest.mark.parametrize("backend", ["metal", "cuda", "cpu"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_step_is_a_command_and_all_fit_into_the_time(backend, quick, monkeypatch):
    monkeypatch.setattr(bench_all, "find_spec", lambda name: True)
    steps = plan("nano", backend, quick) + plan("some/model", backend, quick, "with a space.jsonl")
    assert all(parses(one.arguments) for one in steps)
    assert not parses(["bench", "generate", "--no-such-option"])
    names = [one.name for one in plan("some/model", backend, quick)]
    assert len({*names}) == len(names) and names[0] == "doctor" and {"gsm8k", "countdown", "ring", "graph"} <= {*names}
    assert ("32 rows, quantized" in names) == (backend != "cpu") and ("256 rows, dense" in names) == (not quick)
    assert ("grpo, mlx-lm-lora" in names) == (not quick)
    dense = next(one for one in steps if one.name == "32 rows, dense")
    assert ("bfloat16" in dense.arguments) == (backend != "cpu")  # 16 bits; a CPU's are float32
    (math,) = [one for one in steps if one.name == "gsm8k"]
    assert math.arguments[-2:] == ("--data", "with a space.jsonl")


@pytest.fixture
def command(monkeypatch):
    """Let steps run a Python program, which has their arguments, instead of ``mlx-traces``."""

    def use(program):
        monkeypatch.setattr(bench_all, "COMMAND", program)

    monkeypatch.setattr(bench_all, "GRACE", 0.5)
    return use


DOCTOR = Planned("doctor", "doctor", ("doctor", "--json"), 30)
LINE = {"what": "python", "value": "3.12", "fix": None, "failed": False}


def test_a_step_ends_with_its_rows_its_time_and_its_memory(command, tmp_path):
    command(f"import json; held = bytearray(80_000_000); print(json.dumps([{LINE!r}]))")
    found = run(DOCTOR, 30)
    assert (found.status, found.rows, found.arguments) == ("done", [LINE], ["doctor", "--json"])
    command(f"import json; print(json.dumps([{LINE | {'value': f'7 GB free in {tmp_path}'}!r}]))")
    assert run(DOCTOR, 30).rows[0]["value"] == f"7 GB free in {tmp_path.name}"
    (tmp_path / "runs").mkdir()
    planned = Planned("sft", "sft", ("bench", "sft", "--data", str(tmp_path / "runs")), 30)
    assert run(planned, 0).arguments == ["bench", "sft", "--data", "runs"]  # others read the file
    # On Linux a process's peak is at least the memory of the process that started it, and other tests ran in this one.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    assert found.found[0].what == "python" and 0 < found.seconds < 30 and 0.08 < found.memory_gb <= max(2, own)


def test_what_hangs_is_cut_with_all_that_it_started(command, tmp_path):
    mark = tmp_path / "pid"
    command(
        "import signal, subprocess, sys, pathlib; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(mark)!r}).write_text(str(child.pid)); child.wait()"
    )
    began = time.monotonic()
    found = run(DOCTOR, 2)
    assert found.status == "cut" and "after 2 s" in found.message and time.monotonic() - began < 20
    assert ended(int(mark.read_text()))


def ended(pid):
    """Whether a process ends within five seconds; one that does not is killed."""
    stat = Path(f"/proc/{pid}/stat")  # on Linux: its state, Z for one that has ended and whose parent has not asked
    for _ in range(100):  # the kernel takes a moment
        try:
            os.kill(pid, 0)
            if stat.exists() and stat.read_text().split()[2] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    os.kill(pid, 9)
    return False


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
def test_a_step_that_has_ended_need_not_take_a_signal(command, monkeypatch, error):
    def refused(*_):
        raise error

    command(f"import json; print(json.dumps([{LINE!r}]))")
    monkeypatch.setattr(os, "killpg", refused)
    assert run(DOCTOR, 30).status == "done"


def test_what_fails_says_why(command):
    for program, said in (
        ("import sys; print('once'); sys.exit('no room for \\x1b[31mthis')", "no room for"),
        ("print('no JSON')", "ended with 0"),
        ("print('[{\"other\": 1}]')", "ended with 0"),  # no row of its kind
        ("print('3')", "ended with 0"),
    ):
        command(program)
        found = run(DOCTOR, 30)
        assert found.status == "failed" and said in found.message and "\x1b" not in found.message
    assert run(DOCTOR, 0.5).status == "skipped"


def test_a_cut_step_costs_no_other_and_the_file_is_whole_after_each(command, monkeypatch, tmp_path):
    command(
        "import json, sys, time\n"
        "if 'hang' in sys.argv: time.sleep(60)\n"
        f"print(json.dumps([{LINE!r}]) if 'fail' not in sys.argv else 'no')"
    )
    steps = [
        Planned("a", "doctor", ("hang",), 1.5),
        Planned("b", "doctor", (), 30),
        Planned("c", "doctor", (), 30, unless="b"),  # needless
        Planned("d", "doctor", ("fail",), 30),
        Planned("e", "doctor", (), 30, unless="d"),
    ]
    monkeypatch.setattr(bench_all, "plan", lambda *_: steps)
    seen, out = [], tmp_path / "bench.json"
    made = bench_all.bench_all(out, progress=lambda line: seen.append((line, len(read(out).steps))))
    assert [(one.name, one.status) for one in made.steps] == [
        ("a", "cut"),
        ("b", "done"),
        ("d", "failed"),
        ("e", "done"),
    ]
    assert read(out) == made and made.after is not None and made.model == "nano" and made.machine.backend == "cpu"
    begun = [count for line, count in seen if "(at most" in line]
    assert begun == [0, 1, 2, 3]  # what is done was there when the next began
    swap = iter((0.0, *[2.0] * 9))
    monkeypatch.setattr(bench_all, "swap_gb", lambda said: next(swap))
    late = bench_all.bench_all(out, minutes=0)
    assert "swap grew from 0.0 to 2.0 GB" in read(out).notes[-1]
    assert {one.status for one in late.steps} == {"skipped"}
    with pytest.raises(UserError, match="cannot be written"):
        bench_all.bench_all(tmp_path / "none" / "bench.json")


def test_a_step_that_is_interrupted_is_ended(command, monkeypatch, tmp_path):
    mark = tmp_path / "pid"
    command(f"import os, time, pathlib; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(60)")

    def interrupted(*_):
        until = time.monotonic() + 20
        while not (mark.exists() and mark.read_text()):
            assert time.monotonic() < until
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_all, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(DOCTOR, 30)
    assert ended(int(mark.read_text()))


# ------------------------------------------------------------------------------------------------ the machine


def test_tools_are_asked_in_english(monkeypatch):
    """A German Mac says `used = 1024,00M` otherwise."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setattr(bench_all, "TOOLS", (("sh", "-c", "echo $LC_ALL"),))
    assert bench_all.condition().said["sh -c echo $LC_ALL"] == "C\n"


def test_power_and_swap_are_read_from_what_the_tools_say():
    mac = {"pmset -g": "Currently in use:\n lowpowermode         1\n sleep  1", "pmset -g batt": "from 'Battery Power'"}
    mac["sysctl vm.swapusage"] = "vm.swapusage: total = 2048.00M  used = 1024.00M  free = 1024.00M  (encrypted)"
    assert bench_all.low_power(mac) is True and abs(bench_all.swap_gb(mac) - 1.073741824) < 1e-9
    linux = {"/proc/meminfo": "MemTotal: 8 kB\nSwapTotal: 3000000 kB\nSwapFree:  2000000 kB"}
    assert bench_all.low_power(linux) is None and bench_all.swap_gb(linux) == 1.024
    for line, low in (
        ("lowpowermode 0", False),
        ("powermode     1", True),
        ("powermode 2", False),
        ("mode 1", None),
    ):
        assert bench_all.low_power({"pmset -g": f" {line}"}) is low
    assert bench_all.swap_gb({}) is None and bench_all.swap_gb({"sysctl vm.swapusage": "used"}) is None
    told = " ".join(bench_all.warnings(Condition(load=6.0, low_power=True, said=mac), 8))
    assert "low-power mode is on" in told and "on battery" in told and "a load of 6.0 on 8 cores" in told
    assert not bench_all.warnings(Condition(load=0.5), 2)
    assert isinstance(bench_all.condition(), Condition)  # with the tools of this machine, whatever they are


# ------------------------------------------------------------------------------------------------ the file


GRPO = GRPORow(8, 16, 128, 1, 4.5, 2.2, 2.3, 9000.0, 2000.0, 1.0, 12.5, 13.0, 5.0, kl_sampler=0.001)
SFT = SFTRow(64, 8, 8, 9000, 4000, 1.0, 10560.0, 0.1, 3.0, 0.1, 2.0)


def test_the_table_has_a_line_for_each_machine_in_80_columns():
    mac = file(
        step("generate", generated(256, 4000.0), arguments=["--weights", "quantized"]),
        step("generate", generated(32, 2645.0, 1322.5), arguments=["--weights", "quantized"]),
        step("generate", generated(32, 2000.0)),
        step("grpo", asdict(GRPO)),
        step("sft", asdict(SFT)),
        step("ring", name="ring", status="cut", message="after 60 s"),
        notes=["low-power mode is on"],
    )
    cpu = file(step("generate", generated(32, 50.0)), device="\x1b[31mAMD " + 9 * "EPYC ", backend="cpu")
    headings, rows = bench_file.cells([mac, cpu])
    assert headings[1:] == ["32 rows", "256 rows", "GRPO step", "SFT", "GB", "right"]
    assert rows[0][1:] == ["2,645\n2.0 x", "4,000", "4.5 s\n2.2 + 2.3", "10,560", "12.5", "–"]
    assert rows[1][:2] == ["Apple M4 Max (Metal), nano, dense", "2,000"] and rows[2][1:] == ["50", *["–"] * 5]
    text = shown(mac, cpu)
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    for part in ("Apple M4 Max", "ring cut (after 60 s)", "low-power mode is on", "32 to 256 rows", "2,645 to 4,000"):
        assert part in text
    assert "from a Mac" not in text and "None of these files is from a Mac." in shown(cpu)


def test_files_are_checked_as_they_are_read(tmp_path):
    path = tmp_path / "bench.json"
    good = file(step("generate", generated(32, 50.0))).model_dump(mode="json")
    path.write_text(json.dumps(good))
    assert read(path).decoded("dense")[0].rows == 32
    for change, said in (
        ({"bench": 2}, "bench"),
        ({"machine": {"device": "a"}}, "machine.backend"),
        ({"steps": [{**good["steps"][0], "rows": [{"rows": "many"}]}]}, "steps.0"),
        ({"steps": [{**good["steps"][0], "kind": "other"}]}, "steps.0.kind"),
        ({"steps": [{**good["steps"][0], "rows": []}]}, "steps.0"),
        ({"steps": good["steps"] * 101}, "steps"),
        ({"steps": None}, "steps"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=re.escape(f"{path}: not a file of bench all ({said}")) as error:
            read(path)
        assert "\n" not in str(error.value)
    for text in ("{", "[]", "", json.dumps(good).replace("50.0", "NaN"), json.dumps(good).replace("50.0", "1e999")):
        path.write_text(text)
        with pytest.raises(UserError):
            read(path)


def test_bench_show_prints_draws_and_refuses(tmp_path):
    path, png = tmp_path / "bench.json", tmp_path / "curves.png"
    file(step("generate", generated(8, 20.0, 10.0)), step("generate", generated(32, 50.0, 25.0))).write(path)
    result = CliRunner().invoke(main, ["bench", "show", str(path), str(path), "--png", str(png)])
    assert result.exit_code == 0 and result.output.count(" Apple M4 Max (Metal), nano,") == 2, result.output
    assert "mlx-lm, Apple M4 Max" in result.output and png.read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(main, ["bench", "show", str(path), "--markdown"])
    assert result.output.startswith("| machine, model, weights | 32 rows |") and "| 50 2.0 x |" in result.output
    result = CliRunner().invoke(main, ["bench", "show", str(tmp_path / "none.json")])
    assert result.exit_code == 1 and "none.json" in result.output


def test_ctrl_c_says_what_is_kept(tmp_path, monkeypatch):
    from mlx_traces.diagnostics import bench_all

    monkeypatch.setattr(bench_all, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = CliRunner().invoke(main, ["bench", "all", "--quick", "--out", str(tmp_path / "b.json")])
    assert result.exit_code == 130 and "b.json has the benches that ended" in result.stderr


def test_the_readmes_table_of_machines_is_made_of_files():
    folder = ROOT / "mlx_traces" / "diagnostics"
    files = [read(path) for path in sorted(folder.glob("machines/*.json"))]
    text = (folder / "README.md").read_text()
    table = re.search(r"<!-- machines -->\n(.*?)<!-- machines end -->", text, re.DOTALL)[1]
    made = tables.cells_to_markdown(bench_file.cells(files)) if files else "No file is there yet.\n"
    assert table == made, "mlx-traces bench show --markdown mlx_traces/diagnostics/machines/*.json"
    from_mac = any(one.machine.backend == "metal" for one in files)
    assert ("None of these files is from a Mac yet." in text) == (not from_mac)


# ------------------------------------------------------------------------------------------------ the workflow


def test_the_workflow_runs_the_readmes_commands_and_commands_that_exist():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    lines = [part["run"] for job in jobs.values() for part in job["steps"] if "run" in part]
    commands = [shlex.split(command) for line in lines for command in line.split("&&")]
    ours = [words[1:] for words in commands if words[0] == "mlx-traces"]
    assert ["bench", "all", "--quick", "--out", "bench.json"] in ours and all(map(parses, ours))
    readme = (ROOT / "README.md").read_text()
    assert all(line in readme for line in lines if line.startswith("pip install"))
    assert {system.split("-")[0] for job in jobs.values() for system in job["strategy"]["matrix"]["os"]} == {
        "macos",
        "ubuntu",
    }
    kept = [part["with"]["path"] for part in jobs["bench"]["steps"] if "upload-artifact" in part.get("uses", "")]
    assert "bench.json" in kept[0]
