"""nano: its tokenizer, its making, and what it is supposed to be able to do."""

import json
import os
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from mlx_traces.config import NanoConfig
from mlx_traces.errors import UserError
from mlx_traces.models import loading, names, nano
from mlx_traces.tasks.countdown import PROMPTS, check, generate, parse

TINY = {"hidden_size": 64, "layers": 1, "heads": 1, "intermediate_size": 64, "operands": (3, 3)}
TINY |= {"problems": 640, "warmup_steps": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return nano.build_tokenizer()


def test_the_embedded_tokenizer_is_the_one_we_build(tokenizer):
    """transformers puts its own pre-tokenizer in place of some; the ids would differ without an error."""
    loaded = loading.load("nano").tokenizer
    for ids, _ in islice(nano.examples(NanoConfig(), tokenizer), 50):
        text = tokenizer.decode(ids)
        assert loaded.encode(text, add_special_tokens=False) == ids
    odd = "Ünïcode 2001, 33x 0x33\n\n200 201 🙂"
    assert loaded.encode(odd, add_special_tokens=False) == tokenizer.encode(odd, add_special_tokens=False)
    assert loaded.decode(loaded.encode(odd, add_special_tokens=False)) == odd


def test_prompts_and_traces_need_no_spelling(tokenizer):
    """Every fixed part is one token: if a prompt's wording changes, nano has to be built anew."""
    for prompt in (PROMPTS["direct"], PROMPTS["thinking"]):
        messages = prompt.messages(parse({"nums": [3, 19, 42], "target": 64}, "here"))
        ids = loading.load("nano").tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert len(ids) == 15
    lengths = [len(ids) for ids, _ in islice(nano.examples(NanoConfig(), tokenizer), 500)]
    assert sum(lengths) / 500 < 60


def test_examples_are_solved_and_from_the_training_split(tokenizer):
    held_out = {tuple(sorted(nums)) for split in ("valid", "test") for nums, _ in generate(split, 300, 0)}
    for nums, target in islice(generate("train", 10**9, NanoConfig().seed), 300):
        assert tuple(sorted(nums)) not in held_out
        for prompt in (PROMPTS["direct"], PROMPTS["thinking"]):
            if (example := nano.solved(prompt, nums, target)) is not None:
                answer = example[1].partition("<answer>")[2].removesuffix("</answer>")
                assert check(answer, nums, target) == "correct"
                assert ("<think>" in example[1]) == (prompt.name == "thinking")


def test_only_completion_tokens_are_trained(tokenizer):
    config = NanoConfig(problems=32)
    stop = tokenizer.eos_token_id
    for ids, mask in nano.batches(config, tokenizer):
        for row, counted in zip(ids.tolist(), mask.tolist(), strict=True):
            start = row.index(tokenizer.convert_tokens_to_ids("assistant\n")) + 1
            end = max(i for i, token in enumerate(row) if token == stop)
            assert counted == [float(start <= i + 1 <= end) for i in range(len(counted))]


def test_build_is_seeded_and_loads_with_mlx_lm(tmp_path):
    import mlx.core as mx
    from mlx_lm import load

    losses = []
    first = nano.build(NanoConfig(out=str(tmp_path / "a"), **TINY), lambda step, steps, loss: losses.append(loss))
    nano.build(NanoConfig(out=str(tmp_path / "b"), **TINY))
    assert len(losses) == 40 and losses[-1] < losses[0] - 1
    one, two = (mx.load(str(tmp_path / name / "model.safetensors")) for name in "ab")
    assert all(mx.array_equal(one[key], two[key]) for key in one)
    model, tokenizer = load(str(first))
    assert json.loads((first / "config.json").read_text())["quantization"] == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    assert model(mx.array([tokenizer.encode("Make 12")])).shape[-1] == len(nano.build_tokenizer())
    with pytest.raises(UserError, match="exists; remove it, or choose another --out"):
        nano.build(NanoConfig(out=str(first), **TINY))


def no_training(*_):
    raise AssertionError("the training began")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 100}, r"hidden_size: 100 is not .* heads \(2\) and of quant_group_size \(64\); 128 is"),
        ({"heads": 3}, r"hidden_size: 128 is not a multiple of twice heads \(3\) and of .*; 192 is"),
        (
            {"hidden_size": 192, "heads": 64},
            r"hidden_size: 192 is not a multiple of twice heads \(64\) and of .*; 256 is",
        ),
        ({"kv_heads": 4}, r"heads: 2 is not a multiple of kv_heads \(4\); 4 is"),
        ({"intermediate_size": 96}, r"intermediate_size: 96 is not a multiple of quant_group_size \(64\); 128 is"),
    ],
)
def test_sizes_are_checked_before_training(tmp_path, monkeypatch, sizes, message):
    monkeypatch.setattr(nano, "batches", no_training)
    with pytest.raises(UserError, match=message):
        nano.build(NanoConfig(out=str(tmp_path / "a"), **sizes))
    assert not list(tmp_path.iterdir())


def test_more_problems_than_there_are_are_refused_before_training(tmp_path, monkeypatch):
    few = partial(generate, numbers=(1, 5), target=(10, 30))
    monkeypatch.setattr(nano, "generate", few)
    with monkeypatch.context() as patch:
        patch.setattr(nano, "batches", no_training)
        with pytest.raises(UserError, match=r"^problems: only \d+ of 3 to 3 numbers .* not 640; ask for no") as error:
            nano.build(NanoConfig(out=str(tmp_path / "a"), **TINY))
        with pytest.raises(UserError, match="operands 1-3 is not a range"):
            nano.build(NanoConfig(out=str(tmp_path / "a"), **{**TINY, "operands": (1, 3)}))
    assert not list(tmp_path.iterdir())
    count = int(str(error.value).split()[2])
    assert nano.build(NanoConfig(out=str(tmp_path / "a"), **{**TINY, "problems": count})).is_dir()  # all there are


def test_the_output_folder_is_checked_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(nano, "batches", no_training)
    (tmp_path / "file").touch()
    for out in ("/proc/nano", "/proc/nano/deeper", str(tmp_path / "file" / "a"), str(tmp_path / ("x" * 300)), "/"):
        with pytest.raises(UserError, match="(cannot be written|exists).*choose another --out") as caught:
            nano.build(NanoConfig(out=out, **TINY))
        assert "\n" not in str(caught.value)


def test_a_build_that_is_cut_off_leaves_nothing(tmp_path, monkeypatch):
    out, seen = tmp_path / "deep" / "a", []

    def stop(step, steps, loss):
        seen.append(out.exists())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nano.build(NanoConfig(out=str(out), **TINY), stop)
    assert seen == [False] and not list(out.parent.iterdir())

    def fail(*_):
        (out.parent / f".a-{os.getpid()}.tmp" / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_lm.utils.save_model", fail)
    with pytest.raises(UserError, match=r"a cannot be written \(No space left on device\)"):
        nano.build(NanoConfig(out=str(out), **TINY))
    assert not list(out.parent.iterdir())


def test_the_package_stays_small():
    folder, _ = names.resolve("nano")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6


def test_the_shipped_adapters_are_in_the_comparison_without_arguments_and_better_than_the_base(monkeypatch, tmp_path):
    """They fit nano, mlx_lm puts them on too, and each answers more of 150 problems than nano in its prompt."""
    from mlx_lm import load

    from mlx_traces.evaluation import evaluator, local
    from mlx_traces.models import loading, names
    from mlx_traces.pipelines import compare

    monkeypatch.chdir(tmp_path)  # found beside the package, wherever the command runs
    evals = compare.default_evals()
    assert [(settings.adapter is None, settings.prompt) for settings in evals[:2]] == [
        (True, "direct"),
        (True, "thinking"),
    ]
    shown = [(Path(settings.adapter).name, settings.prompt) for settings in evals[2:]]
    assert shown == list(compare.TRAINED)

    def correct(settings):
        settings = settings.model_copy(update={"limit": 150})
        loaded = loading.load("nano", settings.adapter)
        return sum(row["correct"] for row in local.measure(loaded, evaluator.plan(settings)))

    base = {settings.prompt: correct(settings) for settings in evals[:2]}
    for settings in evals[2:]:
        assert correct(settings) > base[settings.prompt]
        load(str(names.resolve("nano")[0]), adapter_path=settings.adapter)
