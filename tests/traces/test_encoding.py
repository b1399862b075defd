"""Which tokens of a trace are learned, by the text around them."""

import json
import math
from dataclasses import replace
from itertools import groupby

import pytest
from factories import CHATML, ONE, PROMPT, make_tokenizer, wrap
from tokenizers.processors import TemplateProcessing

from mlx_traces.errors import UserError
from mlx_traces.records import Trace
from mlx_traces.tasks.thoughts import usual
from mlx_traces.traces import encoding
from mlx_traces.traces.score import own_probability
from mlx_traces.train.nano import build_tokenizer

OPENING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
STRIPPING = CHATML.replace("m['content'] }}", "m['content'].split('</think>')[-1] | trim }}")
CHAT = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2"},
)


def learned(template, messages, completion, **fields):
    """Return the text of an example and the learned parts of it, `|` before each."""
    loaded = wrap(make_tokenizer(template))
    example = encoding.encode(loaded, Trace("t", tuple(messages), completion, **fields), encoding.turn_end(loaded))
    text, inside = "", False
    for token, flag in zip(example.ids, example.trained, strict=True):
        text += "|" if flag and not inside else ""
        inside = flag
        text += loaded.tokenizer.decode([token])
        text += "|" if token in loaded.stop_ids and flag else ""
        inside = inside and token not in loaded.stop_ids
    return text


@pytest.mark.parametrize(
    ("template", "messages", "completion", "text"),
    [
        (CHATML, ONE, "It is 2", PROMPT + "|It is 2<|im_end|>|"),
        (
            CHATML,
            CHAT,
            "4",
            "<|im_start|>system\nS<|im_end|>\n" + PROMPT + "|2<|im_end|>|\n<|im_start|>user\n2+2<|im_end|>\n"
            "<|im_start|>assistant\n|4<|im_end|>|",
        ),
        # Spaces around an earlier turn, left there by this template, cut off by the next.
        (
            CHATML,
            [*ONE, {"role": "assistant", "content": " 2\n"}, *ONE],
            "2",
            PROMPT + "| 2\n<|im_end|>|\n" + PROMPT + "|2<|im_end|>|",
        ),
        (
            STRIPPING,
            [*ONE, {"role": "assistant", "content": " 2\n"}, *ONE],
            "2",
            PROMPT + "|2<|im_end|>|\n" + PROMPT + "|2<|im_end|>|",
        ),
        # A thought that the template takes out of an earlier turn: the turn is another one, and not learned.
        (
            STRIPPING,
            [*ONE, {"role": "assistant", "content": "<think>a</think>2"}, *ONE],
            "2",
            PROMPT + "2<|im_end|>\n" + PROMPT + "|2<|im_end|>|",
        ),
        # A thought that the template opens is not learned, and stands there once.
        (OPENING, ONE, "<think>\nb\n</think>\n2", PROMPT + "<think>\n|b\n</think>\n2<|im_end|>|"),
        (OPENING, ONE, "<think>b</think>2", PROMPT + "<think>\n|b</think>2<|im_end|>|"),
        (OPENING, ONE, "b</think>2", PROMPT + "<think>\n|b</think>2<|im_end|>|"),
        (OPENING, ONE, "2", PROMPT + "<think>\n|\n</think>\n\n2<|im_end|>|"),  # none of its own: closed first
        (None, ONE, " 2", "User: 1+1\n\nAssistant:| 2<|endoftext|>|"),
        (None, CHAT, " 4", "S\n\nUser: 1+1\n\nAssistant:| 2\n\nUser: 2+2\n\nAssistant:| 4<|endoftext|>|"),
        (None, [], "Text 2.", "|Text 2.<|endoftext|>|"),
        (CHATML, [], "Text 2.", "|Text 2.<|im_end|>|"),
        (CHATML, [], "<think>Text 2.", "|<think>Text 2."),
    ],
)
def test_learned_tokens(template, messages, completion, text):
    assert learned(template, messages, completion) == text


@pytest.mark.parametrize("messages", [[], ONE])
def test_an_end_that_the_tokenizer_appends_is_learned_once(messages):
    tokenizer = make_tokenizer(None)
    end = tokenizer.get_vocab()["<|endoftext|>"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    loaded = wrap(tokenizer)
    example = encoding.encode(loaded, Trace("t", tuple(messages), "Text 2."), encoding.turn_end(loaded))
    assert example.ids.index(end) == len(example.ids) - 1
    assert all(example.trained[-len("Text 2.") - 1 :])


THREE = [*ONE, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2"}]
EACH = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}"
END = "{% endif %}{% endfor %}{% if add_generation_prompt %}"
AROUND = {
    "spaces": (EACH + " {{ m.content | trim }} <|im_end|>" + END + "{% endif %}", "", " ", " "),
    "line ends": (EACH + "A:\n{{ m.content }}\n<|im_end|>\n" + END + "A:{% endif %}", "A:", "\n", "\n"),
    "frames": (EACH + "<out>{{ m.content }}</out><|im_end|>" + END + "{% endif %}", "", "<out>", "</out>"),
    "another head": (EACH + "B {{ m.content }}<|im_end|>" + END + "A {% endif %}", None, "", ""),
    "an empty thought": (EACH + "A<think></think>{{ m.content }}<|im_end|>" + END + "A{% endif %}", None, "", ""),
    "a thought in the prompt": (EACH + "A{{ m.content }}<|im_end|>" + END + "A<think>{% endif %}", None, "", ""),
}


@pytest.mark.parametrize("kind", AROUND)
def test_what_the_template_writes_around_an_answer_is_learned_with_it_in_every_turn(kind):
    template, opening, head, tail = AROUND[kind]
    text = learned(template, THREE, "4")
    assert f"|{head}2{tail}<|im_end|>|" in text and text.endswith(f"{head}4{tail}<|im_end|>|")
    if opening is not None:
        line = "\n" if kind == "line ends" else ""
        assert text == f"[1+1]{opening}|{head}2{tail}<|im_end|>|{line}[2+2]{opening}|{head}4{tail}<|im_end|>|"
    assert learned(template, THREE, f"{head}4{tail}") == text  # as it was sampled: nothing stands there twice


def pieces(prepend, template):
    """Make a tokenizer of SentencePiece's kind: a word begins with ▁, and with "always" every piece of a text does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*(chr(code) for code in range(33, 127)), "▁", "\n", "▁2", "▁4"]
    bpe = Tokenizer(models.BPE({c: at for at, c in enumerate(letters)}, [("▁", "2"), ("▁", "4")]))
    if prepend == "always":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend, split=False)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|endoftext|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", chat_template=template)


PLAINLY = EACH + "A:{{ m.content }}<|im_end|>" + END + "A:{% endif %}"


@pytest.mark.parametrize("template", [PLAINLY, *(AROUND[kind][0] for kind in ("spaces", "line ends", "frames"))])
@pytest.mark.parametrize("prepend", ["always", "first", "never", None])
def test_ids_are_those_of_the_template_whatever_the_tokenizer(prepend, template):
    tokenizer = make_tokenizer(template) if prepend is None else pieces(prepend, template)
    loaded = wrap(tokenizer)
    for turns in (ONE, THREE):
        example = encoding.encode(loaded, Trace("t", tuple(turns), "4"), encoding.turn_end(loaded))
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "4"}], return_dict=False)
        assert list(example.ids) == whole[: len(example.ids)]  # which may go on with a line end
        end = loaded.tokenizer.get_vocab()["<|im_end|>"]
        assert example.ids[-1] == end and example.trained[-1] and end not in whole[len(example.ids) :]
        said = [token for token, flag in zip(example.ids, example.trained, strict=True) if flag]
        assert said.count(end) == 1 + (turns is THREE)
        assert sum("4" in token for token in tokenizer.convert_ids_to_tokens(said)) == 1


def test_ids_without_the_places_of_tokens_are_the_same(monkeypatch):
    from mlx_traces.models.chat import Chat

    def example():
        loaded = wrap(pieces("always", AROUND["spaces"][0]))
        return encoding.encode(loaded, Trace("t", tuple(THREE), "4"), encoding.turn_end(loaded))

    known = example()
    monkeypatch.setattr(Chat, "_places", lambda *_: None)  # as tokenizers that are written in Python
    assert example() == known


CHANNELS = EACH + "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|im_end|>" + END
CHANNELS += "<|start|>assistant{% endif %}"
UNTAGGED = PLAINLY.replace("A:{% endif %}", "A:Here are my reasoning steps:\n{% endif %}")
ELSEWHERE = {  # an earlier turn's thought is missing, in the answer's frame, after an empty one, or in other tags
    "stripped": STRIPPING,
    "channels": CHANNELS,
    "framed": AROUND["frames"][0],
    "empty thought": AROUND["an empty thought"][0],
    "other tags": UNTAGGED,
    "closed": CHATML.replace("assistant\n{% endif %}", "assistant\n</think>{% endif %}").replace(
        "{{ m['content'] }}", "{{ '</think>' if m.role == 'assistant' }}{{ m['content'] }}"
    ),
}


@pytest.mark.parametrize("kind", [*ELSEWHERE, "as written", "opened"])
def test_an_earlier_thought_is_learned_only_where_the_model_would_write_it_and_else_counted(kind):
    template = {**ELSEWHERE, "as written": CHATML, "opened": OPENING}[kind]
    said, loaded = "<think>\na\n</think>\n2", wrap(make_tokenizer(template))
    thought = [*ONE, {"role": "assistant", "content": said}, *ONE]
    encoded = encoding.encode_all(loaded, [("f:1", Trace("t", tuple(thought), "4"))], 500, "refuse")
    (example,) = encoded.examples
    text = loaded.tokenizer.decode([token for token, own in zip(example.ids, example.trained, strict=True) if own])
    if kind in ELSEWHERE:
        assert encoded.turns == 1 and "a" not in text.replace("<|channel|>final<|message|>", "")
        assert "1 earlier turns of the assistant are not learned" in encoding.describe(encoded, 9)[0]
    else:
        assert encoded.turns == 0 and text.startswith(f"{said}<|im_end|>")


SWITCHED = CHATML.replace(
    "assistant\n{% endif %}", "assistant\n{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)


def test_a_thought_is_learned_after_a_prompt_that_leaves_it_room():
    loaded = wrap(make_tokenizer(SWITCHED))
    traces = [("f:1", Trace("t", tuple(ONE), "<think>b</think>2")), ("f:2", Trace("t", tuple(ONE), "2"))]
    encoded = encoding.encode_all(loaded, traces, 500, "refuse")
    texts = [loaded.tokenizer.decode(example.ids) for example in encoded.examples]
    assert texts == [PROMPT + "<think>b</think>2<|im_end|>", PROMPT + "</think>2<|im_end|>"] and encoded.thinking == 1
    assert "1 traces with a thought" in encoding.describe(encoded, 500)[0]
    with pytest.raises(UserError, match=r"f:1: the completion has a thought, .* leaves it no room; set thinking"):
        encoding.encode_all(loaded, traces, 500, "refuse", thinking=False)
    for shut in (True, False):  # nothing to switch
        loaded = wrap(make_tokenizer(OPENING.replace("<think>\n", "<think></think>" if shut else "</think>")))
        with pytest.raises(UserError, match="no thinking switch; leave such traces out"):
            encoding.encode_all(loaded, traces, 500, "refuse")


def test_the_switch_is_the_traces_or_the_trainings():
    loaded = wrap(make_tokenizer(SWITCHED))
    for own, given, thinks in ((None, None, False), (True, None, True), (None, True, True), (True, False, False)):
        opened = "<think>" if thinks else "</think>"
        trace = Trace("t", tuple(ONE), "b</think>2" if thinks else "2", thinking=own)
        example = encoding.encode_all(loaded, [("f:1", trace)], 500, "refuse", given).examples[0]
        assert PROMPT + opened in loaded.tokenizer.decode(example.ids)


def test_the_templates_variables_are_the_traces_or_the_models():
    loaded = wrap(make_tokenizer("{{ effort | default('low') }}" + CHATML))
    trace = Trace("t", tuple(ONE), "2", template_args={"effort": "high"})
    for changes, text in (({}, "high"), ({"template_args": {"effort": "some"}}, "some")):
        example = encoding.encode(replace(loaded, **changes), trace, encoding.turn_end(loaded))
        assert loaded.tokenizer.decode(example.ids).startswith(text)
    assert Trace.from_row(json.loads(json.dumps(trace.to_row())), "f:1") == trace
    for name, value in (("thinking", "yes"), ("template_args", [1])):
        with pytest.raises(UserError, match=f"f:1: '{name}' must be"):
            Trace.from_row({**trace.to_row(), "messages": ONE, name: value}, "f:1")


def test_a_trace_of_ones_own_is_learned_by_its_tokens():
    loaded = wrap(make_tokenizer())
    s, t, end = (loaded.tokenizer.get_vocab()[token] for token in ("S", "T", "<|im_end|>"))
    trace = Trace(
        "t", tuple(ONE), "ST", completion_ids=(s, t, end), finish_reason="stop"
    )  # which is one token, usually
    ends = encoding.turn_end(loaded)
    assert encoding.encode(loaded, trace, ends).ids[-3:] == (s, t, end)
    assert encoding.encode(loaded, replace(trace, completion="It is ST"), ends).ids[-3:] == (s, t, end)  # a prefill
    for other in ({"completion": "STO"}, {"completion_ids": (10**6, end)}, {"completion_ids": ("S", end)}):
        assert encoding.encode(loaded, replace(trace, **other), ends).ids[-2:] != (t, end)  # another tokenizer's


def test_what_was_put_into_a_thought_is_not_learned():
    loaded = wrap(make_tokenizer())
    ids = loaded.tokenizer.encode("<think>\nab\n</think>\n\n5<|im_end|>", add_special_tokens=False)
    forced = tuple(range(4, 8))
    trace = Trace("t", tuple(ONE), "<think>\nab\n</think>\n\n5", completion_ids=tuple(ids), forced=forced)
    trace = replace(trace, finish_reason="stop", logprobs=tuple(None if i in forced else -1.0 for i in range(len(ids))))
    example = encoding.encode(loaded, trace, encoding.turn_end(loaded))
    learned = example.trained[-len(ids) :]
    assert [place for place, own in enumerate(learned) if not own] == list(forced)
    again = Trace.from_row(json.loads(json.dumps(trace.to_row())), "f:1")
    assert again == trace and own_probability(again) == pytest.approx(math.exp(-1))


def left_out(loaded, trace):
    """Return the text of each run of tokens after the prompt that are not learned."""
    prompt = len(loaded.chat.prompt([dict(turn) for turn in trace.messages]).ids) if trace.messages else 0
    example = encoding.encode(loaded, trace, encoding.turn_end(loaded))
    assert not any(example.trained[:prompt]) and (example.trained[-1] or trace.finish_reason == "length")
    own = list(zip(example.ids, example.trained, strict=True))[prompt:]
    runs = [[token for token, _ in run] for learned, run in groupby(own, lambda pair: pair[1]) if not learned]
    return [loaded.tokenizer.decode(run) for run in runs]


def bounded(text, *words, **fields):
    """Make another model's trace; the words were put into it, the text before the first one was not."""
    spans = tuple((text.index(word), text.index(word) + len(word)) for word in words)
    return Trace("t", fields.pop("messages", tuple(ONE)), text, forced=(1,), forced_text=spans, **fields)


THOUGHT = "<think>\nb\n</think>\n2"


@pytest.mark.parametrize(
    ("template", "completion", "text"),
    [
        (
            CHANNELS,
            THOUGHT,
            "|<|channel|>analysis<|message|>b<|end|><|start|>assistant<|channel|>final<|message|>2<|im_end|>|",
        ),
        (CHANNELS, "2", "|<|channel|>final<|message|>2<|im_end|>|"),
        (UNTAGGED, THOUGHT, "A:Here are my reasoning steps:\n|b\n[BEGIN FINAL RESPONSE]\n2<|im_end|>|"),
        (UNTAGGED, "2", "A:Here are my reasoning steps:\n|\n[BEGIN FINAL RESPONSE]\n2<|im_end|>|"),
    ],
)
def test_a_thought_is_learned_as_the_model_writes_it(template, completion, text):
    assert learned(template, ONE, completion).endswith(text)


def test_a_thought_that_was_cut_off_stays_in_its_channel():
    text = learned(CHANNELS, ONE, "<think>\nb", finish_reason="length")
    assert text.endswith("<|start|>assistant|<|channel|>analysis<|message|>b")


FRAMED = AROUND["frames"][0]


@pytest.mark.parametrize(
    ("template", "prompt", "text"),
    [
        (OPENING, PROMPT + "<think>\n", "b"),
        (SWITCHED, PROMPT + "<think>", "\nb"),
        (CHATML, PROMPT, "<think>\nb"),
        (FRAMED, "[1+1]", "<think>\nb"),
        (CHANNELS, "[1+1]<|start|>assistant", "<|channel|>analysis<|message|>b"),
        (UNTAGGED, "[1+1]A:Here are my reasoning steps:\n", "b"),
    ],
)
def test_an_open_thought_is_learned_as_a_thought_without_an_end_unless_it_stopped_there(template, prompt, text):
    for finish, end in ((None, ""), ("length", ""), ("stop", "<|im_end|>|")):
        assert learned(template, ONE, "<think>\nb", finish_reason=finish) == f"{prompt}|{text}{end}"


WAITED, CLOSED = "<think>\nab yesWait, 5+\n</think>\n\nSo: 4 2", "\n</think>\n\nSo:"


@pytest.mark.parametrize(
    ("template", "put"),
    [
        (CHATML, ["Wait,", CLOSED]),
        (OPENING, ["Wait,", CLOSED]),
        (None, ["Wait,", CLOSED]),
        (CHANNELS, ["Wait,", "<|end|><|start|>assistant<|channel|>final<|message|>So:"]),
        (UNTAGGED, ["Wait,", "\n[BEGIN FINAL RESPONSE]\n\nSo:"]),
        *((AROUND[kind][0], ["Wait,", CLOSED]) for kind in ("spaces", "line ends", "another head")),
        (AROUND["frames"][0], ["Wait,", "\n</think><out>So:"]),
    ],
)
def test_what_was_put_into_another_models_thought_is_not_learned(template, put):
    loaded = wrap(make_tokenizer(template))
    trace = bounded(WAITED, "Wait,", CLOSED)
    assert left_out(loaded, trace) == put
    assert left_out(loaded, replace(trace, finish_reason="length")) == put
    assert left_out(loaded, replace(trace, forced=None)) == put  # rewritten since
    assert left_out(loaded, replace(trace, forced=None, forced_text=None)) == []
    shifted = tuple((start + 1, end + 1) for start, end in trace.forced_text)
    assert left_out(loaded, replace(trace, forced_text=shifted)) != put


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_no_token_that_has_a_part_of_the_words_is_learned(prepend):
    loaded = wrap(pieces(prepend, PLAINLY))
    assert left_out(loaded, bounded(WAITED, "Wait,", CLOSED)) == ["Wait,", CLOSED]
    assert left_out(loaded, bounded(WAITED, "Wait,", CLOSED + " ")) == ["Wait,", CLOSED + " 4"]  # a token "▁4"
    assert left_out(loaded, bounded("4Wait 2", "Wait")) == ["Wait"]
    assert left_out(loaded, bounded("ab Wait, 2", "Wait,", messages=())) == ["Wait,"]
    merging = wrap(make_tokenizer())  # whose tokens are ST and OP
    assert left_out(merging, bounded("<think>aSTOP", "TO", finish_reason="length")) == ["STOP"]
    assert left_out(merging, bounded("<think>a</think>SSTOP", "</think>S")) == ["</think>S"]
    assert left_out(merging, bounded("<think>a</think>STOP", "</think>S")) == ["</think>ST"]
    assert left_out(merging, bounded("aSTOP", "S", messages=())) == ["ST"]


def test_nanos_own_tokens_and_characters_of_several_tokens():
    nano = wrap(build_tokenizer())
    text = "<think>\n3 + 2 = 5, né 🙂 so no\n</think>\n<answer>3 + 2</answer>"
    trace = bounded(text, " 🙂", "\n</think>\n<answer>")
    assert left_out(nano, trace) == [" 🙂", " no\n</think>\n<answer>"]  # a token
    assert left_out(nano, bounded(text, "é")) == ["é"]


def test_a_trace_that_does_not_say_which_words_were_put_there_is_the_samplers_alone():
    loaded = wrap(make_tokenizer())
    ids = tuple(loaded.tokenizer.encode("aWait2<|im_end|>", add_special_tokens=False))
    old = Trace("t", tuple(ONE), "aWait2", completion_ids=ids, forced=(1, 2, 3, 4), finish_reason="stop")
    assert left_out(loaded, old) == ["Wait"]
    with pytest.raises(UserError, match=r"f:7: tokens were forced .* train that model, or generate the trace anew$"):
        encoding.encode_all(loaded, [("f:7", replace(old, completion_ids=(10**6,)))], 500, "refuse")
    with pytest.raises(UserError, match="tokens were forced"):
        encoding.encode(loaded, replace(old, completion_ids=None, messages=()), None)


def test_a_trace_without_a_token_to_learn_is_left_out():
    loaded = wrap(make_tokenizer())
    traces = [("f:1", bounded("Wait", "Wait", finish_reason="length")), ("f:2", bounded("a Wait", "Wait"))]
    encoded = encoding.encode_all(loaded, traces, 500, "refuse")
    assert len(encoded.examples) == encoded.empty == 1
    assert encoding.describe(encoded, 500) == ["1 traces have no token to learn and are left out"]


@pytest.mark.parametrize("tags", [("<longcat_think>", "</longcat_think>"), ("<hm>", "</hm>")])
def test_a_thought_is_learned_in_the_models_own_tags(tags):
    loaded = wrap(make_tokenizer(PLAINLY))
    loaded.tokenizer._think_start, loaded.tokenizer._think_end = tags
    end = encoding.turn_end(loaded)
    ids = encoding.encode(loaded, Trace("t", tuple(ONE), THOUGHT), end).ids
    said = f"{tags[0]}\nb\n{tags[1]}\n2"
    assert loaded.tokenizer.decode(ids).endswith(f"A:{said}<|im_end|>")
    own = (*loaded.tokenizer.encode(said + "!", add_special_tokens=False)[:-1], end)
    generated = Trace("t", tuple(ONE), usual(said, loaded.own_tags), completion_ids=own, finish_reason="stop")
    assert encoding.encode(loaded, generated, end).ids[-len(own) :] == own
    assert left_out(loaded, bounded(WAITED, "Wait,", CLOSED)) == ["Wait,", f"\n{tags[1]}\n\nSo:"]


@pytest.mark.parametrize("pair", [("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>")])
def test_a_thought_is_learned_in_tags_of_the_vocabulary_that_the_tokenizer_does_not_name(pair):
    tokenizer = make_tokenizer(PLAINLY)
    tokenizer.add_tokens([*pair])
    loaded = wrap(tokenizer)
    loaded.tokenizer._think_start = loaded.tokenizer._think_end = None
    assert loaded.chat.tags is None  # <think> is a token of it
    loaded = wrap(pieces("never", PLAINLY))
    for tag in pair:
        assert loaded.tokenizer.think_start is loaded.chat.tags is None
        loaded.tokenizer._tokenizer.add_tokens([tag])
    assert loaded.chat.tags == pair
    ids = encoding.encode(loaded, Trace("t", tuple(ONE), THOUGHT), encoding.turn_end(loaded)).ids
    assert loaded.tokenizer.decode(ids).endswith(f"A:{pair[0]}\nb\n{pair[1]}\n2<|im_end|>")
    assert not loaded.chat.prompt([dict(turn) for turn in ONE]).thoughtless


def test_one_turn_is_learned_where_three_are_refused():
    refuses = "{% if messages | length > 2 %}{{ raise_exception('No more') }}{% endif %}" + CHATML
    assert learned(refuses, ONE, "2") == PROMPT + "|2<|im_end|>|"
    assert learned("{% if messages | length > 1 %}{{ raise_exception('No') }}{% endif %}" + CHATML, ONE, "2").endswith(
        "|2<|endoftext|>|"
    )


def test_a_completion_that_was_cut_off_has_no_end_to_learn():
    assert learned(CHATML, ONE, "It", finish_reason="stop") == PROMPT + "|It<|im_end|>|"
    assert learned(CHATML, ONE, "It", finish_reason="length") == PROMPT + "|It"


def test_prompt_tokens_are_those_of_sampling():
    loaded = wrap(make_tokenizer())
    for messages in (ONE, CHAT):
        rendered = loaded.chat.prompt([dict(turn) for turn in messages])
        example = encoding.encode(loaded, Trace("t", tuple(messages), "STOP"), encoding.turn_end(loaded))
        assert example.ids[: len(rendered.ids)] == rendered.ids
        # The completion's tokens are its own: no merge across the border.
        assert example.ids[len(rendered.ids) :] == (*loaded.tokenizer.encode("STOP"), encoding.turn_end(loaded))


def test_first_token_of_the_text_is_kept_in_a_chat_without_template():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(None)
    start = tokenizer.get_vocab()["<|im_start|>"]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    loaded = wrap(tokenizer)
    for messages in (ONE, CHAT):
        example = encoding.encode(loaded, Trace("t", tuple(messages), " 4"), encoding.turn_end(loaded))
        assert example.ids[0] == start and example.ids.count(start) == 1
        prompt = loaded.chat.prompt([dict(turn) for turn in messages]).ids
        assert example.ids[: len(prompt)] == prompt and sum(example.trained[len(prompt) :]) == len(example.ids) - len(
            prompt
        )


def test_a_turn_that_is_not_to_be_learned_is_not():
    loaded = wrap(make_tokenizer())
    turns = (*ONE, {"role": "assistant", "content": "bad"}, *ONE, {"role": "assistant", "content": "good"}, *ONE)
    end = encoding.turn_end(loaded)
    places = {"bad": len(ONE), "good": 2 * len(ONE) + 1}
    for left_out in ((), (places["bad"],), (places["good"],), tuple(places.values())):
        example = encoding.encode(loaded, Trace("t", turns, "last", not_learned=left_out or None), end)
        learned = loaded.tokenizer.decode([i for i, own in zip(example.ids, example.trained, strict=True) if own])
        assert [word in learned for word in ("bad", "good")] == [places[word] not in left_out for word in places]
        assert "last" in learned


def test_turn_end_is_what_the_template_writes():
    vocabulary = make_tokenizer().get_vocab()
    assert encoding.turn_end(wrap(make_tokenizer())) == vocabulary["<|im_end|>"]
    assert encoding.turn_end(wrap(make_tokenizer(None))) == vocabulary["<|endoftext|>"]
    none = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert encoding.turn_end(wrap(make_tokenizer(none))) == vocabulary["<|endoftext|>"]
    loaded = wrap(make_tokenizer(None))
    loaded.tokenizer._tokenizer.eos_token = None
    with pytest.raises(UserError, match="names no token that ends a text"):
        encoding.turn_end(replace(loaded, stop_ids=frozenset()))


def test_over_long_traces():
    loaded = wrap(make_tokenizer())
    traces = [(f"f:{i}", Trace(f"t{i}", tuple(ONE), "x" * n)) for i, n in enumerate((5, 50, 1))]
    longest = len(encoding.encode(loaded, traces[0][1], 0).ids)
    skipped = encoding.encode_all(loaded, traces, longest, "skip")
    assert [e.id for e in skipped.examples] == ["t0", "t2"] and (skipped.over_long, skipped.cut) == (1, 0)
    assert encoding.describe(skipped, longest) == [
        f"1 traces have more than {longest} tokens and are left out (max_length)"
    ]
    cut = encoding.encode_all(loaded, traces, longest, "cut")
    assert [len(e.ids) for e in cut.examples] == [longest, longest, longest - 4] and cut.cut == 1
    assert cut.examples[1].count == 6  # five letters and a sixth in place of the stop token
    assert "1 traces were cut" in encoding.describe(cut, longest)[0]
    none_left = encoding.encode_all(loaded, traces, longest - 6, "cut")
    assert none_left.examples == [] and none_left.over_long == 3  # the prompt alone teaches nothing
    with pytest.raises(UserError, match=f"f:1: .* more than max_length {longest}"):
        encoding.encode_all(loaded, traces, longest, "refuse")
    with pytest.raises(UserError, match="f:9: 'completion' is empty"):
        encoding.encode_all(loaded, [("f:9", Trace("t", tuple(ONE), " \n"))], 99, "skip")
