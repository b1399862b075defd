"""Chat templates: a small one of each kind, and the real ones of the folder that MLX_TRACES_TEMPLATES names."""

import csv
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from zoo import ANSWER, ONE, Q1, TALKS, THOUGHT, Zoo, turn

from mlx_traces.errors import UserError

HERE = Path(__file__).parent / "templates"
TOKENS = {
    "spaces": {"kind": "sp-legacy", "eos": "</s>"},
    "another_head_in_the_history": {"kind": "sp-first", "eos": "</s>"},
    "channels": {"eos": "<|return|>", "stops": "<|return|>,<|call|>"},
    "framed_answer": {"eos": "<|OVER|>"},
    "tags_of_its_own": {"kind": "sp-none", "eos": "<eos>", "stops": "<eos>,<turn|>"},
    "turns_without_end": {"eos": "<|endoftext|>", "stops": "<|endoftext|>,<|user|>"},
    "empty_thought_in_the_history": {"eos": "<|endoftext|>", "stops": "<|endoftext|>,<|user|>"},
}
LEARNED = {  # of an answer, of one with a thought, and of earlier turns, which all end with the third
    "spaces": (f"{ANSWER} </s>", f"<think>\n{THOUGHT}\n</think>\n{ANSWER} </s>", " </s>"),
    "another_head_in_the_history": (f"{ANSWER}</s>", f"<think>\n{THOUGHT}\n</think>\n{ANSWER}</s>", "</s>"),
    "line_before_the_end": (
        f"{ANSWER}\n<|over|>",
        f"<think>\n{THOUGHT}\n</think>\n{ANSWER}\n<|over|>",
        "\n<|over|>",
    ),
    "framed_answer": (
        f"<|START_RESPONSE|>{ANSWER}<|END_RESPONSE|><|OVER|>",
        f"<think>\n{THOUGHT}\n</think><|START_RESPONSE|>{ANSWER}<|END_RESPONSE|><|OVER|>",
        "<|END_RESPONSE|><|OVER|>",
    ),
    "channels": (
        f"<|channel|>final<|message|>{ANSWER}<|return|>",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}<|return|>",
        "",  # what ends them is not what ends generation
    ),
    "empty_thought_in_the_history": (
        f"{ANSWER}<|user|>",
        f"<think>\n{THOUGHT}\n</think>\n{ANSWER}<|user|>",
        "<|user|>",
    ),
    "thought_in_the_prompt": (
        f"\n</think>\n\n{ANSWER}<|over|>",
        f"{THOUGHT}\n</think>\n{ANSWER}<|over|>",
        "<|over|>",
    ),
    "untagged_thought": (
        f"\n[BEGIN FINAL RESPONSE]\n{ANSWER}<|over|>",
        f"{THOUGHT}\n[BEGIN FINAL RESPONSE]\n{ANSWER}<|over|>",
        "<|over|>",
    ),
    "tags_of_its_own": (
        f"{ANSWER}<turn|>",
        f"<|channel>thought\n{THOUGHT}\n<channel|>\n{ANSWER}<turn|>",
        "<turn|>",
    ),
    "switch_named_thinking": (f"{ANSWER}<|over|>", f"\n{THOUGHT}\n</think>\n{ANSWER}<|over|>", "<|over|>"),
    "turns_without_end": (f"{ANSWER}<|user|>", f"<think>\n{THOUGHT}\n</think>\n{ANSWER}<|user|>", "<|user|>"),
}


def zoo(name: str) -> Zoo:
    return Zoo((HERE / f"{name}.jinja").read_text(encoding="utf-8"), **TOKENS.get(name, {}))


@pytest.mark.parametrize("name", sorted(path.stem for path in HERE.glob("*.jinja")))
def test_every_kind(name):
    assert zoo(name).faults() == []


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned(name):
    own = zoo(name)
    answer, with_thought, end = LEARNED[name]
    assert own.learned(ONE, ANSWER)[1] == [answer]
    assert own.learned(ONE, f"<think>\n{THOUGHT}\n</think>\n{ANSWER}")[1] == [with_thought]
    _, (first, second, _), counted = own.learned(TALKS["turns"], ANSWER)
    assert first.endswith(f"Alpha says forty.{end}") and second.endswith(f"Beta says three.{end}") and counted == 0


def test_a_date_that_is_printed_is_the_runs():
    own = zoo("date_printed")
    assert own.loaded.chat.dated and not zoo("spaces").loaded.chat.dated
    text = replace(own.loaded, day=date(2024, 7, 26)).chat.prompt(ONE).text
    assert "Today is 26 July 2024.\n" in text


def test_a_system_message_without_a_place_is_put_before_the_question():
    for name in ("system_refused", "system_dropped"):
        own = zoo(name)
        assert f"user\nBe brief and give numbers.\n\n{Q1}" in own.loaded.chat.prompt(TALKS["system"]).text
        assert own.loaded.notes == ["zoo takes no system message; it is put before the first question"]


def test_what_a_template_refuses_or_fails_at_is_one_line():
    cases = (
        ("system_refused", [*ONE, *ONE], "Turns must alternate"),
        ("fails_at_empty_turns", [*ONE, turn("assistant", ""), *ONE], "refuses this conversation"),
        ("one_turn_only", TALKS["turns"], "One question, one answer"),
    )
    for name, turns, told in cases:
        with pytest.raises(UserError, match=told) as raised:
            zoo(name).loaded.chat.prompt(turns)
        assert "\n" not in str(raised.value)


def test_the_zoo_sees_what_is_wrong(monkeypatch):
    """Each fault, put back, is found by the template of its kind."""
    from mlx_traces.models.chat import Chat
    from mlx_traces.traces import encoding

    faults = (
        ("framed_answer", encoding, "_frame", lambda *_: ("", "", "")),
        ("spaces", encoding, "_frame", lambda *_: ("", "", "")),
        ("thought_in_the_prompt", encoding, "_earlier", lambda *_: []),
        ("thought_in_the_prompt", Chat, "_opened", lambda *_: ""),
        ("channels", encoding, "FINAL", "?"),
        ("untagged_thought", encoding, "CLOSED", {}),
        ("switch_named_thinking", Chat, "switch", None),
        ("switch_named_thinking", encoding, "text_of", lambda *_, **__: ""),
        ("system_dropped", Chat, "_settled", lambda self, turns, thinking: (turns, self.text(turns, thinking))),
    )
    for name, place, attribute, fault in faults:
        with monkeypatch.context() as patch:
            patch.setattr(place, attribute, fault)
            assert zoo(name).faults(), (name, attribute)


@pytest.mark.real_templates
def test_real_templates(real_templates):
    """The folder holds NAME.jinja files and TOKENS.tsv, whose columns are arguments of ``Zoo``."""
    with (real_templates / "TOKENS.tsv").open(encoding="utf-8") as file:
        rows = {row.pop("template"): row for row in csv.DictReader(file, delimiter="\t")}
    paths = sorted(real_templates.glob("*.jinja"))
    found = {}
    for path in paths:
        told = {name: value for name, value in rows.get(path.stem, {}).items() if value}
        if lines := Zoo(path.read_text(encoding="utf-8"), **told).faults():
            found[path.stem] = lines
    assert paths and not found
