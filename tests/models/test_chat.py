"""Chat templates: prompts exactly the template's, and what one refuses or drops said in a line."""

from dataclasses import replace
from datetime import date

import pytest
from factories import CHATML, R1, make_tokenizer, wrap
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mlx_traces.config import EvalConfig
from mlx_traces.errors import UserError
from mlx_traces.models import loading
from mlx_traces.records import Problem
from mlx_traces.tasks.prompts import Prompt

PROBLEM = Problem("1", {"question": "2 + 2?"}, "4")
PLAIN = Prompt("plain", "{question}")
SYSTEM = Prompt("system", "{question}", system="Be brief.")
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
R1_ALWAYS = R1.replace(
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}", "{{ '<|Assistant|><think>\n' }}"
)
QWEN3 = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<start_of_turn>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def render(template, prompt=PLAIN, thinking=None):
    loaded = wrap(make_tokenizer(template))
    rendered = loaded.render(prompt, PROBLEM, thinking)
    assert list(rendered.ids) == loaded.tokenizer.encode(rendered.text, add_special_tokens=False)
    assert rendered.text.endswith(rendered.opened)
    return rendered, loaded.notes


@pytest.mark.parametrize(
    ("template", "text", "opened"),
    [
        (
            CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n",
            "",
        ),
        (
            LLAMA3,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "",
        ),
        (R1, "Be brief.<|User|>2 + 2?<|Assistant|><think>\n", "<think>\n"),
        (R1_ALWAYS, "Be brief.<|User|>2 + 2?<|Assistant|><think>\n", "<think>\n"),
    ],
    ids=["chatml", "llama3", "r1", "r1 that always opens"],
)
def test_templates(template, text, opened):
    rendered, notes = render(template, SYSTEM)
    assert (rendered.text, rendered.opened) == (text, opened)
    assert notes == []


def test_thinking_switch():
    assert render(QWEN3)[0].opened == ""  # the template's own default, not one of ours
    assert render(QWEN3, thinking=True)[0].opened == ""
    off, notes = render(QWEN3, thinking=False)
    assert off.opened == "<think>\n\n</think>\n\n" and notes == []
    assert off.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    _, notes = render(LLAMA3, thinking=False)
    assert notes == ["tiny: its chat template has no thinking switch"]


def test_the_switch_has_other_names():
    for name in ("thinking", "reasoning", "enable_reasoning"):
        template = CHATML + "{% if " + name + " %}<think>{% else %}</think>{% endif %}"
        for thinking, end in ((True, "<think>"), (False, "</think>"), (None, "</think>")):
            rendered, notes = render(template, thinking=thinking)
            assert rendered.text.endswith(end) and notes == []
            assert rendered.closed == (end == "</think>")
            assert ("leaves no thought to bound; pass --thinking" in rendered.thoughtless) == rendered.closed


def test_a_prompt_says_why_no_thought_can_come():
    tagless = loading.load("nano")
    assert tagless.render(PLAIN, PROBLEM).thoughtless.startswith("neither the model nor the prompt has a tag")
    assert tagless.render(replace(PLAIN, chat=False), PROBLEM).thoughtless.startswith("neither the model nor")
    for free in (replace(PLAIN, prefill="<think>"), replace(PLAIN, chat=False, user="Use <THINK>. {question}")):
        assert tagless.render(free, PROBLEM).thoughtless == ""
    assert render(R1)[0].thoughtless == "" and render(CHATML)[0].thoughtless == ""  # the model has the tags
    assert render(QWEN3, replace(PLAIN, prefill="<think>"), thinking=False)[0].thoughtless == ""  # opened again


def test_a_variable_of_the_template():
    template = "{{ reasoning_effort | default('low') }} " + CHATML
    loaded = wrap(make_tokenizer(template))
    loaded.template_args = {"reasoning_effort": "high", "effort": 2}
    assert loaded.render(PLAIN, PROBLEM, thinking=True).text.startswith("high <|im_start|>")
    assert loaded.notes == [
        "tiny: its chat template has no thinking switch",
        "tiny: its chat template does not use effort",
    ]
    _, notes = render(template, thinking=True)
    assert "no thinking switch; it reads reasoning_effort, which --template-arg NAME=VALUE sets" in notes[0]


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_that_the_template_does_not_use_are_told(name):
    for template, told in ((CHATML, [f"tiny: its chat template does not use {name}"]), ("{{ " + name + " }}", [])):
        loaded = replace(wrap(make_tokenizer(template)), template_args={name: [{"title": "a", "text": "b"}]})
        loaded.render(PLAIN, PROBLEM)
        assert loaded.notes == told


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "chat_template", "messages"])
def test_a_setting_of_the_renderer_is_no_variable(name):
    loaded = replace(wrap(make_tokenizer()), template_args={"effort": 2, name: False})
    with pytest.raises(UserError, match=f"^template_args: {name} is a setting of the renderer, no template's variable"):
        loaded.render(PLAIN, PROBLEM)


def test_the_day_is_the_runs():
    template = "{{ strftime_now('%d %b %Y, %A') }}\n" + CHATML
    loaded = wrap(make_tokenizer(template))
    assert loaded.chat.dated and loaded.shown() == {}
    on = replace(loaded, day=date(2024, 7, 26))
    assert on.render(PLAIN, PROBLEM).text.startswith("26 Jul 2024, Friday\n<|im_start|>")
    assert on.shown() == {"date": "2024-07-26"}
    assert on.render(PLAIN, PROBLEM).text.partition("\n")[2] == render(CHATML)[0].text
    assert replace(wrap(make_tokenizer(CHATML)), day=date(2024, 7, 26)).shown() == {}
    config = EvalConfig()
    assert loading.of_its_day(config, {}) == config == loading.of_its_day(config, {"weights": "dense"})
    assert loading.of_its_day(config, {"date": "2024-07-26"}).date == date(2024, 7, 26)
    own = EvalConfig(date="2025-01-01")
    assert loading.of_its_day(own, {"date": "2024-07-26"}) == own


def test_templates_that_fail_are_one_line():
    refused = r"^tiny: its chat template refuses this conversation \(.+\)$"
    for template in ("{% for tool in tools %}x{% endfor %}", "{{ messages[0].content.nothing.more }}", "{% for"):
        with pytest.raises(UserError, match=refused) as caught:
            render(template)
        assert "\n" not in str(caught.value)
    tokenizer = make_tokenizer(None)
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(UserError, match=refused):
        wrap(tokenizer).render(PLAIN, PROBLEM)


@pytest.mark.parametrize("template", [CHATML, R1, GEMMA, DROPS_SYSTEM])
def test_turns_that_say_nothing(template):
    chat = wrap(make_tokenizer(template)).chat
    for content in ("", "  "):
        assert chat.prompt([{"role": "user", "content": content}]).text
    alone = [{"role": "system", "content": "Be brief."}]
    if template in (CHATML, R1):
        assert "Be brief." in chat.prompt(alone).text
    else:
        with pytest.raises(UserError, match="tiny takes no system message, and there is no question to put it before"):
            chat.prompt(alone)


def test_no_switch_is_set_unasked():
    seen = "{% if enable_thinking is defined %}set to {{ enable_thinking }}{% endif %}{{ messages[0]['content'] }}"
    assert render(seen)[0].text == "2 + 2?"
    assert render(seen, thinking=True)[0].text == "set to True2 + 2?"


@pytest.mark.parametrize("template", [GEMMA, DROPS_SYSTEM], ids=["refused", "dropped"])
def test_system_message_without_a_place(template):
    rendered, notes = render(template, SYSTEM)
    assert "Be brief.\n\n2 + 2?" in rendered.text and len(notes) == 1 and "no system message" in notes[0]
    rendered, notes = render(template)
    assert "2 + 2?" in rendered.text and notes == []


FIRST_SYSTEM = "{% if messages[0]['role'] == 'system' %}[system]{{ messages[0]['content'] }}{% endif %}" + DROPS_SYSTEM
JOINED = "tiny takes one system message; those at the beginning are joined"
WITHIN = "tiny takes no system message within a conversation; it is put before the question"
BEFORE = "tiny takes no system message; it is put before the first question"


@pytest.mark.parametrize(
    ("template", "roles", "text", "notes"),
    [
        (FIRST_SYSTEM, "ssu", "[system]1\n\n2[user]3", [JOINED]),
        (FIRST_SYSTEM, "suasu", "[system]1[user]2[assistant]3[user]4\n\n5", [WITHIN]),
        (FIRST_SYSTEM, "ssusu", "[system]1\n\n2[user]3[user]4\n\n5", [JOINED, WITHIN]),
        (FIRST_SYSTEM, "uassu", "[user]1[assistant]2[user]3\n\n4\n\n5", [WITHIN]),
        (DROPS_SYSTEM, "ssau", "[assistant]3[user]1\n\n2\n\n4", [BEFORE]),
        (DROPS_SYSTEM, "suasu", "[user]1\n\n2[assistant]3[user]4\n\n5", [BEFORE, WITHIN]),
    ],
)
def test_no_system_message_is_lost(template, roles, text, notes):
    names = {"s": "system", "u": "user", "a": "assistant"}
    turns = [{"role": names[role], "content": str(at)} for at, role in enumerate(roles, 1)]
    chat = wrap(make_tokenizer(template)).chat
    rendered = chat.prompt(turns)
    assert (rendered.text, chat.notes) == (f"{text}[assistant]", notes)
    with pytest.raises(UserError, match="tiny takes no system message, and there is no question to put it before"):
        chat.prompt([*turns, {"role": "system", "content": "6"}])


@pytest.mark.parametrize("system", ["You are Bob. /no_think", "/no_think"])
def test_a_switch_that_the_template_takes_out_of_the_system_message_stays_there(system):
    said = "messages[0]['content']"
    smollm = (
        "{% if '/no_think' in " + said + " %}quick{% endif %}[system]{{ " + said + ".replace('/no_think', '') }}"
        "[user]{{ messages[1]['content'] }}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rendered, notes = render(smollm, replace(SYSTEM, system=system))
    assert rendered.text == f"quick[system]{system.removesuffix('/no_think')}[user]2 + 2?[assistant]" and notes == []


def test_a_note_is_made_once():
    loaded = wrap(make_tokenizer(GEMMA))
    for _ in range(3):
        loaded.render(SYSTEM, PROBLEM)
    assert len(loaded.notes) == 1


def test_a_conversation_that_the_template_refuses():
    refuses = "{{ raise_exception('Nothing pleases me') }}"
    with pytest.raises(UserError, match=r"tiny: its chat template refuses this conversation .*Nothing pleases me"):
        render(refuses)


def test_shots_and_prefill():
    prompt = Prompt("p", "{question}", shots=(("1 + 1?", "2"),), prefill="Let me see.\n<think>")
    rendered, _ = render(CHATML, prompt)
    assert rendered.text == (
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\nLet me see.\n<think>"
    )
    assert rendered.opened == "Let me see.\n<think>"
    # One thought is opened, not two, where the template opens one as well.
    rendered, _ = render(R1, prompt)
    assert rendered.text.endswith("<|Assistant|>Let me see.\n<think>") and rendered.text.count("<think>") == 1
    assert rendered.opened == "Let me see.\n<think>"
    rendered, _ = render(R1, Prompt("p", "{question}", prefill="Hm."))
    assert rendered.opened == "<think>\nHm."


def test_a_think_tag_in_the_question_is_not_the_templates():
    problem = Problem("1", {"question": "Use <think> tags."}, "")
    rendered = wrap(make_tokenizer(CHATML)).render(PLAIN, problem)
    assert rendered.opened == ""


def test_a_tokenizer_that_renders_conversations_itself():
    class Renders(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation, tokenize=True, add_generation_prompt=False, thinking=False, **_):
            return "".join(turn["content"] for turn in conversation) + " =>" * add_generation_prompt

    tokenizer = Renders(tokenizer_object=make_tokenizer(None)._tokenizer, eos_token="<|endoftext|>")
    loaded = replace(wrap(tokenizer), day=date(2024, 7, 26))
    assert loaded.render(PLAIN, PROBLEM).text == "2 + 2? =>"
    assert loaded.shown() == {} and loaded.notes == []


def test_without_chat_template():
    rendered, notes = render(None, Prompt("p", "{question}", system="Be brief.", prefill="It is"))
    assert rendered.text == "Be brief.\n\nUser: 2 + 2?\n\nAssistant: It is" and rendered.opened == "It is"
    assert len(notes) == 1 and "no chat template" in notes[0]
    turns = [{"role": role, "content": role[0]} for role in ("developer", "user", "assistant", "tool")]
    text = wrap(make_tokenizer(None)).chat.text(turns)
    assert text == "d\n\nUser: u\n\nAssistant: a\n\nTool: t\n\nAssistant:"


def test_prompt_as_text():
    shots = (("Question: 1 + 1?\nAnswer:", "#### 2"),)
    prompt = Prompt("p", "Question: {question}\nAnswer:", shots=shots, chat=False)
    rendered, notes = render(CHATML, prompt)
    assert rendered.text == "Question: 1 + 1?\nAnswer: #### 2\n\nQuestion: 2 + 2?\nAnswer:"
    assert rendered.opened == "" and notes == []


def test_first_token_of_the_text_once():
    """A template writes it itself; a text without template gets what the tokenizer adds."""
    tokenizer = make_tokenizer("<|endoftext|>" + CHATML)
    first = tokenizer.get_vocab()["<|endoftext|>"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", first)]
    )
    loaded = wrap(tokenizer)
    assert tokenizer.encode("a")[0] == first
    for prompt in (PLAIN, Prompt("p", "{question}", chat=False)):
        ids = loaded.render(prompt, PROBLEM).ids
        assert ids[0] == first and ids.count(first) == 1


@pytest.mark.parametrize(("template", "chat"), [(None, True), (None, False), (CHATML, True), (CHATML, False)])
@pytest.mark.parametrize("first", ["", "<|im_start|> "])
def test_no_prompt_ends_with_the_token_that_the_tokenizer_appends(template, chat, first):
    tokenizer = make_tokenizer(template)
    special = [(token, tokenizer.get_vocab()[token]) for token in ("<|im_start|>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first}$A <|endoftext|>", special_tokens=special
    )
    loaded = wrap(tokenizer)
    rendered = loaded.render(Prompt("p", "{question}", chat=chat), PROBLEM)
    before = first.strip() if not (template and chat) else ""
    assert loaded.tokenizer.decode(rendered.ids) == before + rendered.text
    if template is None:
        at = rendered.text.rindex("2")
        flags = loaded.chat.flags(rendered.text, rendered.ids, [(at, at + 1)])
        assert flags.index(True) == len(rendered.ids) - len(rendered.text[at:]) and flags.count(True) == 1
