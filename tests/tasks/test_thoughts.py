"""The one list of thoughts' tags: grading, scores, importing and training all read it."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_traces.tasks import get_task
from mlx_traces.tasks.answers import tolerant
from mlx_traces.tasks.qa import find_text
from mlx_traces.tasks.thoughts import (
    ENDS,
    FINAL,
    TAGS,
    UNTAGGED,
    after_thought,
    answer_part,
    closing_of,
    move_spans,
    normalise,
    parts,
    restyle,
)
from mlx_traces.traces.quality import format_score, thought_of

COUNTDOWN = get_task("countdown")
PROBLEM = COUNTDOWN.parse({"nums": [2, 3, 4], "target": 20}, "test")


@pytest.mark.parametrize(("opening", "closing"), TAGS)
def test_a_draft_in_a_thought_is_no_answer(opening, closing):
    """What stands in a closed thought does not count, and in an open one no number does."""
    thought = f"{opening}\nMaybe \\boxed{{7}} or <answer>(3+2)*4</answer>? No, 9 + 9.\n"
    assert tolerant(f"{thought}{closing}The total is 18 dollars.") == "18"
    assert tolerant(f"{opening}\nFirst 9 + 9 = 18, but wait, the price") is None
    assert tolerant(f"{opening.upper()}\nFirst \\boxed{{18}}, but wait, the price") is None
    scores = COUNTDOWN.grade(PROBLEM, f"{thought}{closing}I found nothing.")
    assert not any(score.correct for score in scores.values())
    assert find_text(f"{thought}{closing}\n<|START_RESPONSE|>Paris<|END_RESPONSE|>") == "Paris"


@pytest.mark.parametrize(("opening", "closing"), TAGS)
def test_every_thought_is_imported_and_scored(opening, closing):
    """Importing takes the tags off, scores find the thought, and the format reward still wants its own tags."""
    text = f"{opening}\n9 + 9 = 18\n{closing}\nIt is 18."
    assert parts(text) == ("9 + 9 = 18", "It is 18.")
    assert normalise(text) == "<think>\n9 + 9 = 18\n</think>\nIt is 18."
    assert thought_of(text, "think").strip() == "9 + 9 = 18"
    assert format_score(text, "stop", "r1") == (opening == "<think>")


@pytest.mark.parametrize("end", ENDS)
def test_tokens_that_end_a_turn_are_no_text_of_it(end):
    """Where a text was decoded with them: in an answer, and in what is imported, once the template writes its own."""
    assert find_text(f"<think>Rome</think>\nParis{end}\n{end}") == find_text(f"Paris{end}") == "Paris"
    assert parts(f"<think>so{end}</think>Paris\n{end}") == ("so", "Paris")
    assert find_text(f"It is {end} alone") == f"It is {end} alone"


@pytest.mark.parametrize(
    "around", ["<response>\n{}\n</response>", "<output>{}</output>", "<|begin_of_box|>{}<|end_of_box|>"]
)
def test_tags_around_an_answer_are_no_text_of_it(around):
    """Those of ERNIE, Marco-o1 and GLM-V."""
    assert find_text("<think>\nRome\n</think>\n\n" + around.format("Paris")).strip() == "Paris"


@pytest.mark.parametrize(
    "text",
    [
        '<output name="r">5</output>',
        "```xml\n<response>ok</response>\n```",
        "print('<solution>x</solution>')",
        "<output>5</output> and <output>6</output>",
    ],
)
def test_markup_within_an_answer_is_text_of_it(text):
    assert parts(text) == (None, text)
    assert normalise(restyle(f"<think>{text} so</think>{text}", "sky-t1")) == f"<think>\n{text} so\n</think>\n{text}"


@pytest.mark.parametrize(
    "text",
    [
        "<think>t</think>\n<SOLUTION>4</SOLUTION><|im_end|>",
        "<think>t</think><solution>4",
        "<think>t</think>4</solution>",
        "<response><think>t</think>4</response>",
        "<think>t</think><response><output>4</s></output>\n</response></s>",
    ],
)
def test_markup_around_an_answer_is_taken_off(text):
    assert parts(text) == ("t", "4")


def test_a_whole_turn_of_gpt_oss():
    """Several messages are one thought."""
    turn = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
    text = f"{turn}<|start|>assistant{FINAL}18"
    assert answer_part(text) == "18" and after_thought(turn) == (turn, True)
    assert parts(text) == ("a\nb", "18")
    assert thought_of(f"<|channel|>analysis<|message|>a<|end|><|start|>assistant{FINAL}b", "r1") == "a"


def test_a_thought_without_a_tag_opens_a_response_only():
    """Apriel's words elsewhere are words."""
    assert after_thought(f" {UNTAGGED}\n9 + 9 = 18") == (f" {UNTAGGED}\n9 + 9 = 18", True)
    assert tolerant(f"{UNTAGGED}\n9 + 9 = 18\n[BEGIN FINAL RESPONSE]\n19\n[END FINAL RESPONSE]") == "19"
    assert tolerant(f"I can explain. {UNTAGGED} 9 + 9 = 18") == "18"
    assert parts(f"I can explain. {UNTAGGED} 18") == (None, f"I can explain. {UNTAGGED} 18")
    assert thought_of(f"I can explain. {UNTAGGED} 18", "think") is None


def test_what_closes_a_thought():
    """Training ends a thought that the template opened, in the model's own tags."""
    assert closing_of("[THINK]\n") == "[/THINK]" and closing_of("<|channel>thought\n") == "<channel|>"
    assert closing_of("<|channel|>analysis<|message|>") == f"<|end|><|start|>assistant{FINAL}"
    assert closing_of(f"{UNTAGGED}\n") == "[BEGIN FINAL RESPONSE]"
    assert closing_of("{{3}}\n", ("{{3}}", "{{/3}}")) == "{{/3}}"
    assert closing_of("<think>\n\n</think>\n\n") is None and closing_of("") is None


LETTERS = "".join(chr(code) for code in range(0x4E00, 0x4E40))  # no two are alike, so each can be found again


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from(["a", "a ", " ", "\n\n", *TAGS[0], *TAGS[6], "</solution>", "</s>", FINAL]), max_size=14),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=3),
    st.sampled_from(["think", "sky-t1"]),
)
def test_a_span_has_the_same_letters_in_another_form(pieces, spans, style):
    letters = iter(LETTERS)
    old = "".join(piece if piece.startswith("<") else piece.replace("a", next(letters)) for piece in pieces)
    spans = [(start, start + size) for start, size in spans if start + size <= len(old)]
    new = restyle(old, style)
    moved = move_spans(spans, old, new)
    assert move_spans(spans, old, old) == spans
    for (start, end), (begin, stop) in zip(spans, moved, strict=True):
        own = set(old[start:end]) & {*LETTERS}
        assert own == set(new[begin:stop]) & {*LETTERS} and 0 <= begin <= stop <= len(new)


def test_what_stands_between_letters_goes_with_a_part_of_it():
    old, new = "<think>\nab\n</think>\n5", "<|begin_of_thought|>\n\nab\n\n<|end_of_thought|>\n\n5"
    for start, end, words in (
        (10, 20, "\n\n<|end_of_thought|>\n\n"),
        (11, 19, "\n\n<|end_of_thought|>\n\n"),
        (9, 20, "b\n\n<|end_of_thought|>\n\n"),
        (9, 21, "b\n\n<|end_of_thought|>\n\n5"),
        (9, 10, "b"),
        (20, 21, "5"),
        (0, 8, "<|begin_of_thought|>\n\n"),
    ):
        ((begin, stop),) = move_spans([(start, end)], old, new)
        assert new[begin:stop] == words, old[start:end]
    assert move_spans([(3, 3)], old, new) == []
    # Letters that differ: what lies between the equal ones is one part.
    ((begin, stop),) = move_spans([(4, 6)], "ab, cd, ef", "ab, c?, ef")
    assert (begin, stop) == (4, 6)
    assert move_spans([(0, 1)], "abc", "<out>abc</out>", ("<out>", "</out>")) == [(5, 6)]
    begun = time.perf_counter()
    assert move_spans([(i, i + 1) for i in range(0, 100_000, 9)], "<a " * 33_334, "<b " * 33_334)
    assert time.perf_counter() - begun < 5
