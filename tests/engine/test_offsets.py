"""Characters of tokens: against tokenizers whose tokens' bytes are known, however the text is cut into tokens."""

from dataclasses import replace

import numpy as np
import pytest
from factories import wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mlx_traces.engine import offsets
from mlx_traces.engine.offsets import token_offsets
from mlx_traces.engine.sampling import Ending, Request, SamplingParams, decode, text_of
from mlx_traces.engine.thinking import Pieces
from mlx_traces.evaluation.completion import Completion
from mlx_traces.models import loading
from mlx_traces.records import Trace
from mlx_traces.rl import steps
from mlx_traces.traces import encoding

WORDS = ("hello", " 49", " - 25", " = 24", "é", "語", "🙂", "\n<", " yes", "think")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<think>", "</think>")


def letters():
    """Return GPT-2's letter of each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(rest)}


def byte_level():
    """Return a tokenizer of all bytes and some words, and the bytes of each id."""
    own = [*(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS), "語".encode()[1:] + b"\xf0\x9f"]
    spelled = ["".join(letters()[byte] for byte in piece) for piece in own]
    bpe = Tokenizer(models.BPE({token: at for at, token in enumerate(spelled)}, []))
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[0]), own


def sentence_piece():
    """Return a tokenizer as Llama 2's: words with a low line for a space, dropped at the beginning, and bytes."""
    own = [f"<0x{byte:02X}>" for byte in range(256)] + [f"▁{word.strip()}" for word in WORDS] + ["▁", "1", "a", "▁4"]
    bpe = Tokenizer(models.BPE({token: at for at, token in enumerate(["<unk>", *own])}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[0])
    written = [b"", *(bytes([byte]) for byte in range(256)), *(piece.replace("▁", " ").encode() for piece in own[256:])]
    return tokenizer, written


BYTES, OF_BYTES = byte_level()
LLAMA, OF_LLAMA = sentence_piece()


def of_pieces(written, ids, dropped=0):
    """Return (T, 2) by counting bytes: the characters that hold any byte of each token."""
    whole = b"".join(written[token] for token in ids)[dropped:]
    of_byte = [at for at, letter in enumerate(whole.decode()) for _ in letter.encode()]
    found, start = [], -dropped
    for token in ids:
        end = start + len(written[token])
        own = of_byte[max(0, start) : max(0, end)]
        place = of_byte[start] if 0 <= start < len(of_byte) else len(whole.decode())
        found.append((own[0], own[-1] + 1) if own else (place if start > 0 else 0,) * 2)
        start = end
    return np.array(found)


def cut(text, written, draw):
    """Cut a text's bytes into tokens at random: any tokens that spell it."""
    rest, ids = text.encode(), []
    while rest:
        fits = [token for token, piece in enumerate(written) if piece and rest.startswith(piece)]
        ids.append(draw(st.sampled_from(fits)))
        rest = rest[len(written[ids[-1]]) :]
    return ids


@settings(deadline=None, max_examples=150)
@given(st.data(), st.lists(st.sampled_from([*WORDS, "x", "é語🙂", " ", "\ufffd", "1 + 1 = 2"]), min_size=1, max_size=8))
def test_any_cut_of_a_text_into_tokens(data, words):
    text = "".join(words)
    ids = cut(text, OF_BYTES, data.draw)
    loaded = wrap(BYTES)
    assert decode(loaded.tokenizer, ids) == text
    found = token_offsets(loaded, ids, text)
    if "\ufffd" not in text:  # its own bytes cannot be told from a part of a character
        assert found.tolist() == of_pieces(OF_BYTES, ids).tolist()
    assert (found[:, 0] <= found[:, 1]).all() and (np.diff(found, axis=0) >= 0).all() and found[-1, 1] == len(text)


@settings(deadline=None, max_examples=100)
@given(
    st.data(), st.lists(st.sampled_from(["hello", " 49", " = 24", "é", "語🙂", " ", "a", "1"]), min_size=1, max_size=8)
)
def test_a_tokenizer_that_drops_the_first_space(data, words):
    ids, begun = cut(" " + "".join(words), OF_LLAMA, data.draw), data.draw(st.booleans())
    loaded = wrap(LLAMA)
    text = decode(loaded.tokenizer, ids, begun)
    written = b"".join(OF_LLAMA[token] for token in ids).decode()
    assert text == (written if begun else written.removeprefix(" "))
    found = token_offsets(loaded, ids, text, begun=begun)
    assert found.tolist() == of_pieces(OF_LLAMA, ids, len(written) - len(text)).tolist()


def test_a_completion_that_goes_on_with_a_turn_keeps_its_first_space():
    """Its text, the places of stop strings, forced tokens and steps in it, and its tokens when it is learned."""
    loaded, opened = wrap(LLAMA), "<think>a"
    ids = [OF_LLAMA.index(piece) for piece in (b" 4", b"1", b" ", b" yes")]
    params, asked = SamplingParams(max_tokens=4, think_at_least=1), Request((7,), opened=opened)
    ending = Ending(loaded, asked, params)
    ending.thought.forced = [0, 3]
    rollout = ending.rollout(ids)
    assert rollout.text == " 41  yes" and rollout.forced_text == ((0, 2), (4, 8))
    assert Ending(loaded, Request((7,)), SamplingParams(max_tokens=4)).rollout(ids).text == "41  yes"
    for stop, text in (("  ", " 41"), (" 4", "")):
        stopped = Ending(loaded, asked, replace(params, stop=(stop,), stop_in_thoughts=True))
        found = next(filter(None, (stopped.rollout(ids[:count]) for count in range(1, 5))))
        assert (found.text, found.stop_string) == (text, stop)
    completion = Completion.sampled("", opened, rollout)
    (step,) = steps.located(loaded, [completion], [[("step", len(opened) + 1, len(opened) + 3, 1.0)]])[0]
    assert (rollout.text[step.start : step.end], step.first, step.stop) == ("41", 0, 2)
    trace = Trace("t", ({"role": "user", "content": "1"},), completion.whole, completion_ids=tuple(ids))
    example = encoding.encode(loaded, trace, OF_LLAMA.index(b"a"))
    assert list(example.ids[-4:]) == ids and decode(loaded.tokenizer, list(example.ids[:-4])).endswith(opened)


@given(st.lists(st.integers(0, len(OF_BYTES) + len(SPECIAL) - 1), max_size=24))
@settings(deadline=None, max_examples=150)
def test_what_is_no_text_at_all_is_in_order_and_within(ids):
    loaded = wrap(BYTES)
    text = text_of(loaded, ids)
    found = token_offsets(loaded, ids, text)
    assert found.shape == (len(ids), 2) and (found >= 0).all() and (found <= len(text)).all()
    assert (found[:, 0] <= found[:, 1]).all() and (np.diff(found, axis=0) >= 0).all()


def test_tokens_that_are_not_in_the_text_have_no_characters():
    loaded = wrap(BYTES)
    vocabulary = BYTES.get_vocab()
    sign, opening, closing, stop = (vocabulary[token] for token in ("<|im_start|>", *SPECIAL[2:], "<|endoftext|>"))
    words = [OF_BYTES.index(word.encode()) for word in (" 49", " = 24", "語")]
    ids = [opening, words[0], sign, words[1], closing, words[2], stop]
    text = text_of(loaded, ids[:-1])
    assert text == "<think> 49 = 24</think>語"
    spans = [text[start:end] for start, end in token_offsets(loaded, ids, text)]
    assert spans == ["<think>", " 49", "", " = 24", "</think>", "語", ""]
    # What follows a stop string is in the ids and not in the text; a token that began before it has its part.
    spans = [text[start:end] for start, end in token_offsets(loaded, ids, text[:12])]
    assert spans == ["<think>", " 49", "", " =", "", "", ""]
    assert token_offsets(loaded, [], "").shape == (0, 2)


@pytest.mark.parametrize("text", ["語🙂" * 800, "49語" * 1000, "".join(map(chr, range(128, 3000)))])
def test_characters_of_several_tokens_are_decoded_once(text, monkeypatch):
    loaded, counted = wrap(BYTES), []
    ids = list(text.encode())
    monkeypatch.setattr(offsets, "decode", lambda *args: counted.append(len(args[1])) or decode(*args))
    pieces = Pieces(loaded.tokenizer)
    assert token_offsets(loaded, ids, text, pieces).tolist() == of_pieces(OF_BYTES, ids).tolist()
    assert counted == [len(ids)] and pieces.keys() == {*ids}  # each token is decoded once, for all completions


@given(st.lists(st.integers(0, len(OF_BYTES) + len(SPECIAL) - 1), max_size=24))
@settings(deadline=None, max_examples=150)
def test_bytes_and_bisection_agree_where_every_byte_is_of_a_character(ids):
    """The bisection is for decoders whose tokens' bytes do not add up to the text."""
    loaded, data = wrap(BYTES), [[*OF_BYTES, *(token.encode() for token in SPECIAL)][token] for token in ids]
    whole = decode(loaded.tokenizer, ids)
    found = offsets._by_bytes(data, whole)
    assert found is not None and offsets._by_bytes(data, whole + "x") is None
    if "\ufffd" not in whole:
        assert found.tolist() == offsets._by_bisection(loaded.tokenizer, ids, data, whole).tolist()


def test_a_decoder_that_looks_at_the_neighbours(monkeypatch):
    """Its first letter is a capital one, and so is that of each token after a point."""
    loaded = wrap(BYTES)

    def capitals(tokenizer, ids, begun):
        text = decode(tokenizer, ids)
        return "".join(a.upper() if before in ("", ".") else a for before, a in zip(["", *text], text, strict=False))

    monkeypatch.setattr(offsets, "decode", capitals)
    ids = list("so é. no 語.x".encode())
    found = token_offsets(loaded, ids, "So é. no 語.X")
    assert found.tolist() == of_pieces(OF_BYTES, ids).tolist()


def test_the_embedded_model_s_numbers(monkeypatch):
    loaded = replace(wrap(BYTES), tokenizer=loading.load("nano").tokenizer)
    text = "49 - 25 = 24, 24 + 22 = 46 yes\n</think>\n<answer>(49 - 25) + 22</answer>"
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    spans = [text[start:end] for start, end in token_offsets(loaded, ids, text)]
    assert "".join(spans) == text and spans == [decode(loaded.tokenizer, [token]) for token in ids]
