"""One chat template, put through all that is done with templates; transformers' own rendering is the reference.

A template gets a small tokenizer with the special tokens that it writes. ``kind`` says how the tokenizer treats spaces:
``bytes`` (GPT-2), or SentencePiece's ``sp-legacy`` (▁ before every piece of text), ``sp-first`` and ``sp-none``.
"""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import replace

from factories import wrap
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mlx_traces.errors import UserError
from mlx_traces.records import Trace
from mlx_traces.tasks.thoughts import FINAL, TAGS, answer_part
from mlx_traces.traces import encoding

Q1, A1 = "What is 6 times 7?", "Alpha says forty."
Q2, A2 = "And what is 2 plus 1?", "Beta says three."
Q3, ANSWER = "So what is 6 times 7?", "The total is 42."
SYSTEM, THOUGHT = "Be brief and give numbers.", "Six sevens are asked."
RULES = "Use no words."
CORPUS = [
    Q1,
    A1,
    Q2,
    A2,
    Q3,
    ANSWER,
    SYSTEM,
    THOUGHT,
    "user assistant system",
    "user\n assistant\n",
    "The total is",
] * 4
SWITCHES = ("enable_thinking", "thinking", "reasoning", "enable_reasoning")
CLOSED = {"</think>": "\n</think>\n\n", "[BEGIN FINAL RESPONSE]": "\n[BEGIN FINAL RESPONSE]\n"}  # empty thoughts
CLOSED |= {FINAL: f"<|end|><|start|>assistant{FINAL}"}
SPLIT = (  # Qwen's and Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = re.compile(  # what looks like a special token
    r"<\|[^|<>\s'\"{}+]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<\|[a-z_]{3,20}>|<[a-z_]{3,20}\|>|◁/?think▷|\[e~\[|\]~!?b\[?|</?role>"
    r"|</?[a-z_]*:?(?:think|thought|thinking|longcat_think)[a-z_]*>|\[\|[a-zA-Z]+\|\]|\[gMASK\]|<sop>|</?seed:[a-z_]+>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|ARGS|THINK|IMG|CALL_ID|TOOL_CONTENT|SEP)\]"
    r"|<SPECIAL_\d+>|<extra_id_\d+>|<reserved_\d+>|<(?:start|end)_of_turn>|<(?:bos|eos|s|/s|unk|pad|sep)>"
    r"|<_(?:user|bot|end|system|start)>"
)


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


ONE = [turn("user", Q1)]
TALKS = {
    "question": ONE,
    "system": [turn("system", SYSTEM), *ONE],
    "turns": [*ONE, turn("assistant", A1), turn("user", Q2), turn("assistant", A2), turn("user", Q3)],
    "system and turns": [turn("system", SYSTEM), *ONE, turn("assistant", A1), turn("user", Q3)],
}


@functools.cache
def bare(kind: str) -> str:
    """Return a small tokenizer without special tokens, as JSON."""
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), pieces])
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        )
        return made.to_str()
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "sp-legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "sp-first":
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
    tail = [] if kind == "sp-none" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [*map(chr, range(32, 127)), "▁"]
    made.train_from_iterator(
        [line for text in CORPUS for line in text.split("\n") if line],
        trainers.BpeTrainer(vocab_size=520, initial_alphabet=alphabet, show_progress=False, special_tokens=special),
    )
    state = json.loads(made.to_str())  # the bytes are pieces, not special tokens
    return json.dumps({**state, "added_tokens": [one for one in state["added_tokens"] if one["content"] == "<unk>"]})


def tokenizer_of(template: str, kind: str, specials: set[str], eos: str, rstrip: bool = False):
    """Make the tokenizer of a template; the tags of thoughts are tokens, and not special ones."""
    bos = "<s>" if "bos_token" in template else None
    thoughts = {tag for pair in TAGS for tag in pair}
    made = Tokenizer.from_str(bare(kind))
    made.add_special_tokens(
        [AddedToken(t, normalized=False, rstrip=rstrip and t not in (bos, eos)) for t in sorted(specials - thoughts)]
    )
    made.add_tokens([AddedToken(token, normalized=False) for token in sorted(specials & thoughts)])
    names = {"eos_token": eos, **({} if kind == "bytes" else {"unk_token": "<unk>"})}
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.token_to_id(bos))]
        )
        names["bos_token"] = bos
    return PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, chat_template=template, **names
    )


def special_first(text: str) -> str | None:
    found = SPECIAL.match(text.lstrip())
    return found[0] if found else None


def squeezed(text: str) -> str:
    """Return a text without spaces, which SentencePiece's decoders add or drop around special tokens."""
    return text.replace("▁", "").replace(" ", "")


def last_thought(text: str) -> tuple[int, str, str] | None:
    """Return (place, opening, closing) of the last thought that a text opens, be it closed or not."""
    found = [(text.rfind(opening), opening, closing) for opening, closing in TAGS if opening in text]
    return max(found, default=None)


class Zoo:
    """A template with its tokenizer; ``faults`` says what is wrong, a line each."""

    def __init__(self, template, kind="bytes", eos="", stops="", plain="", rstrip=""):
        stops = [token for token in stops.split(",") if token]
        bos = {"<s>"} if "bos_token" in template else set()
        self.tokenizer = tokenizer_of(template, "bytes", {"</s>", *bos}, "</s>")
        texts = [template]
        for turns in (*TALKS.values(), [*ONE, turn("assistant", A1)], TALKS["turns"][:3]):
            texts += [text for reply in (True, False) if (text := self.text(turns, reply))]
        specials = {token for text in texts for token in SPECIAL.findall(text)} - set(plain.split())
        after = (self.text([*ONE, turn("assistant", A1)], False) or "").rpartition(A1)[2]
        end = special_first(after)
        end = None if end in plain.split() else end
        self.eos = eos or end or "</s>"
        stops = stops or [self.eos, *([end] if end and not eos else [])]
        if end not in stops:  # something else comes before the end
            end = min((token for token in stops if token in after), key=after.find, default=None)
        if end is None:  # it may be what begins the next turn
            end = special_first((self.text(TALKS["turns"][:3], False) or "").partition(A1)[2])
        self.end = end if end in stops else self.eos
        specials |= {"</s>", self.eos, *stops, *bos}
        self.tags = [pair for pair in TAGS if any(tag in text for tag in pair for text in texts)]
        self.tokenizer = tokenizer_of(template, kind, specials, self.eos, bool(rstrip))
        self.stops = frozenset(map(self.tokenizer.convert_tokens_to_ids, (*stops, self.eos)))
        self.loaded = replace(wrap(self.tokenizer), stop_ids=self.stops, name="zoo")
        asked = self.text(ONE) or ""
        self.begun = last_thought(asked.rpartition(Q1)[2])  # in the prompt of a question
        still = self.begun and self.begun[2] not in asked.rpartition(Q1)[2][self.begun[0] :]
        self.opens = self.begun if still else None
        self.switch = next((name for name in SWITCHES if self._switches(name)), None)

    def text(self, turns, reply=True, **switches):
        """Return transformers' rendering; None if the template refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                [dict(one) for one in turns], tokenize=False, add_generation_prompt=reply, **switches
            )
        except Exception:
            return None

    def _switches(self, name):
        texts = [self.text(ONE, **{name: value}) for value in (True, False)]
        return None not in texts and texts[0] != texts[1]

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def learned(self, turns, completion, **fields):
        """Return the ids of an example, the texts of its learned stretches, and how many turns are counted."""
        trace = Trace("x", tuple(map(dict, turns)), completion, **fields)
        encoded = encoding.encode_all(self.loaded, [("t:1", trace)], 100_000, "refuse")
        example, spans, inside = encoded.examples[0], [], False
        for token, flag in zip(example.ids, example.trained, strict=True):
            if flag:
                spans = [*spans, []] if not inside else spans
                spans[-1].append(token)
            inside = flag
        return list(example.ids), [self.decode(span) for span in spans], encoded.turns

    def faults(self) -> list[str]:
        return [
            line
            for part in (self.prompts, self.thinking, self.thoughts, self.answers, self.turns, self.own_ids)
            for line in part()
        ]

    # ------------------------------------------------------------------------------------------ the prompt

    def prompts(self) -> Iterator[str]:
        shown = {
            **TALKS,
            "spaces": [turn("user", f"\n  {Q1} {{{{x}}}} \\boxed{{}} \n\n")],
            "tags": [turn("user", f"{Q1}\n\nThink between <think> and </think>. Then <answer>answer</answer>.")],
            "two users": [*ONE, turn("user", Q2)],
        }
        for what, turns in shown.items():
            wanted, moved = self.text(turns), False
            if turns[0]["role"] == "system" and SYSTEM not in (wanted or ""):
                first = turn("user", f"{SYSTEM}\n\n{turns[1]['content']}")
                wanted, moved = self.text([first, *turns[2:]]), True
            for prefill in ("", "The total", "\n\nWell,"):
                try:
                    got = self.loaded.chat.prompt(turns, prefill)
                except UserError:
                    if wanted is not None:
                        yield f"{what}: refused"
                    continue
                if wanted is None:
                    yield f"{what}: rendered, and the template refuses it"
                elif got.text != wanted + prefill:
                    yield f"{what}: {got.text!r} is not {wanted + prefill!r}"
                elif list(got.ids) != self.ids(got.text):
                    yield f"{what}: the prompt's ids are not those of its text"
                if not got.opened.endswith(prefill):
                    yield f"{what}: the prefill is not in what was opened, {got.opened!r}"
            if wanted and moved and not any("system" in note for note in self.loaded.notes):
                yield f"{what}: nothing says that the system message was moved"
        rules = turn("system", RULES)
        for turns in ([turn("system", SYSTEM), rules, *ONE], [*TALKS["turns"][:2], rules, turn("user", Q3)]):
            try:
                text = squeezed(self.loaded.chat.prompt(turns).text)
            except UserError:
                continue
            if not all(squeezed(one["content"]) in text for one in turns if one["role"] == "system"):
                yield f"a system message is lost in {text!r}"

    def thinking(self) -> Iterator[str]:
        if self.text(ONE) is None:
            return
        for value in (True, False):
            wanted = self.text(ONE, **({self.switch: value} if self.switch else {}))
            if self.loaded.chat.prompt(ONE, thinking=value).text != wanted:
                yield f"thinking={value} is not {self.switch}={value}"
        if (self.switch is None) != any("no thinking switch" in note for note in self.loaded.notes):
            yield f"the switch is {self.switch}, and the notes say {self.loaded.notes}"

    def thoughts(self) -> Iterator[str]:
        if (wanted := self.text(ONE)) is None:
            return
        opened, after = self.loaded.chat.prompt(ONE).opened, wanted.rpartition(Q1)[2]
        if self.opens and not opened.startswith(self.opens[1]):
            yield f"{self.opens[1]} is open, and {opened!r} is known of it"
        if opened and opened not in after:
            yield f"{opened!r} is not what the template opened"
        if self.opens:
            text = self.loaded.chat.prompt(ONE, f"{self.opens[1]}\nFirst").text
            if text.rpartition(Q1)[2].count(self.opens[1]) != 1:
                yield "a thought that the prefill opens is opened twice"
        for opening, closing in self.tags:
            if answer_part(f"{opening}\nFirst 9"):
                yield f"a thought cut off after {opening} counts as the answer"
            if answer_part(f"{opening}\nFirst 9\n{closing}It is 42").strip() != "It is 42":
                yield f"what follows {closing} is not the answer"

    # ------------------------------------------------------------------------------------------ what is learned

    def frame(self) -> tuple[str, str]:
        """Return what the template writes around an answer, thoughts left out: after its prompt, and before the end."""
        whole, prompt = self.text([*ONE, turn("assistant", ANSWER)], False), self.text(ONE)
        if whole is None or prompt is None or ANSWER not in whole:
            return "", ""
        head, _, tail = whole.rpartition(ANSWER)
        cut = tail.find(self.end)
        asked = prompt[: prompt.rfind(Q1) + len(Q1) + self.begun[0]] if self.begun else prompt
        base = prompt if head.startswith(prompt) else asked
        head = head.removeprefix(base) if head.startswith(base) else ""
        if head.strip() != FINAL and any(tag in head for pair in TAGS for tag in pair):
            head = ""  # an empty thought
        return head, tail[:cut] if cut > 0 else ""

    def answers(self) -> Iterator[str]:
        got = encoding.turn_end(self.loaded)
        if self.decode([got]).strip() != self.end:
            within = special_first((self.text(TALKS["turns"][:3], False) or "").partition(A1)[2])
            if got not in self.stops or self.decode([got]).strip() != within:
                yield f"a turn ends with {self.decode([got])!r}, the template writes {self.end!r}"
            self.end = self.decode([got]).strip()
        head, tail = self.frame()
        ends = {squeezed(self.tokenizer.convert_ids_to_tokens(token)) for token in self.stops}
        closed = CLOSED.get(self.opens[2], self.opens[2]) if self.opens else ""
        for what, turns in TALKS.items():
            if self.text(turns) is None:
                continue
            ids, spans, counted = self.learned(turns, ANSWER)
            prompt = self.loaded.chat.prompt(turns)
            said = closed + head + ANSWER + tail + self.end
            if squeezed(spans[-1]) != squeezed(said):
                yield f"{what}: {spans[-1]!r} is learned, not {said!r}"
            # Where the prompt's last token would be joined with the answer's first, the prompt's stay as they are.
            whole, count = self.ids(prompt.text + said), len(prompt.ids)
            joined = tuple(whole[:count]) != prompt.ids and tuple(ids[:count]) == prompt.ids
            if ids != whole and not joined:
                yield f"{what}: the ids are not those of the text"
            shown = [text for text in (A1, A2) if text in prompt.text]
            if len(spans) - 1 + counted != len(shown):
                yield f"{what}: of {len(shown)} turns {len(spans) - 1} are learned, and {counted} are counted as not"
            for span in spans[:-1]:
                left = squeezed(span).removeprefix(squeezed(head))
                text = next((one for one in shown if left.startswith(squeezed(one))), None)
                rest = left.removeprefix(squeezed(text or "")).removeprefix(squeezed(tail)).strip()
                if text is None or (rest and rest not in ends):
                    yield f"{what}: {span!r} is learned of an earlier turn"

    def turns(self) -> Iterator[str]:
        said = f"<think>\n{THOUGHT}\n</think>\n{A1}"
        turns = [*ONE, turn("assistant", said), turn("user", Q3)]
        if self.text(turns) is not None:
            ids, spans, _ = self.learned(turns, ANSWER)
            asked = self.decode(ids).partition(Q1)[2].partition("<think>\n")[0]
            amiss = [tag for tag in (*(pair[1] for pair in TAGS), self.frame()[0].strip()) if tag]
            for span in spans[:-1]:
                if squeezed(said) not in squeezed(span) or any(tag in asked for tag in amiss):
                    yield f"{span!r} is learned of an earlier turn with a thought, after {asked!r}"
        if self.text(ONE) is None:
            return
        try:
            ids, spans, _ = self.learned(ONE, f"<think>\n{THOUGHT}\n</think>\n{ANSWER}")
        except UserError as error:
            if self.switch is not None or "leaves it no room" not in str(error):
                yield f"a thought is refused: {error}"
            return
        text = self.decode(ids).rpartition(Q1)[2]
        tags = self.opens[1:] if self.opens else next((pair for pair in TAGS if pair[0] in text), TAGS[0])
        if text.count(tags[0]) != 1 or squeezed(text).count(squeezed(THOUGHT)) != 1:
            yield f"a thought is learned as {text!r}"
        tokens = self.tokenizer.get_vocab()
        known = "<think>" not in tokens and any(opening in tokens and closing in tokens for opening, closing in TAGS)
        others = (self.opens and tags[0] != "<think>") or FINAL in self.frame()[0] or known
        if others and "<think>" in text:
            yield f"a thought is learned in tags that the template does not write: {text!r}"
        if squeezed(ANSWER) not in squeezed(answer_part(text)) or self.end not in spans[-1]:
            yield f"the answer does not follow the thought: {text!r}"
        text, head = self.decode(self.learned(ONE, f"<think>\n{THOUGHT}")[0]).rpartition(Q1)[2], self.frame()[0].strip()
        closed = any(closing in text for _, closing in TAGS) or (head and head in text)
        if closed or not squeezed(text).endswith(squeezed(THOUGHT)):
            yield f"an open thought is learned as {text!r}"

    def own_ids(self) -> Iterator[str]:
        """What was generated is learned by its own tokens, in the prompt that it was generated in."""
        for value in (None, True, False) if self.switch else (None,):
            if self.text(ONE) is None:
                continue
            prompt = self.loaded.chat.prompt(ONE, thinking=value)
            end = self.tokenizer.convert_tokens_to_ids(self.end)
            own = [*(token for letter in "So 42." for token in self.ids(letter)), end]
            text = self.loaded.tokenizer.decode(own[:-1])
            fields = {"completion_ids": tuple(own), "finish_reason": "stop", "thinking": value}
            if self.learned(ONE, prompt.opened + text, **fields)[0] != [*prompt.ids, *own]:
                yield f"a generated trace is learned otherwise (thinking={value})"
