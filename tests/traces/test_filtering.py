"""The filter's rules, each on an example small enough to see the answer."""

from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_traces.config import FilterConfig
from mlx_traces.errors import UserError
from mlx_traces.records import Problem, Trace
from mlx_traces.tasks import get_task
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.traces.filtering import jaccard, problems_of, same_problem, select, shingles

OFF = {"correct_only": False, "finished": False, "duplicates": False}
QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def trace(text="a", id="p", **fields):
    return Trace(id=id, messages=({"role": "user", "content": "?"},), completion=text, **fields)


def rule(traces, problems=(), **settings):
    """Apply one rule; return its name, and the places of what it keeps."""
    kept, report = select(traces, FilterConfig(**{**OFF, **settings}), problems)
    ((name, removed, left),) = report
    assert (removed, left) == (len(traces) - len(kept), len(kept))
    return name, [next(at for at, each in enumerate(traces) if each is one) for one in kept]


def test_correct_only_judges_where_no_verdict_is_stored():
    columns = {"nums": [3, 4, 6], "target": 30}
    traces = [
        trace("<answer>3 * (4 + 6)</answer>", task="countdown", columns=columns),
        trace("<answer>3 + 4</answer>", task="countdown", columns=columns),
        trace("?", task="countdown", columns=columns, verdict="correct"),
        trace("?", verdict="wrong_value"),
        trace("no task"),
    ]
    assert rule(traces, correct_only=True) == ("correct only", [0, 2, 4])


def test_form_end_and_least_scores():
    traces = [
        trace(scores={"format": value, "faithfulness": value}, score=value or 0) for value in (1.0, 0.5, None, 0.0)
    ]
    assert rule(traces, well_formed=True) == ("well-formed", [0, 2])
    assert rule(traces, min_faithfulness=0.5) == ("faithful", [0, 1, 2])
    assert rule(traces, min_score=0.5) == ("score", [0, 1])
    ends = [trace(finish_reason=reason) for reason in ("stop", "length", None)]
    assert rule(ends, finished=True) == ("finished", [0, 2])


@pytest.mark.parametrize(
    "settings",
    [{"well_formed": True}, {"min_faithfulness": 0.5}, {"min_score": 0.1}, {"per_problem": 1, "prefer": "best"}],
)
def test_missing_scores_say_what_to_run(settings):
    with pytest.raises(UserError, match="^trace p has no score.*mlx-traces score"):
        select([trace("a"), trace("b")], FilterConfig(**{**OFF, **settings}))


def test_duplicates_are_of_one_problem():
    traces = [trace("a  b\n"), trace("a b"), trace("a b", id="q"), trace("A b")]
    assert rule(traces, duplicates=True) == ("duplicates", [0, 2, 3])


def test_near_duplicates_by_hand():
    base = "one two three four five six seven eight nine ten"  # 6 shingles
    near = "one two three four five six seven eight nine eleven"  # 5 of them, and another: 5 / 7
    far = "one two three four five six x y z w"  # 2 of them, and 4 others: 2 / 10
    assert jaccard(shingles(base), shingles(near)) == 5 / 7
    assert jaccard(shingles(base), shingles(far)) == 2 / 10
    traces = [trace(base), trace(near), trace(far), trace(near, id="q"), trace(base.upper())]
    assert rule(traces, near_duplicates=5 / 7) == ("near duplicates", [0, 2, 3])
    assert rule(traces, near_duplicates=0.72) == ("near duplicates", [0, 1, 2, 3])
    assert rule(traces, near_duplicates=0.2) == ("near duplicates", [0, 3])


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=12),
    st.sampled_from([0.1, 1 / 3, 0.5, 0.8, 1.0]),
)
def test_near_duplicates_are_what_comparing_all_pairs_finds(texts, threshold):
    expected = []
    for at, text in enumerate(texts):
        if all(jaccard(shingles(text), shingles(texts[i])) < threshold for i in expected):
            expected.append(at)
    assert rule([trace(text) for text in texts], near_duplicates=threshold)[1] == expected


def test_near_duplicates_of_many_traces_are_not_compared_pair_by_pair():
    traces = [trace(" ".join(f"w{i}x{j}" for j in range(40)) + " the end of every trace here") for i in range(4000)]
    start = process_time()
    assert len(rule(traces, near_duplicates=0.8)[1]) == 4000
    assert process_time() - start < 30  # 0.8 s of the processor; all pairs take minutes


def test_evaluation_problems_by_id():
    problems = get_task("countdown").load("test", None, 20, 0)
    traces = [trace(id=problems[3].id), trace(id="other"), trace(id=problems[4].id + "#2")]
    assert rule(traces, problems) == ("evaluation problems", [1])


@pytest.mark.parametrize(("split", "data"), [("test", None), ("test[:9]", "3-numbers")])
def test_generated_countdown_problems_are_known_by_the_numbers_of_their_split(split, data):
    evaluated = get_task("countdown").load(split, data, 5, 0)
    others = [problem for n in (3, 6) for problem in get_task("countdown").load("test", f"{n}-numbers", 300, 9)]
    free = get_task("countdown").load("train", None, 300, 0)
    traces = [trace(id=problem.id) for problem in [*others, *free]]
    settings = {"eval_task": "countdown", "eval_split": split, "eval_data": data}
    assert rule(traces, evaluated, **settings) == ("evaluation problems", list(range(600, 900)))
    assert len(rule(traces, evaluated, **settings | {"eval_data": "file.jsonl"})[1]) > 890  # not generated: by id


def test_evaluation_questions_by_thirteen_words():
    problems = [Problem("gsm8k-1", {"question": QUESTION, "answer": "72"}, "72")]
    words = QUESTION.split()
    traces = [
        trace(" ".join(words[2:15])),  # 13 words in a row
        trace(" ".join(words[2:14])),  # 12
        trace("x", columns={"question": QUESTION.upper().replace(",", " -")}),
        Trace(id="p", messages=({"role": "user", "content": f"Q: {QUESTION}"},), completion="x"),
        trace(" ".join(words[2:8] + ["not"] + words[8:15])),
    ]
    assert rule(traces, problems) == ("evaluation problems", [1, 4])
    assert rule(traces, problems, overlap_words=12) == ("evaluation problems", [4])
    assert rule(traces, problems, overlap_words=0) == ("evaluation problems", [0, 1, 2, 3, 4])


def test_words_of_languages_without_spaces_are_characters():
    question = "小明有十二个苹果，他又买了三个，现在他一共有多少个苹果？"
    japanese = "りんごが三個あります。二個食べると残りは何個ですか。"
    korean = "사과 열두 개가 있고 세 개를 더 샀다면 모두 몇 개가 있는지 답을 구해 보세요"
    problems = [Problem(text, {"question": text, "answer": "15"}, "15") for text in (question, japanese, korean)]
    traces = [
        trace("今天的问题：" + question),
        trace("他又买了三个、现在他一共有多少个"),  # 15 characters in a row, with another comma
        trace("他又买了三个苹果"),
        trace("問題: " + japanese),
        trace(korean),
        trace("사과 열두 개가 있고"),
    ]
    assert rule(traces, problems) == ("evaluation problems", [2, 5])
    near = [trace(question), trace(question + "请回答。"), trace("完全不同的另一个很长的句子，没有相同的地方。")]
    assert rule(near, near_duplicates=0.7) == ("near duplicates", [0, 2])


def test_a_short_evaluation_question_counts_as_a_whole():
    problems = [
        Problem("a", {"question": "How many legs do eight spiders have together?"}, "64"),  # 8 words
        Problem("b", {"question": "What is two plus two?"}, "4"),  # 5: too common
    ]
    traces = [
        trace("how many legs do eight spiders have together"),
        trace("how many legs do eight spiders have"),
        trace("What is two plus two?"),
    ]
    assert rule(traces, problems) == ("evaluation problems", [1, 2])


def test_the_shortest_of_a_problem():
    traces = [trace("long text"), trace("b"), trace("cc"), trace("other", id="q")]
    assert rule(traces, per_problem=2) == ("2 a problem, short", [1, 2, 3])
    # in tokens where all are known
    tokens = [trace("a", completion_ids=(1, 2, 3)), trace("long", completion_ids=(1,)), trace("b")]
    assert rule(tokens[:2], per_problem=1)[1] == [1]
    assert rule(tokens, per_problem=1)[1] == [0]


def test_the_best_the_diverse_and_random_ones():
    words = "one two three four five six seven eight"
    texts = [words, words + " nine", "quite another text that has no words in common"]
    traces = [trace(text, score=score) for text, score in zip(texts, (0.5, 0.9, 0.1), strict=True)]
    assert rule(traces, per_problem=2, prefer="best") == ("2 a problem, best", [0, 1])
    assert rule(traces, per_problem=2, prefer="diverse") == ("2 a problem, diverse", [1, 2])
    assert rule([trace(text) for text in texts], per_problem=2, prefer="diverse")[1] == [0, 2]
    many = [trace(str(i), id=f"p{i % 2}") for i in range(40)]
    one, again = (rule(many, per_problem=3, prefer="random", seed=1)[1] for _ in range(2))
    other = rule(many, per_problem=3, prefer="random", seed=2)[1]
    assert one == again != other
    assert one == sorted(one) and len(one) == 6
    alone = rule([each for each in many if each.id == "p0"], per_problem=3, prefer="random", seed=1)[1]
    assert [2 * at for at in alone] == [at for at in one if at % 2 == 0]  # other problems do not matter


def test_balance_by_pass_rate():
    def problem(id, correct, wrong):
        return [
            trace(f"{id}{i}", id=id, verdict="correct" if i < correct else "wrong_value")
            for i in range(correct + wrong)
        ]

    easy = [each for n in range(6) for each in problem(f"e{n}", 4, 0)]  # 24 correct, bin 3
    hard = [each for n in range(4) for each in problem(f"h{n}", 1, 4)]  # 4 correct, rate 0.2, bin 0
    half = problem("m", 2, 2)  # 2 correct, rate 0.5, bin 2
    config = FilterConfig(correct_only=True, balance=1.5)
    kept, report = select([*easy, *hard, *half], config)
    assert report[-1] == ("balance", 18, 12)  # median of 24, 4, 2 is 4, so 6 at most
    assert sum(each.id[0] == "e" for each in kept) == 6
    assert [each.id for each in kept if each.id[0] != "e"] == ["h0", "h1", "h2", "h3", "m", "m"]
    assert kept == select([*easy, *hard, *half], config)[0]
    assert kept != select([*easy, *hard, *half], FilterConfig(balance=1.5, seed=1))[0]


def test_balance_by_stratum():
    sizes = {"3": ({"nums": [1, 2, 3], "target": 6}, 9), "4": ({"nums": [1, 2, 3, 4], "target": 10}, 3)}
    traces = [
        trace(f"{name}{i}", id=name, task="countdown", columns=columns, verdict="correct")
        for name, (columns, count) in sizes.items()
        for i in range(count)
    ]
    kept, _ = select(traces, FilterConfig(balance=1.0, difficulty="stratum"))
    assert [each.id for each in kept] == ["3"] * 6 + ["4"] * 3  # median of 9 and 3


def test_rules_come_in_order_and_tell_what_each_removed():
    traces = [
        trace("a", verdict="correct", finish_reason="stop"),
        trace("a", verdict="correct", finish_reason="stop"),
        trace("a", verdict="wrong_value", finish_reason="length"),
        trace("b", verdict="correct", finish_reason="length"),
        trace("ccc", verdict="correct", finish_reason="stop"),
    ]
    kept, report = select(traces, FilterConfig(per_problem=1))
    assert kept == [traces[0]]
    assert report == [("correct only", 1, 4), ("finished", 1, 3), ("duplicates", 1, 2), ("1 a problem, short", 1, 1)]


def test_the_rule_that_takes_the_last_ones_is_named():
    with pytest.raises(UserError, match=r"^nothing is left: rule 'finished' removed the last 2 of 3 traces; relax"):
        select(
            [trace(verdict="wrong_value"), trace(finish_reason="length"), trace(finish_reason="length")], FilterConfig()
        )
    with pytest.raises(UserError, match="no traces"):
        select([], FilterConfig())


def test_without_rules_all_is_kept():
    traces = [trace(), trace()]
    assert select(traces, FilterConfig(**OFF)) == (traces, [])


def test_an_unreadable_task_is_one_line():
    with pytest.raises(UserError, match="^trace p: 'nums'"):
        select([trace(task="countdown")], FilterConfig())


def test_a_problem_is_known_by_its_content():
    """By id, whole question, or prompt; case and white space aside. Other signs or numbers make another problem."""
    prompt = Prompt("asked", "Solve this: {question}")
    long = "How many apples are left if 3 of 7 are eaten?"
    problems = [Problem("a#2", {"question": long}, "4"), Problem("b", {"question": "What is 5 + 3?"}, "8")]
    same = same_problem(problems, prompt)

    def asked_in(text):
        return same(Trace("trace-1", ({"role": "user", "content": text}, {"role": "assistant", "content": long}), "x"))

    assert same(Problem("a", {}, "")) and not same(Problem("c", {}, ""))
    assert same(Problem("c", {"question": "  how MANY apples are left if 3 of 7\nare eaten?"}, ""))
    assert not same(Problem("c", {"question": long.replace("7", "8")}, ""))
    assert not same(Problem("c", {"question": "What is 5 - 3?"}, ""))
    assert asked_in(f"Think first. {long} Then answer.") and asked_in("solve this: What is 5 + 3?")
    assert asked_in("What is 5 + 3?")
    assert not asked_in("What is 5 + 3? And 4?") and not asked_in("Something else that is at least eight words long")


def test_a_problem_of_several_ids_is_known_by_all_that_it_was_asked():
    """A system's turn may hold the problem, and may stand before a question that the trace states."""

    def asked(id, system, user, **columns):
        return Trace(id, ({"role": "system", "content": system}, {"role": "user", "content": user}), "x", **columns)

    traces = [asked("a", "What is 1 + 1?", "Go on."), asked("b", "what is 1 + 2?", "Go on.")]
    traces += [asked("c", "What is  1 + 2?", "go on."), asked("d", "Be brief.", "1 + 3", columns={"question": "1 + 3"})]
    traces += [asked("e", "Think.", "1 + 3", columns={"question": "1 + 3"}), asked("f", "Think.", "1 + 3")]
    assert list(map(problems_of(traces), "abcdef")) == list("abbddd")


def test_a_problem_of_very_many_ids_is_found_at_once():
    """Each id is smaller than those before it, so each is the problem's in its turn."""
    traces = [Trace(f"{8000 - i:04}", ({"role": "user", "content": "Go on."},), "x") for i in range(8000)]
    start = process_time()
    name_of = problems_of(traces)
    assert {name_of(trace.id) for trace in traces} == {"0001"}
    assert process_time() - start < 2  # 0.1 s of the processor; without shorter paths 5 s
