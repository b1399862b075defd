"""Sampling against mlx_lm's single-sequence generation and against closed-form distributions."""

import math
import weakref
from collections import Counter, defaultdict
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from factories import broken, make_model, make_tokenizer, wrap
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from scipy.stats import chisquare

from mlx_traces.engine import kv_cache, mlx_lm_fallback, sampling
from mlx_traces.engine.generation import Usage, generate, rows_that_fit
from mlx_traces.engine.mlx_lm_fallback import generate_plainly
from mlx_traces.engine.sampling import Ending, Request, SamplingParams, decode, draw
from mlx_traces.errors import UserError

LENGTHS = (3, 41, 7, 1, 29, 12, 5, 60, 2, 17, 33, 8)


def prompts() -> list[tuple[int, ...]]:
    """Return prompts of uneven length, longer and shorter ones mixed."""
    draw = np.random.default_rng(3)
    return [tuple(int(i) for i in draw.integers(0, 98, length)) for length in LENGTHS]


def run(loaded, requests, params, rows=32):
    """Return the rollouts in the order of the requests, each exactly once."""
    pairs = list(generate(loaded, requests, params, rows))
    assert sorted(index for index, _ in pairs) == list(range(len(requests)))
    return [rollout for _, rollout in sorted(pairs, key=lambda pair: pair[0])]


def one_by_one(loaded, prompt, max_tokens):
    """Return the greedy completion by mlx_lm's own single-sequence loop, its stop token included."""
    ids = []
    for token, _ in generate_step(mx.array(prompt), loaded.model, max_tokens=max_tokens):
        ids.append(token)
        if token in loaded.stop_ids:
            break
    return tuple(ids)


@pytest.fixture(scope="module")
def alone(_tiny):
    """The greedy completions of the prompts, at most 40 tokens, one by one."""
    found = [one_by_one(_tiny, prompt, 40) for prompt in prompts()]
    # The fixture reaches what it should: both ends, and text that is not one token repeated.
    whole = [ids for ids in found if ids[-1] not in _tiny.stop_ids]
    assert 2 <= len(whole) <= len(found) - 2 and all(len(set(ids)) > 10 for ids in whole)
    return found


@pytest.mark.parametrize(("rows", "most"), [(1, 15), (5, 40), (32, 40)])
def test_greedy_batch_equals_one_by_one(tiny, alone, rows, most):
    rollouts = run(tiny, [Request(p) for p in prompts()], SamplingParams(max_tokens=most), rows)
    assert [r.completion_ids for r in rollouts] == [ids[:most] for ids in alone]
    assert [r.prompt_ids for r in rollouts] == prompts()
    stops = [r.completion_ids[-1] in tiny.stop_ids for r in rollouts]
    assert any(stops) and [r.finish_reason == "stop" for r in rollouts] == stops


def test_stop_token_is_kept_in_ids_and_left_out_of_text(tiny):
    rollouts = run(tiny, [Request(p) for p in prompts()], SamplingParams(max_tokens=40))
    for rollout in rollouts:
        stops = [token in tiny.stop_ids for token in rollout.completion_ids]
        assert not any(stops[:-1])
        if rollout.finish_reason == "stop":
            assert stops[-1]
            said = rollout.completion_ids[:-1]
        else:
            assert not stops[-1] and len(rollout.completion_ids) == 40
            said = rollout.completion_ids
        assert rollout.text == tiny.tokenizer.decode(list(said)).replace("<|im_start|>", "")  # which is no text


def test_own_stop_tokens_end_their_own_rows_alone(tiny):
    plain = run(tiny, [Request(p) for p in prompts()], SamplingParams(max_tokens=40))
    at, rollout = next((i, r) for i, r in enumerate(plain) if r.finish_reason == "length")
    token = rollout.completion_ids[9]
    each = [SamplingParams(max_tokens=40, stop_tokens=(token,) if i == at else ()) for i in range(len(plain))]
    stopped = run(tiny, [Request(p) for p in prompts()], each)
    first = rollout.completion_ids.index(token)
    assert stopped[at].completion_ids == rollout.completion_ids[: first + 1] and stopped[at].finish_reason == "stop"
    assert stopped[:at] + stopped[at + 1 :] == plain[:at] + plain[at + 1 :]
    named = SamplingParams(max_tokens=40, stop_tokens=("<|im_end|>",))
    assert run(tiny, [Request(p) for p in prompts()], named) == plain
    for unknown in ("<|nothing|>", -1, 10**6):
        with pytest.raises(UserError, match="unknown stop token"):
            generate(tiny, [Request((1,))], SamplingParams(stop_tokens=(unknown,)))


def test_special_tokens_and_spaces_stay_in_the_text(tiny):
    text = "<think>a , b .</think> c"
    ids = tiny.tokenizer.encode(text, add_special_tokens=False)
    assert decode(tiny.tokenizer, ids) == text  # a prompt's own ids, put through the decoder that rollouts use


def test_stop_string_across_token_borders(tiny):
    plain = run(tiny, [Request(p) for p in prompts()], SamplingParams(max_tokens=40))
    at, rollout = next((i, r) for i, r in enumerate(plain) if r.finish_reason == "length")
    pieces = [tiny.tokenizer.decode([token]) for token in rollout.completion_ids]
    # Three tokens' text from the middle: it exists in no single token.
    stop = "".join(pieces[20:23])
    cut = rollout.text.find(stop)
    assert cut > 0 and all(stop not in piece for piece in pieces)
    stopped = run(tiny, [Request(p) for p in prompts()], SamplingParams(max_tokens=40, stop=("~~~~", stop)))
    ended = stopped[at]
    assert ended.finish_reason == "stop"
    assert ended.text == rollout.text[:cut]
    assert ended.completion_ids == rollout.completion_ids[: len(ended.completion_ids)]
    assert len(ended.completion_ids) <= 23  # the row ended at once
    for index, (before, after) in enumerate(zip(plain, stopped, strict=True)):
        if index != at and stop not in before.text:
            assert before == after  # a row taken out leaves its neighbours as they were


def test_stop_string_on_the_last_token_allowed(tiny):
    plain = run(tiny, [Request(prompts()[0])], SamplingParams(max_tokens=40))[0]
    text = tiny.tokenizer.decode([plain.completion_ids[4]])
    first = next(i for i, token in enumerate(plain.completion_ids) if text in tiny.tokenizer.decode([token]))
    params = SamplingParams(max_tokens=first + 1, stop=(text,))
    rollout = run(tiny, [Request(prompts()[0])], params)[0]
    assert rollout.finish_reason == "stop" and text not in rollout.text


def test_model_stop_strings_count(tiny):
    plain = run(tiny, [Request(prompts()[0])], SamplingParams(max_tokens=40))[0]
    loaded = replace(tiny, stop_strings=(plain.text[10:13],))
    rollout = run(loaded, [Request(prompts()[0])], SamplingParams(max_tokens=40))[0]
    assert rollout.text == plain.text[: plain.text.find(plain.text[10:13])]


SAID = "plan a;b <think>x;y</think> then c;d"


def ended(loaded, text, params, opened=""):
    """Return the rollout of a text that is sampled token by token."""
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    ending = Ending(loaded, Request((1,), opened=opened), params)
    return next(filter(None, (ending.rollout(ids[: count + 1]) for count in range(len(ids)))))


@pytest.mark.parametrize(
    ("text", "opened", "said"),
    [
        ("<think>x;y</think>c;d", "", "<think>x;y</think>c"),
        ("x;y</think>c;d", "<think>\n", "x;y</think>c"),  # the prompt opened it
        ("x;y</think>c;d", "", "x"),
        (SAID, "", "plan a"),  # before a thought too
        ("x;y" + 80 * "z;" + "</think>c;d", "<think>", "x;y" + 80 * "z;" + "</think>c"),
        (
            "<think>x;y</think>" + 99 * "w" + "<think>;</think>c;d",
            "",
            "<think>x;y</think>" + 99 * "w" + "<think>;</think>c",
        ),
        ("x;y[BEGIN FINAL RESPONSE]c;d", "Here are my reasoning steps:\n", "x;y[BEGIN FINAL RESPONSE]c"),
    ],
)
def test_stop_strings_count_after_the_thought(tiny, text, opened, said):
    rollout = ended(tiny, text, SamplingParams(max_tokens=400, stop=(";",)), opened)
    assert (rollout.text, rollout.finish_reason, rollout.stop_string) == (said, "stop", ";")
    inside = ended(tiny, text, SamplingParams(max_tokens=400, stop=(";",), stop_in_thoughts=True), opened)
    assert inside.text == text[: text.find(";")]
    own = ended(replace(tiny, stop_strings=(";",)), text, SamplingParams(max_tokens=400), opened)
    assert own.text == text[: text.find(";")]  # it stands for the token that ends a turn


def test_a_models_own_tags_keep_stop_strings_out_of_its_thought(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "own_tags", ("<hm>", "</hm>"))
    params = SamplingParams(max_tokens=400, stop=(";",))
    assert ended(tiny, "<hm>x;y</hm>c;d", params).text == "<hm>x;y</hm>c"


def test_a_thought_that_stays_open_runs_to_the_limit(tiny):
    rollout = ended(tiny, "<think>" + 30 * "x;y", SamplingParams(max_tokens=50, stop=(";",)))
    assert (len(rollout.completion_ids), rollout.finish_reason, rollout.stop_string) == (50, "length", None)


def test_stop_strings_in_thoughts_cost_little_text(tiny, monkeypatch):
    ids = tiny.tokenizer.encode("<think>" + 1000 * "x;", add_special_tokens=False)
    decoded = []
    plainly = sampling.decode
    monkeypatch.setattr(sampling, "decode", lambda *given: decoded.append(len(given[1])) or plainly(*given))
    ending = Ending(tiny, Request((1,)), SamplingParams(max_tokens=9999, stop=(";",)))
    assert not any(ending.rollout(ids[: count + 1]) for count in range(len(ids)))
    assert sum(decoded) < 100 * len(ids)


def test_stop_strings_copy_no_rows_history_at_each_step(tiny, monkeypatch):
    seen, plainly = defaultdict(list), Ending.rollout
    monkeypatch.setattr(Ending, "rollout", lambda own, ids, *more: seen[own].append(ids) or plainly(own, ids, *more))
    run(tiny, [Request(prompt) for prompt in prompts()], SamplingParams(max_tokens=9, stop=("~~~~",)), rows=5)
    assert len(seen) == len(LENGTHS) and all(len({*map(id, lists)}) == 1 for lists in seen.values())


@pytest.mark.parametrize("engine", ["ours", "mlx-lm's"])
def test_both_engines_keep_stop_strings_out_of_thoughts(tiny, engine):
    asked = prompts()[:4]
    whole = run(tiny, [Request(prompt) for prompt in asked], SamplingParams(max_tokens=24))
    stop = (whole[0].text[3:5],)

    def texts(params, opened):
        requests = [Request(prompt, opened=opened) for prompt in asked]
        if engine == "ours":
            return [rollout.text for rollout in run(tiny, requests, params)]
        found = dict(generate_plainly(tiny, requests, [params] * len(requests), 4, False))
        return [found[index].text for index in range(len(requests))]

    assert texts(SamplingParams(max_tokens=24, stop=stop), "<think>\n") == [rollout.text for rollout in whole]
    cut = [rollout.text.partition(stop[0])[0] for rollout in whole]
    assert texts(SamplingParams(max_tokens=24, stop=stop), "") == cut
    assert texts(SamplingParams(max_tokens=24, stop=stop, stop_in_thoughts=True), "<think>\n") == cut


def test_mlx_lms_engine_keeps_the_numbers_of_the_rows_under_way_alone(tiny, monkeypatch):
    made, plainly = weakref.WeakSet(), mlx_lm_fallback.RowSampler
    monkeypatch.setattr(mlx_lm_fallback, "RowSampler", lambda *given: made.add(own := plainly(*given)) or own)
    each = [SamplingParams(max_tokens=4 + 3 * i, temperature=1.0) for i in range(7)]
    held = []
    for _ in generate_plainly(tiny, [Request(prompt) for prompt in prompts()[:7]], each, 3, True):
        held.append(sum("uniforms" in vars(sampler) for sampler in made))
    assert len(held) == 7 and max(held) <= 4  # mlx_lm may begin one more


def test_a_rows_stream_depends_on_its_seed_alone(tiny):
    params = SamplingParams(max_tokens=16, temperature=0.9, top_p=0.95)
    requests = [Request(p, seed=i % 7) for i, p in enumerate(prompts()[:5] * 2)]
    alone = [r.completion_ids for r in run(tiny, requests, params, rows=1)]
    together = [r.completion_ids for r in run(tiny, requests, params, rows=4)]
    assert together == alone
    backwards = run(tiny, requests[::-1], params, rows=4)[::-1]
    assert [r.completion_ids for r in backwards] == alone
    resumed = run(tiny, requests[3:], params, rows=4)
    assert [r.completion_ids for r in resumed] == alone[3:]
    # The same prompt with two seeds differs, with one seed it does not.
    same = run(tiny, [Request(prompts()[0], seed) for seed in (1, 2, 1)], params)
    assert same[0] == same[2] and same[0].completion_ids != same[1].completion_ids


def filtered(logprobs: np.ndarray, params: SamplingParams, temperature: float) -> np.ndarray:
    """Return the distribution that is to be sampled, token by token in float64."""
    order = np.argsort(-logprobs)
    keep, mass = set(), 0.0
    top = math.exp(logprobs[order[0]])
    for rank, token in enumerate(order):
        probability = math.exp(logprobs[token])
        inside = mass < params.top_p and probability >= params.min_p * top
        if inside and (params.top_k == 0 or rank < params.top_k):
            keep.add(int(token))
        mass += probability
    weights = np.array([math.exp(value / temperature) if i in keep else 0.0 for i, value in enumerate(logprobs)])
    return weights / weights.sum()


def p_value(counts: Counter, expected: np.ndarray, draws: int) -> float:
    """Return the chi-square p of counts against probabilities, rare tokens pooled."""
    assert all(expected[token] > 0 for token in counts), "a token that the filters drop was drawn"
    common = [token for token in range(len(expected)) if expected[token] * draws >= 5]
    observed = [counts[token] for token in common]
    wanted = [expected[token] * draws for token in common]
    if draws - sum(wanted) > 1e-6 * draws:
        observed.append(draws - sum(observed))
        wanted.append(draws - sum(wanted))
    assert len(wanted) >= 3
    return chisquare(observed, wanted, sum_check=False).pvalue


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=1, temperature=1.0),
        SamplingParams(max_tokens=1, temperature=0.7, top_p=0.8),
        SamplingParams(max_tokens=1, temperature=1.3, min_p=0.05, top_k=7),
    ],
    ids=["plain", "top_p", "min_p+top_k"],
)
def test_frequencies_are_those_of_the_filtered_distribution(tiny, params):
    draws = 1000
    prompt = prompts()[2]
    logits = np.array(tiny.model(mx.array([prompt]))[0, -1], dtype=np.float64)
    logprobs = logits - np.logaddexp.reduce(logits)
    rollouts = run(tiny, [Request(prompt, seed) for seed in range(draws)], params, rows=256)
    counts = Counter(r.completion_ids[0] for r in rollouts)
    assert p_value(counts, filtered(logprobs, params, params.temperature), draws) > 1e-3
    # A fault in the temperature does not pass.
    assert p_value(counts, filtered(logprobs, params, params.temperature * 1.8), draws) < 1e-6


@pytest.mark.parametrize("temperatures", [(1, 1, 1, 1, 1), (0.5, 1, 0, 2, 1), (0, 0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("filters", [(1, 0, 0), (0.7, 0, 9)], ids=str)
def test_drawing_in_parts_is_drawing_at_once_and_follows_the_formulas(monkeypatch, temperatures, filters):
    draws = np.random.default_rng(0)
    logits, uniforms = draws.normal(0, 3, (5, 40)).astype(np.float32), draws.random(5, np.float32)
    settings = np.array([(temperature, *filters) for temperature in temperatures], np.float32)
    tokens, logprobs = draw(mx.array(logits), uniforms, settings, True)
    monkeypatch.setattr(sampling, "DRAWN_AT_ONCE", 2 * 40)
    parts, own = draw(mx.array(logits), uniforms, settings, True)
    assert parts.tolist() == tokens.tolist() and mx.allclose(own, logprobs, atol=1e-6).item()
    assert draw(mx.array(logits), uniforms, settings, False)[0].tolist() == tokens.tolist()
    for row, (token, (sampled, model)) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
        wide, temperature = logits[row].astype(np.float64), temperatures[row]
        assert model == pytest.approx(wide[token] - np.log(np.exp(wide).sum()), abs=1e-5)
        if not temperature:
            assert token == wide.argmax() and sampled == 0
            continue
        order = np.argsort(-wide)
        share = np.exp(wide[order]) / np.exp(wide).sum()
        kept = order[(np.cumsum(share) - share < filters[0]) & (np.arange(40) < (filters[2] or 40))]
        weights = np.zeros(40)
        weights[kept] = np.exp(wide[kept] / temperature)
        assert sampled == pytest.approx(np.log(weights[token] / weights.sum()), abs=1e-5)
        mass = np.cumsum(weights) / weights.sum()
        assert (mass - weights / weights.sum())[token] - 1e-6 <= uniforms[row] <= mass[token] + 1e-6


WIDTH = 151_936  # of a real vocabulary


def wide_logits(rows):
    draws = np.random.default_rng(5)
    return draws.normal(0, 2, (rows, WIDTH)).astype(np.float32), draws.random(rows, np.float32)


def plainly(rows, temperature=1.0):
    return np.tile(np.array([[temperature, 1, 0, 0]], np.float32), (rows, 1))


def test_a_wide_vocabularys_tokens_are_those_of_the_exact_distribution():
    logits, uniforms = wide_logits(32)
    mass = np.cumsum(np.exp(logits.astype(np.float64)), axis=-1)
    exact = (mass <= uniforms[:, None].astype(np.float64) * mass[:, -1:]).sum(axis=-1)
    tokens, logprobs = draw(mx.array(logits), uniforms, plainly(32), True)
    assert (np.array(tokens) == exact).sum() >= 29  # one sum over all of them: 20 to 26
    assert np.abs(np.array(tokens) - exact).max() <= 2  # and else a neighbour
    own = logits[np.arange(32), np.array(tokens)] - np.log(mass[:, -1])
    np.testing.assert_allclose(np.array(logprobs), np.stack([own, own], axis=-1), atol=1e-5)
    for row in (0, 17, 31):  # a row's token does not depend on the others
        assert draw(mx.array(logits[[row]]), uniforms[[row]], plainly(1), False)[0].item() == tokens[row].item()


def test_a_wide_vocabularys_frequencies():
    logits, _ = wide_logits(1)
    likely = [0, 1, 127, 128, 70_000, 151_807, 151_935]  # at the borders of blocks too
    logits[0, likely] = [11, 12, 12.5, 11.5, 12, 11.5, 12]
    probs = np.exp(logits[0].astype(np.float64))
    probs /= probs.sum()
    assert 0.2 < probs[likely].sum() < 0.8
    draws, uniforms = 520, np.random.default_rng(1).random(520, np.float32)
    rows = mx.broadcast_to(mx.array(logits), (draws, WIDTH))
    counts = Counter(draw(rows, uniforms, plainly(draws), False)[0].tolist())
    observed = [counts[token] for token in likely]
    expected = [probs[token] * draws for token in likely]
    halves = [range(WIDTH // 2), range(WIDTH // 2, WIDTH)]
    for half in halves:  # what is left of each half
        rest = [token for token in half if token not in likely]
        observed.append(sum(counts[token] for token in counts if token in half and token not in likely))
        expected.append(probs[rest].sum() * draws)
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("logprobs", [False, True])
def test_no_dropped_token_is_drawn_where_sums_are_rounded_in_parallel(monkeypatch, logprobs):
    """As a GPU may: every other sum is larger by a rounding, also where nothing was added."""
    whole, random = mx.cumsum, np.random.default_rng(0)

    def in_parallel(array, axis):
        sums = whole(array, axis=axis)
        return sums * (1 + mx.arange(array.shape[-1]) % 2 * 2**-22) if array.dtype == mx.float32 else sums

    monkeypatch.setattr(mx, "cumsum", in_parallel)
    logits = random.normal(0, 3, (400, 700)).astype(np.float32)
    uniforms = np.append(random.random(200), 1 - random.random(200) * 2**-22).clip(0, 1 - 2**-24).astype(np.float32)
    for top_k in (1, 3):
        settings = np.tile(np.array([[1, 1, 0, top_k]], np.float32), (400, 1))
        tokens, values = draw(mx.array(logits), uniforms, settings, logprobs)
        kept = np.sort(logits)[:, -top_k]
        assert (np.take_along_axis(logits, np.array(tokens)[:, None], 1)[:, 0] >= kept).all()
        assert values is None or mx.isfinite(values).all()


@pytest.mark.parametrize("width", [1, 2, 7, 103, 1009, 4096])  # primes have no blocks of their own
def test_no_token_without_weight_is_drawn(width):
    random = np.random.default_rng(width)
    logits = random.normal(0, 3, (9, width)).astype(np.float32)
    logits[:, 1:][random.random((9, width - 1)) < 0.7] = -np.inf
    logits[3:, -(width // 3 or 1) :] = -np.inf  # the last blocks are empty
    logits[3:, 0] = 1
    uniforms = np.array([0, 0.5, 1 - 2**-24] * 3, np.float32)
    for settings in (plainly(9), plainly(9, 0.6), np.tile(np.array([[1, 0.9, 0.01, 3]], np.float32), (9, 1))):
        tokens, logprobs = draw(mx.array(logits), uniforms, settings, True)
        assert np.isfinite(logits[np.arange(9), np.array(tokens)]).all() and np.isfinite(np.array(logprobs)).all()
    own = logits[np.arange(9), np.array(tokens)] - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    np.testing.assert_allclose(np.array(logprobs)[:, 1], own, atol=1e-5)


def kept_by_a_sort(logits, top_p, min_p, top_k):
    """Return which tokens the filters keep, by a stable sort of the whole vocabulary in float64, (R, V)."""
    kept = np.zeros(logits.shape, bool)
    for row, wide in enumerate(logits.astype(np.float64)):
        order = np.argsort(-wide, kind="stable")
        share = np.exp(wide[order] - wide.max())
        inside = (np.cumsum(share) - share < top_p * share.sum()) | (top_p >= 1)
        inside &= (share >= min_p) & ((np.arange(len(order)) < top_k) | (top_k == 0))
        kept[row, order[inside]] = True
    return kept


@pytest.mark.parametrize("filters", [(0.9, 0, 0), (0.3, 0, 0), (1, 0.02, 0), (1, 0, 40), (0.95, 0.001, 100)], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_filters_keep_what_a_sort_of_the_vocabulary_keeps(filters, ties):
    """In every number of blocks; where those do not hold all that is kept, the row says so."""
    random, width = np.random.default_rng(3), 1000  # not a multiple of the blocks' size
    logits = random.normal(0, [[0.5], [2], [9]], (3, width)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    expected = kept_by_a_sort(logits, *filters)
    total = mx.array(np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)).astype(np.float32))
    settings = tuple(mx.full((3,), value, mx.float32) for value in filters)
    sure = 0
    for candidates in (None, 1, 3, 8, 20, 31, 32):
        near, chosen, unsure = sampling._kept(mx.array(logits), total, settings, candidates)
        ids = (np.array(chosen)[:, :, None] * sampling.FINE + np.arange(sampling.FINE)).reshape(3, -1)
        found = np.zeros((3, 32 * 32), bool)
        np.put_along_axis(found, ids, np.isfinite(np.array(near)), axis=-1)
        if candidates in (None, 32):
            assert unsure is None
        for row in range(3):
            if unsure is None or not unsure[row].item():
                assert (found[row, :width] == expected[row]).all() and not found[row, width:].any()
                sure += unsure is not None
            else:
                assert ties or expected[row][ids[row][ids[row] < width]].sum() < expected[row].sum()
    assert sure, "the candidates hold what is kept in some case"


def test_a_wide_vocabularys_frequencies_under_filters():
    logits, _ = wide_logits(1)
    likely = [0, 1, 127, 128, 70_000, 151_807, 151_935]
    logits[0, likely] = [17, 16, 17.5, 16.5, 17, 16.5, 15]
    probs = np.exp(logits[0].astype(np.float64))
    kept = kept_by_a_sort(logits, 0.97 * probs[likely].sum() / probs.sum(), 0, 0)[0]
    assert kept.sum() == 6
    weights = np.where(kept, np.exp(logits[0] / 0.7 - logits[0].max() / 0.7, dtype=np.float64), 0)
    draws, uniforms = 250, np.random.default_rng(1).random(250, np.float32)
    settings = np.tile(np.array([[0.7, 0.97 * probs[likely].sum() / probs.sum(), 0, 0]], np.float32), (draws, 1))
    rows = mx.broadcast_to(mx.array(logits), (draws, WIDTH))
    tokens, logprobs = draw(rows, uniforms, settings, True, sampling.CANDIDATES)
    counts = Counter(tokens.tolist())
    wanted = np.flatnonzero(kept)
    expected = weights[wanted] / weights.sum() * draws
    assert set(counts) <= set(wanted.tolist())
    assert chisquare([counts[token] for token in wanted.tolist()], expected, sum_check=False).pvalue > 1e-3
    exact = (np.cumsum(weights) / weights.sum() <= uniforms[:, None]).sum(axis=-1)
    assert (np.array(tokens) == exact).mean() > 0.99
    own = [np.log(weights[tokens.tolist()] / weights.sum()), np.log(probs[tokens.tolist()] / probs.sum())]
    np.testing.assert_allclose(np.array(logprobs), np.stack(own, axis=-1), atol=1e-5)


def test_a_row_is_drawn_again_where_the_candidates_were_too_few(tiny, monkeypatch):
    """Rows join and leave meanwhile; the tokens are those that a search of the whole vocabulary draws."""
    from mlx_traces.engine import generation

    each = [SamplingParams(max_tokens=5 + 7 * (i % 4), temperature=1.5, top_p=0.9 if i % 3 else 1) for i in range(12)]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts())]

    def sampled():
        stream = generate(tiny, requests, each, 5, logprobs=True)
        return [rollout for _, rollout in sorted(stream, key=lambda pair: pair[0])]

    again, redraw = [], generation._Engine._draw_again
    monkeypatch.setattr(
        generation._Engine,
        "_draw_again",
        lambda engine, *steps: (again.append(steps[1] is None), redraw(engine, *steps))[1],
    )
    expected = sampled()
    assert not again
    monkeypatch.setattr(sampling, "FINE", 4)
    monkeypatch.setattr(generation, "CANDIDATES", 2)
    sampling._drawing.cache_clear()
    found = sampled()
    assert again[0] is False and 1 <= len(again) <= 3  # a run goes on with what it needed
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            [own.logprobs, own.model_logprobs], [other.logprobs, other.model_logprobs], atol=1e-5
        )
    # The same if candidates stay few, so that nearly every token is drawn again.
    monkeypatch.setattr(generation._Engine, "_draw_again", lambda engine, *steps: keep(engine, redraw, steps))
    assert [r.completion_ids for r in sampled()] == [r.completion_ids for r in expected]
    sampling._drawing.cache_clear()


def keep(engine, redraw, steps):
    """Draw again, and let the run go on with as few candidates as before."""
    before, found = engine.candidates, redraw(engine, *steps)
    while engine._unsure(found).any():
        found = redraw(engine, found, None)
    engine.candidates = before
    return found


SETTINGS = [
    [(0, 1, 0, 0)] * 3,
    [(1, 1, 0, 0)] * 3,
    [(0.7, 1, 0, 0)] * 3,
    [(0.7, 0.9, 0.1, 3)] * 3,
    [(0, 1, 0, 0), (0.7, 1, 0, 0), (1, 0.9, 0, 0)],
]


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_a_number_that_is_none_is_seen_wherever_it_stands(settings, logprobs, dtype):
    logits = np.random.default_rng(0).normal(0, 3, (15, 1000)).astype(np.float32)
    uniforms, both = np.full(15, 0.5, np.float32), np.array(settings * 5, np.float32)
    for at, (place, value) in enumerate(((0, np.nan), (17, np.nan), (999, np.nan), (500, np.inf))):
        logits[3 * at : 3 * at + 3, place] = value
    for candidates in (None, 2, sampling.CANDIDATES):
        tokens = draw(mx.array(logits).astype(dtype), uniforms, both, logprobs, candidates)[0].tolist()
        assert [token == sampling.NO_TOKEN for token in tokens] == [True] * 12 + [False] * 3


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_compiled_draw_is_the_plain_one_and_traced_once_a_shape(settings, logprobs, monkeypatch):
    """As on a GPU; MLX keeps a trace of every number of rows."""
    random, traced, plainly = np.random.default_rng(0), [], sampling._draw
    monkeypatch.setattr(sampling, "_draw", lambda *given: (traced.append(given[1].shape), plainly(*given))[1])
    cases = []
    for rows in (3, 2, 3, 1, 2, 3):
        logits = mx.array(random.normal(0, 3, (rows, 1000)).astype(np.float32)).astype(mx.bfloat16)
        cases.append((logits, random.random(rows, np.float32), np.array(settings[-rows:], np.float32), logprobs, 31))
    sampling._drawing.cache_clear()
    expected = [draw(*case) for case in cases]
    sampling._drawing.cache_clear()
    plain = sampling._drawing
    monkeypatch.setattr(sampling, "_drawing", lambda kind, compiled: plain(kind, True))
    traced.clear()
    for (tokens, values), case in zip(expected, cases, strict=True):
        found, own = draw(*case)
        assert found.tolist() == tokens.tolist()
        assert own is None if values is None else mx.allclose(own, values, atol=1e-5).item()
    assert len(traced) == 3
    plain.cache_clear()


@pytest.mark.parametrize(
    ("params", "logprobs"),
    [
        (SamplingParams(max_tokens=6), False),
        (SamplingParams(max_tokens=6, temperature=1.0), True),
        (SamplingParams(max_tokens=6, temperature=0.7), False),
        (SamplingParams(max_tokens=6, temperature=0.7, top_p=0.9, top_k=5), True),
    ],
    ids=["greedy", "plain", "temperature", "filters"],
)
def test_outputs_that_are_no_numbers_are_told(params, logprobs):
    loaded = wrap(make_tokenizer(), broken(make_model()))
    with pytest.raises(UserError, match=r"^tiny: its outputs are not finite numbers \(NaN or infinity\).*checkpoint"):
        list(generate(loaded, [Request((1, 2)), Request((3,))], params, logprobs=logprobs))
    half = replace(loaded, adapter="mine", backend=replace(loaded.backend, dtype="float16"))
    with pytest.raises(UserError, match="tiny with the adapter mine: .*float16 cannot hold.*--dtype float32"):
        list(generate(half, [Request((1, 2))], params, logprobs=logprobs))


@pytest.mark.parametrize("settings", [(0, 1, 0, 0), (1, 1, 0, 0), (0.7, 1, 0, 0), (0.7, 0.9, 0.1, 3)], ids=str)
@pytest.mark.parametrize("logprobs", [False, True])
def test_one_rows_infinity_is_its_own(settings, logprobs):
    logits = np.random.default_rng(0).normal(0, 3, (3, 50)).astype(np.float32)
    logits[1, 7] = np.inf  # as float16 overflows
    both = np.tile(np.array([settings], np.float32), (3, 1))
    tokens = draw(mx.array(logits), np.full(3, 0.5, np.float32), both, logprobs)[0].tolist()
    assert tokens[1] == sampling.NO_TOKEN and tokens[0] >= 0 and tokens[2] >= 0


def test_a_group_goes_on_after_the_window_moved(tiny, monkeypatch):
    """Its prompt was read in a batch with a longer one, for which there is no room any more."""
    monkeypatch.setattr(kv_cache, "STEP", 64)
    long, short = tuple(range(45)), tuple(range(5, 10))
    requests = [Request(long), *(Request(short, seed) for seed in range(8))]
    params = SamplingParams(max_tokens=30, temperature=1.0)
    assert run(tiny, requests, params, rows=3) == run(tiny, requests, params, rows=9)


def test_rollouts_arrive_as_they_finish_and_stopping_early_is_clean(tiny):
    requests = [Request(p) for p in prompts()]
    stream = generate(tiny, requests, SamplingParams(max_tokens=40), rows=4)
    index, rollout = next(stream)
    stream.close()
    assert rollout == run(tiny, requests, SamplingParams(max_tokens=40))[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.01}, "top_p must be"),
        ({"top_p": math.nan}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"min_p": 1.5}, "min_p must be"),
        ({"stop": ("a", "")}, "stop string is empty"),
    ],
)
def test_bad_settings(tiny, changes, message):
    with pytest.raises(UserError, match=message):
        generate(tiny, [Request((1, 2))], SamplingParams(**changes))


def test_bad_requests_are_refused_before_anything_runs(tiny):
    with pytest.raises(UserError, match="rows must be at least 1, not 0"):
        generate(tiny, [Request((1,))], SamplingParams(), rows=0)
    with pytest.raises(UserError, match="prompt 2 of 2 is empty"):
        generate(tiny, [Request((1,)), Request(())], SamplingParams(max_tokens=9))
    with pytest.raises(UserError, match="has 500 tokens; 13 more exceed the model's context of 512"):
        generate(tiny, [Request((1,) * 500)], SamplingParams(max_tokens=13))
    requests = [Request((1,)), Request((1,), thoughtless="no tag for thoughts")]
    for name in ("think_tokens", "think_at_least"):
        with pytest.raises(UserError, match=rf"^{name}: {tiny.name}, prompt 2 of 2: no tag for thoughts"):
            generate(tiny, requests, SamplingParams(max_tokens=9, **{name: 4}))
    assert len(run(tiny, requests, SamplingParams(max_tokens=2))) == 2
    assert list(generate(tiny, [], SamplingParams())) == []


@pytest.mark.real_model
def test_real_model_answers(real_model):
    from mlx_traces.models.loading import load
    from mlx_traces.records import Problem
    from mlx_traces.tasks.prompts import Prompt

    loaded = load(str(real_model))
    prompt = Prompt("plain", "{question}")
    asked = [loaded.render(prompt, Problem(str(n), {"question": f"What is {n} + {n}?"}, "")) for n in (2, 30)]
    rollouts = run(loaded, [Request(r.ids) for r in asked], SamplingParams(max_tokens=60))
    assert "4" in rollouts[0].text and "60" in rollouts[1].text
    assert all(r.finish_reason == "stop" and "<|im_end|>" not in r.text for r in rollouts)


def forward_logprobs(loaded, rollout):
    """Return the model's float64 log-softmax at each completion token by one full forward pass, (T, V)."""
    ids = mx.array([*rollout.prompt_ids, *rollout.completion_ids])[None]
    logits = np.array(loaded.model(ids)[0, len(rollout.prompt_ids) - 1 : -1].astype(mx.float32), dtype=np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=24),
        SamplingParams(max_tokens=24, temperature=0.7),
        SamplingParams(max_tokens=24, temperature=1.2, top_p=0.9, min_p=0.01, top_k=9),
    ],
    ids=["greedy", "temperature", "filters"],
)
def test_logprobs_equal_a_full_forward_pass(tiny, params):
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts()[:7])]
    rollouts = [r for _, r in sorted(generate(tiny, requests, params, 5, logprobs=True), key=lambda pair: pair[0])]
    for rollout in rollouts:
        full = forward_logprobs(tiny, rollout)
        assert len(rollout.logprobs) == len(rollout.model_logprobs) == len(rollout.completion_ids)
        for place, token in enumerate(rollout.completion_ids):
            assert rollout.model_logprobs[place] == pytest.approx(full[place, token], abs=1e-4)
            if params.temperature:
                expected = math.log(filtered(full[place], params, params.temperature)[token])
                assert rollout.logprobs[place] == pytest.approx(expected, abs=1e-4)
            else:
                assert rollout.logprobs[place] == 0 and token == full[place].argmax()


def test_rows_of_one_batch_may_have_different_settings(tiny):
    each = [
        SamplingParams(max_tokens=9),
        SamplingParams(max_tokens=20, temperature=0.8),
        SamplingParams(max_tokens=5, temperature=1.0, top_k=2),
        SamplingParams(max_tokens=30, temperature=0.6, top_p=0.7),
    ] * 2
    requests = [Request(prompt, seed=5) for prompt in prompts()[:8]]
    together = [r for _, r in sorted(generate(tiny, requests, each, 4), key=lambda pair: pair[0])]
    alone = [run(tiny, [request], params)[0] for request, params in zip(requests, each, strict=True)]
    assert together == alone
    assert len({len(rollout.completion_ids) for rollout in together}) >= 4


def test_a_groups_prompt_is_read_once_whatever_its_size(tiny):
    read = {}
    for size in (1, 8):
        requests = [Request(p, seed) for p in prompts()[:5] for seed in range(size)]
        usage = Usage()
        rollouts = list(generate(tiny, requests, SamplingParams(max_tokens=8, temperature=1.0), 3, usage=usage))
        assert len(rollouts) == len(requests)
        read[size] = usage.prompt_tokens
        assert usage.completion_tokens == sum(len(r.completion_ids) for _, r in rollouts)
    group = [r.completion_ids for i, r in rollouts if i // 8 == 3]
    assert len(set(group)) > 4  # members differ
    # Padding differs with the waves; were every member read, eight would cost more than twice one.
    assert read[8] < 1.5 * read[1]


def test_a_beginning_that_all_prompts_share_is_read_once(tiny):
    beginning = tuple(range(40))
    asked = [Request(beginning + prompt) for prompt in prompts()]
    usage = Usage()
    rollouts = [r for _, r in sorted(generate(tiny, asked, SamplingParams(max_tokens=6), 4, usage=usage))]
    assert [r.completion_ids for r in rollouts] == [one_by_one(tiny, r.prompt_ids, 6) for r in asked]
    assert usage.prompt_tokens < 40 + sum(LENGTHS) * 3  # not 12 x 40 more


def test_long_prompts_are_read_in_pieces(tiny, alone, monkeypatch):
    from mlx_traces.engine import generation

    monkeypatch.setitem(generation.PREFILL_TOKENS, "cpu", 7)
    rollouts = run(tiny, [Request(p) for p in prompts()], SamplingParams(max_tokens=12))
    assert [r.completion_ids for r in rollouts] == [ids[:12] for ids in alone]


def test_the_window_moves_and_rows_are_dropped(tiny, alone, monkeypatch):
    """A long run with rows of every length: the buffers move left, idle rows go, and no token changes."""
    monkeypatch.setattr(kv_cache, "STEP", 16)
    moved, kept = [], []
    shift, keep = kv_cache.SlotCache.shift, kv_cache.SlotCache.keep
    monkeypatch.setattr(kv_cache.SlotCache, "shift", lambda self, by: (moved.append(by), shift(self, by)))
    monkeypatch.setattr(kv_cache.SlotCache, "keep", lambda self, rows: (kept.append(len(rows)), keep(self, rows)))
    each = [SamplingParams(max_tokens=5 + 7 * (i % 6)) for i in range(36)]
    requests = [Request(p) for p in prompts() * 3]
    usage = Usage()
    rollouts = [r for _, r in sorted(generate(tiny, requests, each, 6, usage=usage), key=lambda pair: pair[0])]
    expected = [ids[: params.max_tokens] for ids, params in zip(alone * 3, each, strict=True)]
    assert [r.completion_ids for r in rollouts] == expected
    assert moved and kept and usage.occupancy > 0.7


def test_rows_follow_from_the_memory(tiny):
    requests, params = [Request((1,) * 44)] * 64, [SamplingParams(max_tokens=100)] * 64
    # By hand: 2 layers, 2 key-value heads of 16, float32, 44 + 100 + 256 positions; 128 logits three times.
    row = 2 * 2 * 2 * 16 * 4 * 400 + 3 * 4 * 128
    base = sum(array.nbytes for _, array in tree_flatten(tiny.model.parameters()))
    base += 512 * 4 * (16 * 64 + 4 * 128)
    base += 4 * (64 * 64 + 64 + 2 * (32 * 64 + 32) + 2 * 128 * 64)  # a layer's weights while they are joined
    for rows in (1, 2, 7, 64):
        assert rows_that_fit(tiny, requests, params, (base + rows * row + 1) / 1e9) == rows
    filtered = [*params[1:], SamplingParams(100, 1.0, top_p=0.9)]  # one row's filter takes memory for all
    assert rows_that_fit(tiny, requests, filtered, (base + 64 * (row + 4 * 128 * 7.5) + 1) / 1e9) == 64
    assert rows_that_fit(tiny, requests, filtered, (base + 64 * row + 1) / 1e9) < 64
    assert rows_that_fit(tiny, requests, params, 1e-6) == 1
    by_layer = replace(tiny, config=tiny.config | {"intermediate_size": [64, 128]})  # as Gemma 3n's are
    assert rows_that_fit(by_layer, requests, params, (base + 7 * row + 1) / 1e9) == 7
    loaded = replace(tiny, notes=[])
    rollouts = list(generate(loaded, requests[:5], params[:5], 4, memory_gb=(base + 2 * row + 1) / 1e9))
    assert len(rollouts) == 5 and loaded.notes == ["2 rows at once instead of 4: more do not fit in the memory"]


def test_memory_that_runs_out_while_the_step_is_made_is_tried_again(tiny, monkeypatch):
    from mlx_traces.engine import fused

    make, failed = fused.step_of, []

    def step_of(*given):
        if not failed:
            failed.append(1)
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return make(*given)

    monkeypatch.setattr(fused, "step_of", step_of)
    assert len(run(tiny, [Request((1, 2)), Request((3,))], SamplingParams(max_tokens=2))) == 2
    assert tiny.notes[0].startswith("memory ran out ([malloc] Unable to allocate 123 bytes.); once more")


@pytest.mark.parametrize("times", [1, 2])
def test_rows_that_did_not_fit_are_decoded_again_and_nothing_is_lost(tiny, monkeypatch, times):
    from mlx_traces.engine import generation

    expected = run(tiny, [Request(p) for p in prompts()], SamplingParams(max_tokens=20))
    take, failed = generation._Engine._take, []

    def fail(engine, step):
        if len(engine.request_of) > 3 and step.number > 12 and len(failed) < times:
            failed.append(len(engine.request_of))
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        yield from take(engine, step)

    monkeypatch.setattr(generation._Engine, "_take", fail)
    rollouts = run(tiny, [Request(p) for p in prompts()], SamplingParams(max_tokens=20), rows=8)
    assert len(failed) == times and [r.completion_ids for r in rollouts] == [r.completion_ids for r in expected]
    told = "[malloc] Unable to allocate 123 bytes."
    notes = [f"memory ran out ({told}); once more with {failed[0]} rows, MLX's cache cleared"]
    notes += [f"memory ran out again ({told}): at most {failed[1] // 2} rows from here on"] if times == 2 else []
    assert tiny.notes == notes
    assert tiny.row_budget.metrics() == {"memory/message": "; ".join([told] * times)} | (
        {"memory/rows": failed[1] // 2} if times == 2 else {}
    )
    failed.clear()
    with pytest.raises(UserError, match="memory ran out with a single row"):
        monkeypatch.setattr(
            generation._Engine, "_begin_step", lambda engine: (_ for _ in ()).throw(RuntimeError("CUDA: out of memory"))
        )
        run(tiny, [Request(prompts()[0])], SamplingParams(max_tokens=4))
    monkeypatch.undo()
    monkeypatch.setattr(generation._Engine, "_take", lambda engine, step: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # any other fault stays one
        run(tiny, [Request(prompts()[0])], SamplingParams(max_tokens=4))
