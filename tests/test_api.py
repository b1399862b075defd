"""The Python API: what the commands do, from a script."""

import json

import pytest

import mlx_traces
from mlx_traces.config import SFTConfig
from mlx_traces.errors import UserError


def test_every_name_of_the_api_is_there():
    for name in mlx_traces.__all__:
        assert getattr(mlx_traces, name) is not None
    assert set(mlx_traces.__all__) <= set(dir(mlx_traces))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mlx_traces.nothing


def test_prompts_are_completed_in_order_whatever_is_beside_them():
    loaded = mlx_traces.load("nano")
    questions = [
        "Make 20 from the numbers [2, 3, 4].",
        [{"role": "user", "content": "Make 9 from the numbers [4, 5]."}],
    ]
    both = mlx_traces.generate(loaded, questions, max_tokens=8, temperature=1.0, logprobs=True)
    assert [len(one.completion_ids) <= 8 and one.finish_reason in ("stop", "length") for one in both] == [True, True]
    assert all(len(one.logprobs) == len(one.completion_ids) for one in both)
    (alone,) = mlx_traces.generate("nano", questions[1:], max_tokens=8, temperature=1.0, seed=1)
    assert alone.completion_ids == both[1].completion_ids
    (by_text,) = mlx_traces.generate(loaded, questions[1:], max_tokens="8", temperature="1", seed=1)
    assert by_text.completion_ids == alone.completion_ids


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (["Hi"], {"max_tokens": 0}, "max_tokens: must be at least 1, not '0'"),
        (["Hi"], {"max_tokens": 2.5}, "max_tokens: must be a whole number, not '2.5'"),
        (["Hi"], {"temperature": "hot"}, "temperature: must be a number, not 'hot'"),
        (["Hi"], {"temperature": 1.0, "seed": -1}, "seed: must be at least 0, not '-1'"),
        (["Hi"], {"rows": 0}, "rows: must be at least 1, not '0'"),
        (["Hi"], {"think_tokens": 1, "think_at_least": 2}, "think_at_least: 2 is above think_tokens .1."),
        (["Hi"], {"stop": "so"}, "stop: must be a list of texts, not the text 'so'; put it in a list"),
        ("Make", {}, "prompts: must be a list of texts, not the text 'Make'; put it in a list"),
        (["Hi", [{"role": "user"}]], {}, "prompts: number 1 must be a text, or turns as in .*'content': 'Hi'.*, not"),
        ([{"role": "user", "content": "Hi"}], {}, "prompts: number 0 must be a text, or turns"),
        ([3], {}, "prompts: number 0 must be a text, or turns as in .*, not '3'"),
        ([[]], {}, "prompts: number 0 must be a text"),
        (None, {}, "prompts: must be a list of texts, not 'None'; give .. for none"),
        (["Hi"], {"stop": None}, "stop: must be a list of texts, not 'None'; give .. for none"),
        (["Hi"], {"stop": ["so", 5]}, "stop: must be a list of texts, and '5' in it is none; write it as a text"),
        (["Hi"], {"stop": ["\ud800"]}, r"stop: '\\ud800' is not UTF-8, as tokenizers need; drop its lone surrogates"),
        (["Hi", "a\udcff"], {}, r"prompts: number 1: 'a\\udcff' is not UTF-8"),
        ([[{"role": "user", "content": "\ud800"}]], {}, "prompts: number 0: .* is not UTF-8"),
        (["Hi"], {"think_tokens": 9, "think_then": "\ud800"}, "think_then: .* is not UTF-8"),
    ],
)
def test_wrong_input_of_a_completion_is_one_line(prompts, settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        mlx_traces.generate("nano", prompts, **settings)


def test_a_model_is_a_text_or_a_path(tiny_folder, tmp_path):
    for model, told in ((5, "'5'"), (None, "'None'"), ([], "'..'")):
        with pytest.raises(UserError, match=f"^model: must be a text or a path, not {told}; give a name or a folder"):
            mlx_traces.generate(model, ["Hi"])
        with pytest.raises(UserError, match=f"^model: must be a text, not {told}"):
            mlx_traces.evaluate(model=model)
    with pytest.raises(UserError, match="^model: must be a text, not '5'"):
        mlx_traces.compare(model=5)
    with pytest.raises(UserError, match="^adapter: must be a text or a path, not '5'"):
        mlx_traces.load("nano", 5)
    (one,) = mlx_traces.generate(tiny_folder, ["Hi"], max_tokens=2)
    assert len(one.completion_ids) <= 2
    short = {"limit": 1, "max_tokens": 2, "runs_dir": tmp_path, "prompt": "direct"}
    assert mlx_traces.evaluate(model=tiny_folder, **short).model == str(tiny_folder)
    assert len(mlx_traces.compare(model=tiny_folder, **short)) == 1


def test_trainings_take_the_names_of_the_flags(tmp_path):
    row = {"id": "a", "messages": [{"role": "user", "content": "1+1"}], "completion": "2"}
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps({**row, "id": f"t{i}"}) + "\n" for i in range(4)))
    data = {"data": str(tmp_path / "traces.jsonl"), "valid_share": 0.0, "rank": 2, "epochs": 1}
    assert mlx_traces.train_sft(model="nano", out=tmp_path / "sft", **data).steps == 1
    short = {"task": "countdown", "num_steps": 1, "prompts_per_step": 1, "group_size": 2, "max_tokens": 4, "rank": 2}
    for train in (mlx_traces.train_grpo, mlx_traces.train_ppo):
        result = train(model="nano", out=tmp_path / train.__name__, **short)
        assert result.steps == 1 and (tmp_path / train.__name__ / "adapter" / "adapters.safetensors").exists()
    with pytest.raises(UserError, match="give config or model, not both"):
        mlx_traces.train_sft(out=tmp_path / "x", config=SFTConfig(data="x"), model="nano")
    with pytest.raises(UserError, match="did you mean 'num_steps'"):
        mlx_traces.train_grpo(out=tmp_path / "x", num_step=1)
