"""Raw traces from elsewhere, against values worked out by hand."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from factories import MANIFEST, NATALIA, SKY, SKY_NORMAL, call, write_lines

from mlx_traces.errors import UserError
from mlx_traces.tasks import get_task, gsm8k
from mlx_traces.tasks.thoughts import parts
from mlx_traces.traces import importing
from mlx_traces.traces.files import manifest_of, read_traces, write_traces
from mlx_traces.traces.importing import import_traces


def imported(path, form, task=None, **options):
    return list(import_traces(str(path), form, get_task(task) if task else None, **options))


USER = {"role": "user", "content": "Q?"}
ASSISTANT = {"role": "assistant", "content": "a</think>b"}
NORMAL = "<think>\na\n</think>\nb"
EARLIER = {**ASSISTANT, "content": NORMAL}


@pytest.mark.parametrize(
    ("form", "row", "before"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}, [USER]),
        ("messages", {"messages": [USER, ASSISTANT, USER, ASSISTANT, USER]}, [USER, EARLIER, USER]),
        ("messages", {"messages": [{**USER, "name": "x"}, ASSISTANT], "other": 1}, [USER]),
        ("prompt-completion", {"prompt": "Q?", "completion": "a</think>b"}, [USER]),
        ("prompt-completion", {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}, [USER, EARLIER, USER]),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "a</think>b"}]},
            [USER],
        ),
        (
            "sharegpt",
            {
                "system": "S",
                "conversations": [{"from": "user", "value": "Q?"}, {"from": "assistant", "value": "a</think>b"}],
            },
            [{"role": "system", "content": "S"}, USER],
        ),
        ("alpaca", {"instruction": "Q?", "input": "", "output": "a</think>b"}, [USER]),
        ("alpaca", {"instruction": "Add.", "input": "2", "output": "a</think>b"}, [{**USER, "content": "Add.\n\n2"}]),
        (
            "alpaca",
            {"history": [["Q?", "a</think>b"]], "instruction": "Q?", "output": "a</think>b", "system": "S"},
            [{"role": "system", "content": "S"}, USER, EARLIER, USER],
        ),
        (
            "messages",
            {"messages": [{"role": "Developer", "content": "S"}, USER, {"role": "model", "content": "a</think>b"}]},
            [{"role": "system", "content": "S"}, USER],
        ),
        ("open-r1", {"problem": "Q?", "generations": ["<think>a</think>b"]}, [USER]),
        ("text", {"text": "a</think>b"}, []),
    ],
)
def test_every_format(tmp_path, form, row, before):
    path = write_lines(tmp_path / "rows.jsonl", row)
    (one,) = imported(path, form)
    assert (list(one.messages), one.completion, one.source, one.sample) == (before, NORMAL, "rows.jsonl", 0)
    assert (one.task, one.columns, one.finish_reason) == ("", {}, None) and re.fullmatch("trace-[0-9a-f]{10}", one.id)
    (tmp_path / "rows.json").write_text(json.dumps([row], indent=1))
    (same,) = imported(tmp_path / "rows.json", form)
    assert same.to_row() == {**one.to_row(), "source": "rows.json"}
    for column in importing.FORMATS[form]:
        path = write_lines(tmp_path / "less.jsonl", {"mine": 1, **{k: v for k, v in row.items() if k != column}})
        with pytest.raises(UserError, match=rf"less.jsonl:1: '{column}' is missing; this row has mine"):
            imported(path, form)


def test_sky_t1(tmp_path):
    (tmp_path / "Sky-T1_data_17k.json").write_text(json.dumps([SKY]))
    (one,) = imported(tmp_path / "Sky-T1_data_17k.json", "sharegpt")
    assert one.completion == SKY_NORMAL
    assert [turn["role"] for turn in one.messages] == ["system", "user"]
    (kept,) = imported(tmp_path / "Sky-T1_data_17k.json", "sharegpt", style=None)
    (again,) = imported(tmp_path / "Sky-T1_data_17k.json", "sharegpt", style="sky-t1")
    assert kept.completion == again.completion == SKY["conversations"][1]["value"]


def test_earlier_turns_have_the_style_of_the_completion(tmp_path):
    asked = {**USER, "content": "<think>?"}
    path = write_lines(tmp_path / "a.jsonl", {"messages": [asked, ASSISTANT, USER, ASSISTANT]})
    made = [imported(path, "messages", style=style)[0] for style in ("think", "sky-t1", None)]
    assert [one.messages[1]["content"] for one in made] == [one.completion for one in made]
    assert {one.messages[0]["content"] for one in made} == {"<think>?"} and len({one.id for one in made}) == 1


def test_open_r1_keeps_what_its_own_checks_found_correct(tmp_path):
    row = {
        "problem": "What is 6 times 7?",
        "answer": "42",
        "generations": [f"<think>a{n}</think>\\boxed{{42}}" for n in range(5)],
        "correctness_math_verify": [True, False, False, None, True],
        "correctness_llama": [None, None, True, None, None],
        "is_reasoning_complete": [True, True, True, True, False],
        "finish_reasons": ["stop", "stop", None, "length", "length"],
    }
    path, skipped = write_lines(tmp_path / "rows.jsonl", row, {**row, "generations": []}), Counter()
    made = imported(path, "open-r1", "gsm8k", skipped=skipped)
    assert [(one.sample, parts(one.completion)[0], one.finish_reason) for one in made] == [
        (0, "a0", "stop"),
        (2, "a2", None),
        (3, "a3", "length"),
    ]
    assert skipped == {"wrong by the row's own check": 1, "cut off": 1, "empty completion": 1}
    problem = gsm8k.parse({"question": "What is 6 times 7?", "answer": "42"}, "here")
    for one in made:
        assert (one.id, one.columns, one.task) == (problem.id, problem.columns, "gsm8k")
        assert gsm8k.grade(gsm8k.parse(one.columns, "here"), one.completion)["tolerant"].correct
    assert len({one.id for one in imported(path, "open-r1")}) == 1


APART = {"role": "assistant", "content": "It is 42."}


@pytest.mark.parametrize("field", importing.THOUGHTS)
def test_a_thought_in_a_field_of_its_own_is_kept(tmp_path, field):
    """In every format of conversations, in the import's tags; also where nothing follows it, or the content has it."""
    thought = {field: "Seven sixes."}
    path, dropped = tmp_path / "a.jsonl", Counter()
    rows = {
        "messages": {"messages": [USER, {**APART, **thought}]},
        "sharegpt": {
            "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "It is 42.", **thought}]
        },
        "prompt-completion": {"prompt": "Q?", "completion": [{**APART, **thought}]},
    }
    for form, row in [*rows.items(), ("prompt-completion", {"prompt": "Q?", "completion": "It is 42.", **thought})]:
        write_lines(path, row)
        for style in ("think", None):
            (one,) = imported(path, form, style=style, dropped=dropped)
            assert one.completion == "<think>\nSeven sixes.\n</think>\nIt is 42."
        (one,) = imported(path, form, style="sky-t1", dropped=dropped)
        assert parts(one.completion) == ("Seven sixes.", "It is 42.") and one.completion.startswith("<|begin_of_tho")
    tagged = "<think>\nSeven sixes.\n</think>\nIt is 42."
    for turn, wanted in (
        ({**APART, "content": "", **thought}, "<think>\nSeven sixes.\n</think>"),
        ({**APART, "content": None, **thought}, "<think>\nSeven sixes.\n</think>"),
        ({"role": "assistant", **thought}, "<think>\nSeven sixes.\n</think>"),
        ({**APART, "content": tagged, **thought}, tagged),
        ({**APART, field: "<think>Seven sixes.</think>"}, tagged),
        ({**APART, field: None}, "It is 42."),
        ({**APART, "reasoning": "Seven sixes.", "reasoning_content": "Seven sixes."}, tagged),
    ):
        (one,) = imported(write_lines(path, {"messages": [USER, turn]}), "messages", dropped=dropped)
        assert one.completion == wanted
    (one,) = imported(write_lines(path, {"messages": [USER, {**APART, **thought}, USER, APART]}), "messages")
    assert one.messages[1]["content"] == tagged and not dropped


def test_a_setting_is_no_thought_and_a_thought_of_no_turn_is_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = {
        "prompt-completion": {"prompt": "Q?", "completion": [APART]},
        "messages": {"messages": [USER, APART]},
        "sharegpt": {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "It is 42."}]},
        "text": {"text": "It is 42."},
    }
    for form, row in rows.items():
        for field, counted in (("Seven sixes.", {"a 'reasoning' column": 1}), ("off", {})):
            dropped = Counter()
            (one,) = imported(write_lines(path, {**row, "reasoning": field}), form, dropped=dropped)
            assert one.completion == "It is 42." and dropped == counted
    for word in importing.SETTINGS:
        dropped, row = Counter(), {"prompt": "Q?", "completion": "It is 42.", "reasoning": word.upper()}
        (one,) = imported(write_lines(path, row), "prompt-completion", dropped=dropped)
        assert one.completion == "It is 42." and not dropped
        row = {"messages": [USER, {**APART, "reasoning": word}]}
        (one,) = imported(write_lines(path, row), "messages", dropped=dropped)
        assert one.completion == "It is 42." and dropped == {"a turn's 'reasoning'": 1}


@pytest.mark.parametrize(
    ("thought", "content", "completion"),
    [
        ("Seven sixes.", "`<think>` opens and `</think>` closes.", None),
        ("Use Vec<Thought>.", "let v: Vec<Thought> = vec![];", None),
        ("Say </think> once.", "Vec<Thought> b", "<think>\nSay\nonce.\n</think>\nVec<Thought> b"),
        ("Seven sixes.", "<think>More.</think>b", "<think>\nSeven sixes.\nMore.\n</think>\nb"),
        ("Seven sixes.", "<|begin_of_solution|>b<|end_of_solution|><|im_end|>", "<think>\nSeven sixes.\n</think>\nb"),
    ],
)
def test_tags_are_words_of_a_content_whose_thought_is_in_a_field_of_its_own(tmp_path, thought, content, completion):
    turn = {"role": "assistant", "reasoning_content": thought, "content": content}
    (one,) = imported(write_lines(tmp_path / "a.jsonl", {"messages": [USER, turn, USER, turn]}), "messages")
    assert one.completion == (completion or f"<think>\n{thought}\n</think>\n{content}")
    assert one.messages[1]["content"] == one.completion


def test_a_content_in_parts_is_joined(tmp_path):
    """Its thoughts are the turn's, what is no text is refused."""
    path, dropped = tmp_path / "a.jsonl", Counter()
    asked = {"role": "user", "content": [{"type": "text", "text": "Q"}, "?"]}

    def read(*parts):
        row = {"messages": [asked, {**APART, "content": parts}]}
        (one,) = imported(write_lines(path, row), "messages", dropped=dropped)
        assert one.messages == (USER,)
        return one.completion

    text = {"type": "text", "text": "It is 42."}
    assert read(text) == read({"type": "text", "text": "It is"}, " 42.") == "It is 42."
    for field in importing.THOUGHTS:
        assert read({"type": field, field: "Seven sixes."}, text) == "<think>\nSeven sixes.\n</think>\nIt is 42."
    for part, kind in (({"type": "image_url", "image_url": {}}, "image_url"), (5, "int"), ({"type": "text"}, "text")):
        with pytest.raises(UserError, match=f"a.jsonl:1: a part of 'content' is '{kind}', not text; leave that row"):
            read(text, part)
    assert not dropped
    full = {**APART, "content": [{"type": "thought", "thought": "a"}, text], **dict.fromkeys(importing.THOUGHTS, "b")}
    with pytest.raises(UserError, match="a.jsonl:1: a turn has thoughts in 'content' and in reasoning_content, think"):
        imported(write_lines(path, {"messages": [USER, full]}), "messages")


def test_conversations_with_a_tool_are_left_out(tmp_path):
    """They are counted, and with --strict refused; what follows the completion does not count."""
    asks = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    said, path, skipped = {"role": "tool", "content": "42"}, tmp_path / "a.jsonl", Counter()
    rows = [{"messages": [USER, asks, said, APART]}, {"messages": [USER, said]}, {"messages": [USER, APART, said]}]
    (one,) = imported(write_lines(path, *rows), "messages", skipped=skipped)
    assert one.completion == "It is 42." and skipped == {"turns of a tool": 2}
    for said in ({}, {"reasoning_content": "Seven sixes."}, {"content": "I will look."}):
        row, skipped = {"messages": [USER, {**asks, **said}]}, Counter()
        assert imported(write_lines(path, row), "messages", skipped=skipped) == []
        assert skipped == {"a call of a tool": 1}
    skipped = Counter()
    turns = [{"from": who, "value": "x"} for who in ("human", "function_call", "observation", "gpt")]
    assert imported(write_lines(path, {"conversations": turns}), "sharegpt", skipped=skipped) == []
    with pytest.raises(UserError, match="a.jsonl:1: a tool's turn is not imported; leave --strict out"):
        imported(path, "sharegpt", strict=True)


def test_a_turn_of_weight_0_is_not_learned(tmp_path):
    path, skipped, dropped = tmp_path / "a.jsonl", Counter(), Counter()
    bad, good = {**APART, "content": "BAD", "weight": 0}, {**APART, "weight": 1}
    options = {"skipped": skipped, "dropped": dropped}
    (one,) = imported(write_lines(path, {"messages": [USER, bad, USER, good]}), "messages", **options)
    assert (one.completion, one.not_learned) == ("It is 42.", (1,))
    write_traces(tmp_path / "b.jsonl", [one], MANIFEST)
    assert next(read_traces(tmp_path / "b.jsonl"))[1] == one
    (one,) = imported(write_lines(path, {"messages": [USER, good, USER, bad]}), "messages", **options)
    assert (one.completion, one.not_learned, len(one.messages)) == ("It is 42.", None, 1)
    assert imported(write_lines(path, {"messages": [USER, bad]}), "messages", **options) == []
    assert skipped == {"every turn of the assistant has weight 0": 1} and not dropped
    with pytest.raises(UserError, match="a.jsonl:1: 'weight' of a turn must be 0 or 1, not '0.5'"):
        imported(write_lines(path, {"messages": [USER, {**APART, "weight": 0.5}]}), "messages")
    row = {"id": "a", "messages": [USER, APART], "completion": "x", "not_learned": [2]}
    with pytest.raises(UserError, match="'not_learned' must be numbers of messages, from 0 to 1"):
        list(read_traces(write_lines(path, row)))


def test_the_assistants_turns_in_a_prompt_are_not_learned(tmp_path):
    row = {"prompt": [USER, APART, USER], "completion": [APART, USER, APART]}
    (one,) = imported(write_lines(tmp_path / "a.jsonl", row), "prompt-completion")
    assert (len(one.messages), one.not_learned, one.completion) == (5, (1,), "It is 42.")


@pytest.mark.parametrize(
    ("said", "completion"),
    [
        ("    return 1\n", "    return 1"),
        ("\n\n\treturn 1<|im_end|>", "\treturn 1"),
        (" It is 42.", "It is 42."),
        ("  <think>a</think>  b", NORMAL),
    ],
)
def test_the_indentation_of_code_is_kept(tmp_path, said, completion):
    (one,) = imported(write_lines(tmp_path / "a.jsonl", {"prompt": "Q?", "completion": said}), "prompt-completion")
    assert one.completion == completion


def test_fields_of_a_turn_that_are_not_imported_are_counted_or_refused(tmp_path):
    turn, called = {**APART, "name": "Ann", "refusal": None, "tool_calls": []}, {**APART, "tool_calls": [{"name": "f"}]}
    row = {
        "system": "Be brief.",
        "messages": [{"role": "system", "content": "Be long."}, {**USER, "thought": "x"}, called, USER, turn],
    }
    path, out, dropped = write_lines(tmp_path / "a.jsonl", row), tmp_path / "out.jsonl", Counter()
    (one,) = imported(path, "messages", dropped=dropped)
    wanted = {"a turn's 'thought'": 1, "a turn's 'tool_calls'": 1, "a turn's 'name'": 1}
    assert dropped == {**wanted, "a system column beside a system turn": 1}
    assert [turn["content"] for turn in one.messages] == ["Be long.", "Q?", "It is 42.", "Q?"]
    result = call("data", "import", path, "--format", "messages", "--out", out)
    assert result.stderr.startswith(
        f"1 traces written to {out}; 1 dropped (a turn's 'thought'), 1 dropped (a turn's 't"
    )
    assert manifest_of(out)["counts"]["dropped"] == dropped
    result = call("data", "import", path, "--format", "messages", "--out", tmp_path / "b.jsonl", "--strict")
    assert result.exit_code and f"{path}:1: a turn's 'thought' is not imported; leave --strict out" in result.stderr
    (one,) = imported(
        write_lines(Path(path), {"system": "Be brief.", "messages": [USER, APART]}), "messages", strict=True
    )
    assert one.messages[0] == {"role": "system", "content": "Be brief."}


def test_the_templates_variables_of_a_row_are_those_of_its_trace(tmp_path):
    """Its instructions are a system turn, and what neither is, or has no place, is counted."""
    path, talk = tmp_path / "a.jsonl", [USER, APART]

    def read(given, form="messages", **row):
        dropped, row = Counter(), {"messages": talk, "chat_template_kwargs": given, **row}
        (one,) = imported(write_lines(path, row), form, dropped=dropped)
        said = [turn["content"] for turn in one.messages if turn["role"] == "system"]
        return one.thinking, one.template_args, said, list(dropped)

    given = {"custom_instructions": "You are Bob.", "enable_thinking": False, "python_tools": [], "xml_tools": None}
    assert read(given) == (False, {}, ["You are Bob."], [])
    assert read({"thinking": True, "reasoning_effort": "high"}) == (True, {"reasoning_effort": "high"}, [], [])
    assert read({"xml_tools": ["f"], "tokenize": True})[1:] == (
        {},
        [],
        ["a template's 'xml_tools'", "a template's 'tokenize'"],
    )
    assert read("x") == (None, {}, [], ["a 'chat_template_kwargs' column that is no object"])
    beside = "a template's system message beside a system turn"
    assert read({"system_message": "S"}, messages=[{"role": "system", "content": "T"}, *talk])[2:] == (["T"], [beside])
    assert read(given, system="S")[2:] == (["S"], [beside]) and read(given, system="You are Bob.")[3] == []
    assert read(None, tools=[{"name": "f"}])[3] == ["a 'tools' column"] and read(None, tools=[])[3] == []
    for form, row in (("open-r1", {"problem": "Q?", "generations": ["a"]}), ("text", {"text": "a"})):
        assert read(None, form, system="S", **row)[2:] == ([], ["a system message"])
        assert read({"enable_thinking": True}, form, **row) == (True, {}, [], [])


def test_tables_are_imported(tmp_path):
    """Turns in one of which a field is missing have it as null in all others of a table."""
    import datasets

    turns = [USER, {**APART, "reasoning_content": "Seven sixes.", "weight": 1}]
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(str(tmp_path / "a.parquet"))
    dropped = Counter()
    (one,) = imported(tmp_path / "a.parquet", "messages", dropped=dropped)
    assert one.completion == "<think>\nSeven sixes.\n</think>\nIt is 42." and one.messages == (USER,) and not dropped


def test_task_columns_make_traces_that_can_be_graded(tmp_path):
    row = {"messages": [USER, ASSISTANT], "nums": [3, 4, 6], "target": 30, "mine": 1}
    (one,) = imported(write_lines(tmp_path / "a.jsonl", row), "messages", "countdown")
    assert (one.id, one.columns) == ("countdown-3-4-6-to-30", {"nums": [3, 4, 6], "target": 30})
    (one,) = imported(
        write_lines(tmp_path / "b.jsonl", {**NATALIA, "messages": [USER, ASSISTANT]}), "messages", "gsm8k"
    )
    assert (one.id, one.columns) == (gsm8k.parse(NATALIA, "here").id, NATALIA)
    path, skipped = (
        write_lines(tmp_path / "c.jsonl", *({"text": "x", "answer": gold} for gold in ("4", "x^2"))),
        Counter(),
    )
    (one,) = imported(path, "text", "gsm8k", skipped=skipped)
    assert one.columns == {"answer": "4"} and skipped == {"no gsm8k answer in the row": 1}
    with pytest.raises(UserError, match=r"c.jsonl:1: 'nums' is missing; this row has text, answer"):
        imported(path, "text", "countdown")


def test_traces_of_one_question_share_its_id_and_are_numbered(tmp_path):
    other = {"messages": [{**USER, "content": "R?"}, ASSISTANT]}
    row, empty = {"messages": [USER, ASSISTANT]}, {"messages": [USER, {**ASSISTANT, "content": " "}]}
    unasked, skipped = {"messages": [ASSISTANT]}, Counter()
    channels = {"messages": [USER, {**ASSISTANT, "channel": "analysis"}, {**ASSISTANT, "channel": "final"}]}
    path = write_lines(tmp_path / "a.jsonl", row, other, empty, row, unasked, channels)
    one, two, three = imported(path, "messages", skipped=skipped)
    assert one.id == three.id != two.id and [one.sample, two.sample, three.sample] == [0, 0, 2]
    wanted = {"empty completion": 1, "no user's turn before the completion": 1}
    assert skipped == {**wanted, "two turns of the assistant in a row": 1}
    assert [trace.sample for trace in imported(path, "messages", split="train[1:2]")] == [0]


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("messages", {"messages": [USER]}, "no turn is the assistant's; messages needs a completion in every row"),
        ("messages", {"messages": "Q?"}, "the turns must be a list of {role, content} objects"),
        ("messages", {"messages": [{"role": "user"}]}, "the turns must be a list of {role, content} objects"),
        ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "a turn is from \"['user']\"; only human"),
        ("messages", {"messages": [{"role": "critic", "content": "x"}]}, "a turn is from 'critic'; only human, user"),
        ("messages", {"messages": [USER, {**ASSISTANT, "content": None}]}, "'content' must be a text, not NoneType"),
        ("sharegpt", {"conversations": [USER]}, "the turns must be a list of {from, value} objects"),
        ("alpaca", {"history": [["x"]], "instruction": "Q?", "output": "x"}, "'history' must be a list of [question,"),
        ("alpaca", {"history": [["x", 1]], "instruction": "Q?", "output": "x"}, "'history' must be a text, not int"),
        ("open-r1", {"problem": "Q?", "generations": "x"}, "'generations' must be a list of texts"),
        ("open-r1", {"problem": "Q?", "generations": [1]}, "'generations' must be a text, not int"),
        ("text", {"text": 5}, "'text' must be a text, not int"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, form, row, message):
    path = write_lines(tmp_path / "rows.jsonl", row)
    with pytest.raises(UserError, match=re.escape(f"{path}:1: {message}")):
        imported(path, form)


def test_unreadable_files_and_unknown_names(tmp_path):
    for name, content, message in (
        ("a.json", b"[1", "a.json:1: not JSON"),
        ("a.json", b"[1]", r"a.json\[0\]: expected an object"),
        ("a.json", b'[{"text": "\\ud83d"}]', r"a.json\[0\]: not valid Unicode"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
        ("a.txt", b"\xff", "a.txt: cannot be read .not UTF-8 text"),
        ("a.jsonl", b"x", "a.jsonl:1: not JSON"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            imported(tmp_path / name, "text")
    with pytest.raises(UserError, match="none.json: cannot be read"):
        imported(tmp_path / "none.json", "text")
    with pytest.raises(UserError, match="unknown format 'sharegtp': .* did you mean 'sharegpt'"):
        imported(tmp_path / "a.json", "sharegtp")
    with pytest.raises(UserError, match="unknown style 'keep'"):
        imported(tmp_path / "a.json", "text", style="keep")
    with pytest.raises(
        UserError, match="nobody/nothing could not be downloaded .*; pass a .jsonl, .json or .parquet file"
    ):
        imported("nobody/nothing", "text")


def test_a_part_of_a_hub_data_set(monkeypatch):
    def hub_rows(name, config, split, instead, part):
        assert (name, split) == ("nobody/set", "default")
        return ((f"{name}[{index}]", {"text": str(index)}) for index in part(10))

    monkeypatch.setattr(importing, "hub_rows", hub_rows)
    made = imported("nobody/set", "text", split="default[3:5]")
    assert [(one.completion, one.source) for one in made] == [("3", "nobody/set"), ("4", "nobody/set")]


def test_the_default_output_has_the_name_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importing, "hub_rows", lambda *_: iter([("here", {"text": "a"})]))
    write_lines(tmp_path / "a@b.jsonl", {"text": "a"})
    for data, name in (("nobody/set-1.1", "set-1.1"), ("nobody/set@main", "set"), ("a@b.jsonl", "a@b")):
        result = call("data", "import", data, "--format", "text")
        assert f"1 traces written to data/raw/{name}.jsonl" in result.stderr, result.output


def test_a_text_with_a_question_before_its_thought_is_left_unchanged(tmp_path):
    """The question is no part of the thought."""
    rendered = "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n<think>\na</think>b<|im_end|>"
    for text, completion in ((rendered, rendered), ("Q?\n<think>a", "Q?\n<think>a"), ("\n<think>a</think>b", NORMAL)):
        (one,) = imported(write_lines(tmp_path / "a.jsonl", {"text": text}), "text")
        assert one.completion == completion


def test_paragraphs_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("<think>one\ntwo</think>\n#### 3\n \n\nfour")
    one, two = imported(path, "text")
    assert (one.completion, two.completion) == ("<think>\none\ntwo\n</think>\n#### 3", "four")
    assert one.messages == () and one.id != two.id
    path.write_text("a\n\n<think>one\n\ntwo</think>\n")
    with pytest.raises(UserError, match=r"a.txt:3: a blank line within a thought; pass JSON lines"):
        imported(path, "text")
