r"""Equality of mathematical answers: rewritings of gold answers are equal, near misses are not, hostile ones end.

``MLX_TRACES_MATH500`` names MATH-500's test.jsonl; its 500 gold answers then go through the same checks.
``MLX_TRACES_FUZZED`` says how many made-up answers are compared, 60 without it.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlx_traces.errors import UserError
from mlx_traces.tasks import equality
from mlx_traces.tasks.equality import compare, normal, number

pytestmark = pytest.mark.skipif(not find_spec("math_verify"), reason="the extra `math` is not installed")
GOLDS = [  # of every form that MATH's answers have
    *("7", "-12", "0", "4096", "0.25", ".0007", "12,\\!500", "\\$14.50", "35\\%", "60^\\circ", "2\\frac{1}{3}"),
    *("\\frac{7}{9}", "-\\frac{3}{8}", "\\frac59", "\\frac{45}2\\text{ degrees}", "9.5 \\text{ cm}^2"),
    *("\\frac{2}{1005}", "2\\sqrt{7}", "\\frac{\\sqrt{3}}{2}", "5+3\\sqrt{2}", "12\\pi", "\\frac{\\pi}{4}", "3-4i"),
    *("2 \\pm \\sqrt{5}", "x^2+3x-5", "(a+2)(b-7)", "4y^3", "y = 3x - 2", "x=9", "a - b", "x + 2y - 3z = 0", "\\tan x"),
    *("3,-8", "1, 4, 6", "\\{2,3,5\\}", "(4,-9)", "\\left( 2, \\frac{\\pi}{3} \\right)", "(1,2,-3)", "(2,7]"),
    *("[0,\\infty)", "(-\\infty,1) \\cup (4,\\infty)", "x \\in [-3,5]", "x > 4", "35_7", "1021_{3}"),
    *("\\begin{pmatrix} 2 \\\\ -5 \\end{pmatrix}", "\\begin{pmatrix} 1/2 & 0 \\\\ 0 & 3 \\end{pmatrix}"),
    *("\\text{Anna}", "\\text{(D)}", "\\text{odd}"),
]


def all_golds():
    """Return the answers above, or MATH-500's too."""
    if not (file := os.environ.get("MLX_TRACES_MATH500")):
        return GOLDS
    return [*GOLDS, *dict.fromkeys(json.loads(line)["answer"] for line in Path(file).read_text().splitlines())]


# ---------------------------------------------------------------------------------------------- rewritings


def fraction(gold):
    """Return the value of an integer, a decimal or a fraction, read without the code under test; else None."""
    plain = re.sub(r"\\frac\{?(\d+)\}?\{?(\d+)\}?$", r"\1/\2", gold) if re.match(r"-?\\frac", gold) else gold
    return Fraction(plain) if re.fullmatch(r"-?(\d+|\d*\.\d+|\d+/\d+)", plain) else None


def listed(gold):
    """Return the elements of a set or a bare list of numbers, else nothing."""
    inner = gold.removeprefix("\\{").removesuffix("\\}")
    return [part.strip() for part in inner.split(",")] if re.fullmatch(r"-?\w+(, ?-?\w{1,2})+", inner) else []


REPLACED = r"""
\frac \dfrac | \frac \tfrac | ( \bigl( | \left . | , _,_ | + _+_ | - − | - _-_ | \pi π | \pi {\pi} | = _=_ | _ .
\infty ∞ | \cup ∪ | pmatrix bmatrix | _\\_ \\[4pt] | \circ {\circ} | ^\circ . | ^\circ ° | ^\circ \text{_degrees}
\% % | \% . | \$ . | \! . | ,\! . | ,\! {,} | \text{ \textbf{ | \text{ \mathrm{ | \pm ± | x_\in_ . | x^2 x^{2}
\sqrt \,\sqrt | \mbox \text | \} _\} | \{ \{_
"""  # an underscore is a space, a dot is nothing
AROUND = r"""
_{}_ | ${}$ | $_{}_$ | \({}\) | \[_{}_\] | {}. | {}_. | \!{} | {}\, | \displaystyle_{} | \;{} | {}\quad | ~{} | \_{}
$\displaystyle_{}$ | \,{}\, | __{}__ | ${}$. | \quad_{} | {}\!
"""


def spellings(gold):
    """Yield spellings that depend on what the answer is."""
    if (value := fraction(gold)) is not None:
        yield from (f"{value}", f"{gold}\\text{{ apples}}", f"{gold} \\mbox{{ cm}}^2", f"x = {gold}", f"{gold}^\\circ")
        yield f"\\frac{{{6 * value.numerator}}}{{{6 * value.denominator}}}"
        if value.denominator == 1:
            grouped = f"{value.numerator:,}"
            yield from (
                f"{value}.0",
                f"{value - 3}+3",
                *(grouped.replace(",", comma) for comma in (",", "{,}", ",\\!")),
            )
        if 10_000 % value.denominator == 0:
            yield from (f"{float(value):.4f}", f"\\${float(value):.4f}")
    if parts := listed(gold):
        yield from (
            ", ".join(parts[::-1]),
            f"\\{{{','.join(parts)}\\}}",
            " and ".join(parts),
            "\\text{ or }".join(parts),
        )
    for pair in re.split(r" \| |\n", REPLACED.strip()):
        old, new = (side.replace("_", " ") for side in pair.split(" "))
        if old in gold:
            yield gold.replace(old, "" if new == "." else new)
    if re.search(r"[(\[].*[)\]]$", gold) and "\\left" not in gold:
        yield re.sub(r"([)\]])", r"\\right\1", re.sub(r"([(\[])", r"\\left\1", gold))
    if match := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        yield from (f"{match[1]}_{match[2]}", f"{match[1]}_{{{match[2]}}}", match[1], f"{match[1]}_{{ {match[2]} }}")
    if match := re.fullmatch(r"\\text\{\(?(.*?)\)?\}", gold):
        yield from (
            match[1],
            f"({match[1]})",
            f"\\text{{{match[1]}}}",
            match[1].lower(),
            f"\\text{{ {match[1].upper()} }}",
        )
    if match := re.fullmatch(r"(\d+) ?\\sqrt\{(\d+)\}", gold):
        yield from (f"\\sqrt{{{int(match[1]) ** 2 * int(match[2])}}}", f"{match[1]} \\cdot \\sqrt{{{match[2]}}}")
    if match := re.fullmatch(r"([^\\]+?) ?\\(?:text|mbox) ?\{.*", gold):
        yield match[1]


def rewritings(gold):
    """Return 20 and more different spellings of an answer: its own first, then with things around it."""
    around = (text.replace("_", " ").replace("{}", gold) for text in re.split(r" \| |\n", AROUND.strip()))
    return list(dict.fromkeys([*(text for text in spellings(gold) if text != gold), *around]))


def test_rewritings_are_equal():
    wrong = []
    for gold in all_golds():
        texts = rewritings(gold)
        assert len(texts) >= 20, gold
        wrong += [(gold, text, verdict) for text in texts if (verdict := compare(gold, text)) != "correct"]
    assert wrong == []


# ---------------------------------------------------------------------------------------------- near misses


def near_misses(gold):
    """Yield answers that look like the gold one and are not equal to it."""
    if value := fraction(gold):
        yield from (
            f"{value + 1}",
            f"{-value}",
            f"{value}i",
            f"{value} x",
            f"x > {value}",
            f"{value}\\pi",
            f"{value}^3+1",
        )
        yield from (f"({value},{value})", f"{float(value) + 1e-7:.9f}")
        if abs(value) != 1:
            yield f"{1 / value}"
    number_part = re.split(r"\\(?:text|mbox)", gold)[0]
    for place in [match.start() for match in re.finditer(r"\d", number_part)][-2:]:
        yield f"{gold[:place]}{(int(gold[place]) + 1) % 10}{gold[place + 1 :]}"
    if re.fullmatch(r"\\text\{.*\}", gold):
        yield from (f"\\text{{not {gold[6:-1]}}}", "\\text{none}", "7", "z")
    elif re.fullmatch(r"[\w+\-^{} \\()]+", gold) and not re.search(r"_|\\(in|begin|text|mbox)|circ", gold):
        yield from (f"{gold}+1", f"{gold}+x^9", f"{gold}, 77")
    if match := re.fullmatch(r"(?:\\left)?([(\[])([^()]*,[^()]*?) ?(?:\\right)?([)\]])", gold):
        parts = [part.strip() for part in match[2].split(",")]
        yield from (f"({','.join(parts[::-1])})", f"({','.join([*parts, '1'])})", f"\\{{{match[2]}\\}}")
        if match[1] + match[3] != "()" and "infty" not in gold:  # a half-open interval has other ends
            yield from (
                text for text in (f"({match[2]})", f"[{match[2]}]") if text[0] + text[-1] != match[1] + match[3]
            )
    if match := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        yield from (f"{match[1]}_{int(match[2]) + 1}", f"{int(match[1], int(match[2]))}")
    if parts := listed(gold):
        yield from (", ".join(parts[:-1]), ", ".join([*parts, "99"]))


OTHERS = r"""
52_8 | 52_9          .0000672 | .00006715        \frac{2}{1005} | 0.00199     6.72\times10^{-20} | 6.71\times10^{-20}
x=5 | y=5            10^{-20} | 10^{-21}         \frac13 | 0.333333           10^{100} | 10^{100}+1
(3,4) | \{3,4\}      x^8+1 | x^9+1               5 | 5 i                      x>5 | x<5
x > 5 | 5            1234 | (1,234)              \text{even} | neve           36\% | 3600\%
36 | 0.36            1 1/2 | 11/2                90^\circ | \frac{\pi}{2}     (2,12) \cup (12,102) | (2,102)
(-2,1) | 1,-2        5x+4=0 | 5x=4               x+1 | x+1=0                  1 \pm \sqrt{19} | 1+\sqrt{19}
5 | 5 m              x | x \text{ dollars}      25\pi | 24\pi \text{ cm}^2   4\pi \text{ cm} | 4\pi x
\pi | 3.141593       9.5 | 9.5,9.6               x^2+1 | 1                    \begin{pmatrix}1\\2\end{pmatrix} | (2,1)
\frac{1}{20!} | \frac{1}{21!}                   \frac{1}{2^{2005}} | \frac{1}{3^{2005}}
\frac{13!}{52!} | \frac{12!}{52!}               \frac{i}{20!} | \frac{i}{21!}
\frac{2^{2005}+1}{3 \cdot 2^{2006}} | \frac{1}{3 \cdot 2^{2006}}
9 \text{ p.m.} | 9 \text{ a.m.}                6:00 \text{ p.m.} | 6:00 \text{ AM}
"""  # of these math-verify takes a dozen for equal


def test_near_misses_are_not_equal():
    pairs = [(gold, text) for gold in all_golds() for text in near_misses(gold)]
    pairs += [pair.split(" | ") for pair in re.split(r"\s{3,}|\n", OTHERS.strip())]
    assert len(pairs) > 4 * len(all_golds())
    assert [(gold, text) for gold, text in pairs if compare(gold, text) == "correct"] == []


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("\\cot x", "\\frac{\\cos x}{\\sin x}"),
        ("2k+2", "2(k+1)"),
        ("[-2,7]", "-2 \\le x \\le 7"),
        ("1 \\pm \\sqrt{19}", "1+\\sqrt{19},1-\\sqrt{19}"),
        ("1,-2", "x=-2 \\text{ or } x=1"),
        ("1,-2", "x=-2, \\text{ or } x=1"),
        ("1,2,3", "1, 2, \\text{ and } 3"),
        ("\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}", "\\begin{bmatrix} 0.2 \\\\[2pt] -3.6 \\end{bmatrix}"),
        ("0.36", "36\\%"),
        ("36\\%", "36"),
        ("0", "\\sqrt{4}-2"),
        ("25\\pi", "25 \\pi \\text{ cm}^2"),
        ("12\\pi\\mathrm{cm}^2", "12π"),
        ("(4,-9)", "4,-9"),
        ("137 \\frac{1}{2}", "137.5"),
        ("6-5i", "-5\\,i+6"),
        ("1 \\pm \\sqrt{19}", "1 ± √19"),
        ("\\frac{1}{20!}", "\\frac{21}{21!}"),
        ("1", "\\sin^2 3 + \\cos^2 3"),
        ("9 \\text{ a.m.}", "9"),
        ("9 \\text{ a.m.}", "9 \\text{ AM}"),
    ],
)
def test_equal_in_another_form(gold, answer):
    assert compare(gold, answer) == "correct"


# ---------------------------------------------------------------------------------------------- bounds


def test_a_hostile_answer_ends_after_a_second():
    text = Path(equality.__file__).with_name("equality_worker.py").read_text()  # a script, which nothing here imports
    assert "\nSECONDS = 1.0  # of CPU time" in text and "\nMEMORY = 2 << 30  # bytes" in text
    compare("x+1", "1+x")  # the worker has started
    worker, start = equality._worker(os.getpid()), time.process_time()
    assert compare("x^2+1", "9^{9^{9^9}}") == "too_complex"
    assert time.process_time() - start < 0.2  # the work is not done here
    assert equality._worker(os.getpid()) is worker  # which ended its child, not the clock it
    assert compare("x^2+1", "1+x^2+0") == "correct"  # and the worker goes on


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("+".join(["x"] * 64), "wrong_value"),
        ("+".join(["x"] * 65), "too_complex"),
        ("1" * 1001, "too_complex"),
        ("\\frac", "not_an_expression"),
        ("\\boxed{", "not_an_expression"),
        ("\x00", "not_an_expression"),
        ("\ud800", "not_an_expression"),
        ("", "not_an_expression"),
    ],
)
def test_verdicts_of_what_is_no_answer(answer, verdict):
    assert compare("y^2+1", answer) == verdict


def test_a_verdict_is_cached(monkeypatch):
    assert compare("x^2-1", "(x-1)(x+1)") == "correct"
    monkeypatch.setattr(equality, "_ask", lambda *_: pytest.fail("asked again"))
    assert compare("x^2-1", "(x-1)(x+1)") == "correct"


def test_numbers_and_equal_spellings_need_no_worker(monkeypatch):
    monkeypatch.setattr(equality, "_ask", lambda *_: pytest.fail("the worker was asked"))
    for gold, answer in (
        ("\\frac{3}{4}", "0.750"),
        ("8", "9"),
        ("\\dfrac{x}{2}", "$\\frac{x}{2}$"),
        ("\\text{east}", "5x"),
    ):
        compare.__wrapped__(gold, answer)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3\\sqrt{4}", 6),
        ("\\frac{1}{\\sqrt{\\frac{1}{4}}}", 2),
        ("2^{-2}(3+1)", 1),
        ("-2^2", -4),
        ("(1+i)^2", 2j),
        ("\\frac12\\cdot 6", 3),
        ("2x-2X", 0),
        *(
            (text, None)
            for text in ("1\\frac12", "2/3x", "ab", "2^10", "1/0", "9^{9^{9}}", "x=5", "5!", "{", "\\log 2", "1,2")
        ),
        *(
            (text, None)  # parts that are missing
            for text in ("x\\frac{}{2}", "\\frac{1}{}", "x\\sqrt{}", "x^{}")
        ),
    ],
)
def test_values_of_formulas(text, value):
    assert equality.value(text) == (value and pytest.approx(value))


def test_a_worker_that_was_ended_is_replaced():
    compare("x+2", "2+x")
    worker = equality._worker(os.getpid())
    os.killpg(worker.pid, 9)
    worker.wait()
    assert compare("x+3", "3+x") == "too_complex"
    assert compare("x+4", "4+x") == "correct"


def test_a_worker_that_does_not_start_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "equality_worker.py"
    broken.write_text("raise ImportError('no antlr here')\n")
    monkeypatch.setattr(equality, "__file__", str(tmp_path / "equality.py"))
    equality._worker.cache_clear()
    try:
        with pytest.raises(UserError, match=r"^math-verify does not start \(.*no antlr here\): pip install"):
            equality._ask("x+1", "1+x")
    finally:
        equality._worker.cache_clear()


def test_three_dots_have_no_value():
    """Python parses them as a constant."""
    assert equality.value("...") is None and equality.value("1+...") is None
    assert equality.compare("e^{i\\pi}", "...+1") in equality.VERDICTS


def test_without_math_verify_one_line_says_what_to_install(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"answer": "1", "completion": "1"}\n')
    code = (
        "import sys; sys.modules['math_verify'] = None\n"
        "from mlx_traces.cli import main; main(['grade', 'rows.jsonl', '--task', 'math'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"Error: {equality.MISSING}\n")


def test_neither_sympy_nor_mlx_is_loaded():
    """Not by the package, its help, or the task: math-verify runs in a process of its own."""
    code = (
        "import sys, mlx_traces, mlx_traces.cli\nfrom click.testing import CliRunner\n"
        "assert CliRunner().invoke(mlx_traces.cli.main, ['--help']).exit_code == 0\n"
        "from mlx_traces.tasks import get_task\nmath = get_task('math')\n"
        "row = {'answer': 'x+1', 'problem': '?'}\n"
        "assert math.grade(math.parse(row, ''), '\\\\boxed{1+x}')['strict'].correct\n"
        "assert not {'sympy', 'mlx', 'math_verify'} & set(sys.modules), 'loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


COMMANDS = r"""
\frac \sqrt \pi \infty \pm \cup \in \text{ \left( \right) \begin{pmatrix} \end{pmatrix} \\ \{ \} \boxed{ \sum_{k=1}^{99}
\int \lim_{x\to0} \log \sin \binom \cdot \times \le ½ π √ − ∞ ２ é 界 ^{ _{ 10^ 9^9 !!
"""
PIECES = (*"0123456789xyabinkpe+-*/=^_(){}[]<>|,.:;!%$&~'\"\\ \n\u200b\x00\ud800", *COMMANDS.split())


def fuzzed(draw):
    """Return a made-up answer: a gold one with pieces put in or taken out, or pieces alone."""
    text = draw.choice(GOLDS) if draw.random() < 0.5 else ""
    for _ in range(draw.randint(1, 12)):
        place = draw.randint(0, len(text))
        text = text[:place] + draw.choice(PIECES) + text[place + (draw.random() < 0.3) :]
    return text


def test_made_up_answers_get_a_verdict_in_time():
    draw = random.Random(int(os.environ.get("MLX_TRACES_FUZZ_SEED", "0")))
    slowest = (0.0, "")
    for _ in range(int(os.environ.get("MLX_TRACES_FUZZED", "60"))):
        gold, answer = draw.choice(GOLDS), fuzzed(draw)
        start = time.monotonic()
        assert compare(gold, answer) in equality.VERDICTS
        assert normal(normal(answer)) is not None and (number(answer) is None or isinstance(number(answer), Fraction))
        slowest = max(slowest, (time.monotonic() - start, answer))
    assert slowest[0] < equality.SECONDS + 1, slowest
