"""Bounds on thoughts: against a loop that reads the whole text at every token, in every way to decode."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from factories import make_model, make_tokenizer, wrap

from mlx_traces.diagnostics import bench_graph, graph
from mlx_traces.engine import generation, sampling
from mlx_traces.engine.generation import generate
from mlx_traces.engine.mlx_lm_fallback import generate_plainly
from mlx_traces.engine.sampling import Ending, Request, SamplingParams, decode, text_of, uniforms_of
from mlx_traces.engine.thinking import NONE, Reader, Thinking
from mlx_traces.errors import UserError
from mlx_traces.models import loading
from mlx_traces.tasks.thoughts import SKY, TAGS, after_last
from mlx_traces.train.nano import build_tokenizer

LENGTHS = (3, 41, 7, 1, 29, 12, 5, 60, 2, 17, 33, 8)


def requests(opened="<think>\n"):
    draw = np.random.default_rng(3)
    prompts = [tuple(draw.integers(0, 98, length).tolist()) for length in LENGTHS]
    return [Request(prompt, seed, opened) for seed, prompt in enumerate(prompts)]


def run(loaded, asked, params, rows=32, logprobs=False, engine=generate):
    found = dict(engine(loaded, asked, params, rows, logprobs=logprobs))
    return [found[index] for index in range(len(asked))]


def by_text(loaded, request, params, closing, tag, found):
    """Complete a prompt greedily, reading the whole text for each token.

    One forward pass over the tokens ``found`` says what the model draws after each of them, which counts up to where
    the completion differs from them.
    """
    drawn = mx.argmax(loaded.model(mx.array([[*request.prompt_ids, *found]]))[0, len(request.prompt_ids) - 1 :], -1)
    drawn = iter(drawn.tolist())
    ids, forced, queue, outside, budget = [], [], [], 0, params.think_tokens
    more = loaded.tokenizer.encode(params.think_more, add_special_tokens=False)
    thought, closing_now = 0, False
    while True:
        said = request.opened + decode(loaded.tokenizer, ids)
        thinking = after_last(said)[1]
        if budget is not None and thinking and thought >= budget and not closing_now:
            queue, closing_now = list(closing), True
        token = next(drawn)
        if not queue and thinking and thought < params.think_at_least:
            ended = (
                tag
                in decode(loaded.tokenizer, [*ids, token])[max(0, len(decode(loaded.tokenizer, ids)) - len(tag) + 1) :]
            )
            if token in loaded.stop_ids or ended:
                queue = list(more)
        if queue:
            token = queue.pop(0)
            forced.append(len(ids))
        inside = thinking and not closing_now
        thought, outside = thought + inside, outside + (not inside or budget is None)
        closing_now = closing_now and bool(queue)
        ids.append(token)
        if token in loaded.stop_ids or outside == params.max_tokens:
            return tuple(ids), tuple(forced)


@pytest.fixture(scope="module")
def thinker():
    """A random model that often writes the tags of a thought and the stop token."""
    model, tokenizer = make_model(seed=6), make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    rare = [vocabulary[token] for token in ("<think>", "</think>", "<|im_end|>")]
    weights = model.model.embed_tokens.weight
    weights[mx.array(rare)] = weights[mx.array(rare)] * 1.3
    model.model.embed_tokens.weight = weights
    mx.eval(model.parameters())
    return wrap(tokenizer, model)


BOUNDS = [
    {"think_tokens": 0},
    {"think_tokens": 1},
    {"think_tokens": 7},
    {"think_tokens": 12, "think_at_least": 9},
    {"think_tokens": 6, "think_at_least": 6, "think_more": "Wait, wait"},
    {"think_at_least": 12},
    {"think_tokens": 7, "think_then": "So:"},
]


@pytest.mark.parametrize(
    ("opened", "first", "batches"), [("<think>\n", 1, (3, 32)), ("<think>", 5, (1,)), ("", 1, (3, 32))]
)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_every_batch_has_the_tokens_that_a_loop_over_whole_texts_has(thinker, bounds, opened, first, batches):
    asked, params = requests(opened)[first:7], SamplingParams(12, **bounds)
    closing = thinker.tokenizer.encode("\n</think>\n\n" + params.think_then, add_special_tokens=False)
    for rows in batches:
        found = run(thinker, asked, params, rows)
        assert any(rollout.forced for rollout in found)
        for request, rollout in zip(asked, found, strict=True):
            expected = by_text(thinker, request, params, closing, "</think>", rollout.completion_ids)
            assert (rollout.completion_ids, rollout.forced) == expected, rows
    for rollout in found:
        shown = "".join(rollout.text[start:stop] for start, stop in rollout.forced_text)
        put = decode(thinker.tokenizer, [rollout.completion_ids[place] for place in rollout.forced])
        assert shown == put and set(put) <= set("\n</think>" + params.think_more + params.think_then)
        assert put.endswith(params.think_then) or len(rollout.forced) < len(closing)


def test_a_tag_of_several_tokens_is_found_where_it_ends(thinker, monkeypatch):
    plain = run(thinker, requests(""), SamplingParams(40))
    texts = [rollout.text for rollout in plain]
    pairs = {text[at : at + 2].lower() for text in texts for at in range(len(text) - 1) if text[at : at + 2].isascii()}
    tag = max((pair for pair in pairs if "<" not in pair), key=lambda pair: sum(pair in text.lower() for text in texts))
    monkeypatch.setattr(type(thinker), "own_tags", ("<hm>", tag))
    asked, bounds = requests("<hm>"), {"think_tokens": 24, "think_at_least": 20}
    found = run(thinker, asked, SamplingParams(16, **bounds))
    assert any(rollout.forced and rollout.forced[0] < 20 for rollout in found)
    for rollout in found:
        thought = decode(thinker.tokenizer, rollout.completion_ids[:20]).lower()
        assert tag not in thought.replace("wait", "\0") and len(rollout.completion_ids) > 20
    assert run(thinker, asked, SamplingParams(16, **bounds), 4) == found
    assert run(thinker, asked[:4], SamplingParams(16, **bounds), 4, engine=plainly) == found[:4]


def plainly(loaded, asked, params, rows, logprobs):
    return generate_plainly(loaded, list(asked), [params] * len(asked), rows, logprobs)


def one_at_a_time(*given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_traces.engine.mlx_lm_fallback.prompts_together", lambda model: 0)
        yield from plainly(*given)


@pytest.mark.parametrize("bounds", BOUNDS[3:5], ids=str)
def test_every_way_to_decode_has_the_same_tokens(thinker, bounds, monkeypatch):
    asked, params = [request for request in requests()[4:7] for _ in range(2)], SamplingParams(9, 1.0, **bounds)
    asked = [replace(request, seed=seed) for seed, request in enumerate(asked)]
    expected = [r.completion_ids for r in run(thinker, asked, params, 1)]

    def ids(rows=4, **more):
        return [rollout.completion_ids for rollout in run(thinker, asked, params, rows, **more)]

    assert ids(6) == ids() == ids(logprobs=True) == expected
    for engine in (plainly, one_at_a_time):
        own = dict(engine(thinker, asked[1:5], params, 3, False))
        assert [own[index].completion_ids for index in range(4)] == expected[1:5]
    monkeypatch.setattr(generation, "DROP", 1.0)  # rows are dropped at every end, and others join one by one
    monkeypatch.setattr(generation, "WAVE", 32)
    assert ids() == expected
    monkeypatch.setattr(generation.fused, "step_of", lambda *_: None)
    assert ids() == expected


def test_a_row_that_is_drawn_again_keeps_its_bounds(thinker, monkeypatch):
    params = SamplingParams(18, 1.5, top_p=0.999, think_tokens=9, think_at_least=6)
    expected = run(thinker, requests()[:5], params, 1)
    monkeypatch.setattr(generation, "CANDIDATES", 1)
    assert [r.completion_ids for r in run(thinker, requests()[:5], params)] == [r.completion_ids for r in expected]


def test_rows_with_and_without_bounds_share_a_batch(thinker):
    asked = requests()[:7]
    each = [SamplingParams(18, think_tokens=3) if index % 2 else SamplingParams(24) for index in range(len(asked))]
    each[2] = SamplingParams(2, think_tokens=0)  # it ends within the closing tag; a row without bounds takes its slot
    found = run(thinker, asked, each, 4)
    alone = [run(thinker, [request], params)[0] for request, params in zip(asked, each, strict=True)]
    assert found == alone and found[4] == run(thinker, asked[4:5], SamplingParams(24))[0]


def test_forced_tokens_have_no_logprobs_and_the_others_have_theirs(thinker):
    params = SamplingParams(18, 1.0, think_tokens=5, think_at_least=3)
    for engine in (generate, plainly):
        for rollout in run(thinker, requests()[:4], params, 3, True, engine):
            ids = mx.array([[*rollout.prompt_ids, *rollout.completion_ids]])
            logits = thinker.model(ids)[0, len(rollout.prompt_ids) - 1 : -1].astype(mx.float32)
            exact = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            for place, token in enumerate(rollout.completion_ids):
                if place in rollout.forced:
                    assert rollout.logprobs[place] is None and rollout.model_logprobs[place] is None
                else:
                    assert rollout.logprobs[place] == pytest.approx(exact[place, token], abs=1e-4)


def test_the_answer_has_its_own_limit(thinker):
    silent = replace(thinker, stop_ids=frozenset())
    for budget in (0, 3, 11):
        for rollout in run(silent, requests(), SamplingParams(10, think_tokens=budget)):
            closed = rollout.forced[0] if rollout.forced else budget
            assert rollout.finish_reason == "length" and 10 <= len(rollout.completion_ids) <= 10 + budget
            assert len(rollout.completion_ids) == 10 + budget or closed > budget or "</think>" in rollout.text[:40]
    for rollout in run(silent, requests("<think>x</think>"), SamplingParams(10, think_tokens=99)):
        assert len(rollout.completion_ids) == 10 or "<think>" in rollout.text  # no thought, or another one


def test_a_budget_does_not_change_the_random_numbers():
    with_budget, without = SamplingParams(10, 1.0, think_tokens=11), SamplingParams(10, 1.0)
    request = Request((1,), 5)
    assert uniforms_of(request, with_budget)[:10].tolist() == uniforms_of(request, without).tolist()


# ------------------------------------------------------------------------------------------ tags, token by token


def fed(reader, opened, ids):
    state = reader.begun(opened)
    for token in ids:
        state = reader.after(state, token)
    return state


@pytest.mark.parametrize("pair", TAGS, ids=lambda pair: pair[0])
def test_every_tag_is_read_in_any_tokens_and_closed_by_its_own(pair):
    opening, closing = pair
    tokenizer = wrap(build_tokenizer()).tokenizer  # every byte is a token
    reader = Reader(tokenizer, None)
    for opened, text in ((opening + "\n", ""), ("", opening.upper() + "a < b")):
        if not opened and opening == TAGS[-1][0]:
            continue
        state = fed(reader, opened, tokenizer.encode(text, add_special_tokens=False))
        assert reader.tags[state[0]][1] == closing, (opened, text)
        for end in (closing, closing[:-1] + "?" + closing):
            ids = tokenizer.encode("thought " + end, add_special_tokens=False)
            before = fed(reader, opened, [*tokenizer.encode(text, add_special_tokens=False), *ids[:-1]])
            assert before[0] == state[0] and reader.closes(before, ids[-1])
            assert ids[-1] in reader.closers(before)
            assert reader.after(before, ids[-1])[0] == NONE
        thought = Thinking(reader, opening, 30, 2)
        put = [thought.take(5) for _ in range(2)]
        while thought.next != NONE:
            put.append(thought.take(5))
        said = opening + decode(tokenizer, put)
        assert said.count(closing) == 1 and after_last(said)[0].strip() == "" and not after_last(said)[1]
        assert thought.state == (NONE, b"") and (pair != SKY or said.endswith("\n\n<|end_of_thought|>\n\n"))


def test_a_tag_that_never_closes_itself_is_closed_once(thinker, monkeypatch):
    """Some tokenizers write a tag otherwise than they read it."""
    monkeypatch.setattr(Reader, "closing", lambda self, state, then: [7, 8])
    found = [rollout for rollout in run(thinker, requests(), SamplingParams(18, think_tokens=2)) if rollout.forced]
    assert any(rollout.forced[:2] == (2, 3) for rollout in found)
    for rollout in found:
        assert all(rollout.completion_ids[place] == 7 + at % 2 for at, place in enumerate(rollout.forced))
        assert rollout.forced[2:3] != (rollout.forced[0] + 2,), rollout  # a token is drawn after the tag


def test_a_closing_tag_may_end_in_a_letter_of_any_case():
    tokenizer = wrap(build_tokenizer()).tokenizer
    reader = Reader(tokenizer, ("<hm>", "</hm"))
    state = fed(reader, "<hm>", tokenizer.encode("</h", add_special_tokens=False))
    ends = {token for letter in "mM" for token in tokenizer.encode(letter, add_special_tokens=False)}
    assert len(ends) == 2 and ends <= {*reader.closers(state)}


def test_many_forced_tokens_are_found_in_the_text_without_decoding_it_for_each(monkeypatch):
    loaded = wrap(build_tokenizer())
    ids = loaded.tokenizer.encode("24 語🙂 no\n" * 60, add_special_tokens=False)
    forced, decoded = [place for place in range(len(ids)) if place % 7 in (0, 1, 4)], []
    ending = Ending(loaded, Request((1,), 0, "<think>"), SamplingParams(len(ids), think_at_least=len(ids)))
    ending.thought.forced = forced
    prefixes = [len(text_of(loaded, ids[:place])) for place in range(len(ids) + 1)]
    monkeypatch.setattr(sampling, "decode", lambda *given: decoded.append(len(given[1])) or decode(*given))
    found = ending.rollout(ids).forced_text
    runs = [(at, at + 1 + (at + 1 in forced)) for at in forced if at - 1 not in forced]
    assert found == tuple((prefixes[first], prefixes[after]) for first, after in runs)
    assert sum(decoded) < 40 * len(ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"think_tokens": -1}, "must be 0 or above"),
        ({"think_tokens": 3, "think_at_least": 4}, "think_at_least 4 is above think_tokens 3"),
        ({"think_at_least": 4, "think_more": ""}, "think_more is empty"),
        ({"think_tokens": 600}, "more exceed"),
    ],
)
def test_bad_bounds(thinker, changes, message):
    with pytest.raises(UserError, match=message):
        generate(thinker, requests(), SamplingParams(18, **changes))


# ------------------------------------------------------------------------------------------ cost


def test_bounds_add_no_pass_over_the_vocabulary_and_few_kernels(monkeypatch):
    """A step with every row forced, with every row guarded, and with neither, against one without bounds."""
    with graph.uncomputed():
        loaded = loading.load("nano", device="cpu", weights="quantized", dtype="bfloat16")
    vocabulary = loaded.model(mx.array([[0]])).shape[-1]
    own = replace(loaded.backend, name="metal", weights="quantized", dtype="bfloat16")
    given = replace(loaded, backend=own, stop_ids=frozenset(), stop_strings=())

    def count(rows=8, **bounds):
        asked = [Request((1,) * (97 + row), row, "<think>\n") for row in range(rows)]

        def decoded():
            for _ in generate(given, asked, SamplingParams(4, 1.0, **bounds), rows, logprobs=True, memory_gb=1e6):
                pass

        return bench_graph._counts("metal", vocabulary, "async_eval", decoded)[-1]

    plain = count()
    for bounds, most in (
        ({"think_tokens": 3}, 0),
        ({"think_tokens": 0}, 1),
        ({"think_tokens": 9, "think_at_least": 9}, 2),
    ):
        bounded = count(**bounds)
        assert bounded.wide_bytes == plain.wide_bytes, bounds
        assert 0 <= bounded.kernels - plain.kernels <= most, bounds
        assert bounded.bytes - plain.bytes < 2000, bounds
