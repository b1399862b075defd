"""nano: its tokenizer, its making, and what it is supposed to be able to do."""

import json
import math
import os
from functools import partial
from pathlib import Path

import pytest
import yaml
from mlx.utils import tree_flatten

from mlx_traces.config import CompareConfig, NanoConfig
from mlx_traces.errors import UserError
from mlx_traces.models import loading, names
from mlx_traces.tasks.countdown import PROMPTS, generate, parse
from mlx_traces.traces.equations import equations
from mlx_traces.train import nano

TINY = {"hidden_size": 64, "layers": 1, "heads": 1, "intermediate_size": 64}
TINY |= {"problems": 200, "sequences": 320, "policy_sequences": 32}
SMALL = NanoConfig(problems=300, sequences=900, policy_sequences=300)
ARITHMETIC, POLICY = nano.stages(SMALL)


@pytest.fixture(scope="module")
def tokenizer():
    return nano.build_tokenizer()


@pytest.fixture(scope="module")
def pool():
    return nano.problems(SMALL)


def shorten(patch):
    """Let a build have several chunks and checkpoints, the last one out of step with the others."""
    patch.setattr(nano, "CHUNK", 64)
    patch.setattr(nano, "SAVE_EVERY", 2)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder of a build that is not cut off, and its losses."""
    losses, out = [], str(tmp_path_factory.mktemp("built") / "whole")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return nano.build(NanoConfig(out=out, **TINY), progress=lambda *step: losses.append(step[-1])), losses


def test_the_embedded_tokenizer_is_the_one_we_build(tokenizer, pool):
    """transformers puts its own pre-tokenizer in place of some; the ids would differ without an error."""
    loaded = loading.load("nano").tokenizer
    for ids, _ in nano.examples(SMALL, POLICY, pool, 0, tokenizer)[:50]:
        text = tokenizer.decode(ids)
        assert loaded.encode(text, add_special_tokens=False) == ids
    odd = "Ünïcode 2001, 33x 0x33\n\n200 201 🙂"
    assert loaded.encode(odd, add_special_tokens=False) == tokenizer.encode(odd, add_special_tokens=False)
    assert loaded.decode(loaded.encode(odd, add_special_tokens=False)) == odd


def test_prompts_and_traces_need_no_spelling(tokenizer, pool):
    """Every fixed part is one token: if a prompt's wording changes, nano has to be built anew."""
    for prompt in (PROMPTS["direct"], PROMPTS["thinking"]):
        messages = prompt.messages(parse({"nums": [3, 19, 42], "target": 64}, "here"))
        ids = loading.load("nano").tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert len(ids) == 15
    bytes_alone = {tokenizer.convert_tokens_to_ids(sign) for sign in "0123456789()"}  # one token as well
    for stage in (ARITHMETIC, POLICY):
        made = nano.examples(SMALL, stage, pool, 0, tokenizer)
        assert not any({token for token in ids[start:] if token < 256} - bytes_alone for ids, start in made)
        assert max(len(ids) for ids, _ in made) < nano.CONTEXT / 2


def test_examples_are_from_the_training_split_and_end_elsewhere_in_each_pass(tokenizer, pool):
    held_out = {tuple(sorted(nums)) for split in ("valid", "test") for nums, _ in generate(split, 300, 0)}
    assert not held_out & {tuple(sorted(nums)) for nums, _ in pool} and len(pool) == len({(*n, t) for n, t in pool})
    given_up, texts = {}, {}
    for stage in (ARITHMETIC, POLICY):
        completions = [tokenizer.decode(ids[start:]) for ids, start in nano.examples(SMALL, stage, pool, 0, tokenizer)]
        assert len(completions) > 0.98 * stage.sequences
        thoughts = [text for text in completions if "<think>" in text]
        assert all(all(equations(text)) for text in thoughts)
        assert 0 < len(completions) - len(thoughts) < 0.1 * len(completions)
        given_up[stage.name] = sum("near " in text for text in thoughts) / sum(text.count(" no\n") for text in thoughts)
        texts[stage.name] = completions
    assert 0.06 < given_up["arithmetic"] < 0.2 and 0.4 < given_up["policy"] < 0.7
    assert texts["arithmetic"][:300] != texts["arithmetic"][300:600]  # the second pass


def test_a_chunk_depends_on_nothing_but_its_place(tokenizer, pool, monkeypatch):
    monkeypatch.setattr(nano, "CHUNK", 100)
    whole = [nano.examples(SMALL, ARITHMETIC, pool, start, tokenizer) for start in (0, 100, 200)]
    assert nano.examples(SMALL, ARITHMETIC, pool, 200, tokenizer) == whole[2] != whole[1]


def test_only_completion_tokens_are_trained(tokenizer, pool):
    stop = tokenizer.eos_token_id
    for ids, mask in nano.batches(
        NanoConfig(sequences=32), nano.Stage("arithmetic", 32, 0.1, 0, 1), pool, 0, tokenizer
    ):
        for row, counted in zip(ids.tolist(), mask.tolist(), strict=True):
            start = row.index(tokenizer.convert_tokens_to_ids("assistant\n")) + 1
            end = max(i for i, token in enumerate(row) if token == stop)
            assert counted == [float(start <= i + 1 <= end) for i in range(len(counted))]


def test_a_build_learns_and_loads_with_mlx_lm(built):
    import mlx.core as mx
    from mlx_lm import load

    folder, losses = built
    assert 21 <= len(losses) <= 22 and losses[-1] < losses[0] - 1
    model, tokenizer = load(str(folder))
    assert json.loads((folder / "config.json").read_text())["quantization"] == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    assert model(mx.array([tokenizer.encode("Make 12")])).shape[-1] == len(nano.build_tokenizer())
    with pytest.raises(UserError, match="exists; remove it, or choose another --out"):
        nano.build(NanoConfig(out=str(folder), **TINY))


def test_the_defaults_of_a_build_are_the_settings_that_made_nano():
    written = Path(__file__).parents[2] / "configs" / "nano_build_countdown.yaml"
    assert NanoConfig(**yaml.safe_load(written.read_text())) == NanoConfig()


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
        with pytest.raises(UserError, match=r"^problems: only \d+ of 3 to 3 numbers .* 200; lower problems") as error:
            nano.build(NanoConfig(out=str(tmp_path / "a"), **TINY))
        with pytest.raises(UserError, match="operands 1-3 is not a range"):
            nano.build(NanoConfig(out=str(tmp_path / "a"), **{**TINY, "operands": (1, 3)}))
    assert not list(tmp_path.iterdir())
    count = int(str(error.value).split()[2])
    assert len(nano.problems(NanoConfig(**{**TINY, "problems": count}))) == count  # all there are


def test_the_output_folder_is_checked_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(nano, "batches", no_training)
    (tmp_path / "file").touch()
    for out in ("/proc/nano", "/proc/nano/deeper", str(tmp_path / "file" / "a"), str(tmp_path / ("x" * 300)), "/"):
        with pytest.raises(UserError, match="(cannot be written|exists).*choose another --out") as caught:
            nano.build(NanoConfig(out=out, **TINY))
        assert "\n" not in str(caught.value)


def test_a_build_is_seeded_and_one_that_is_cut_off_goes_on_to_the_same_model(built, tmp_path, monkeypatch):
    """Cut off in either stage, and between a stage's last checkpoint and the next."""
    import mlx.core as mx

    shorten(monkeypatch)
    settings = NanoConfig(out=str(tmp_path / "deep" / "a"), **TINY)
    seen = []

    def stop(stage, step, steps, loss):
        seen.append((stage, step))
        if seen.count(seen[-1]) == 1 and seen[-1] in [("arithmetic", 2), ("arithmetic", 14), ("policy", 1)]:
            raise KeyboardInterrupt

    for resume, left in ((False, []), (False, ["arithmetic"]), (True, ["arithmetic"])):
        with pytest.raises(KeyboardInterrupt):
            nano.build(settings, resume, stop)
        assert [file.stem for file in (tmp_path / "deep").rglob("*.safetensors")] == left
        assert not (tmp_path / "deep" / "a").exists()
    with pytest.raises(UserError, match="a.unfinished exists; pass --resume to continue it, or remove it"):
        nano.build(settings)
    with pytest.raises(UserError, match=r"a.unfinished: give_up was 0.12 when it began, now it is 0.5; remove"):
        nano.build(settings.model_copy(update={"give_up": 0.5}), True)
    resumed = nano.build(settings, True, stop)
    assert [path.name for path in resumed.parent.iterdir()] == ["a"]
    one, two = (mx.load(str(folder / "model.safetensors")) for folder in (built[0], resumed))
    assert all(mx.array_equal(one[key], two[key]) for key in one)


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    out = tmp_path / "deep" / "a"

    def fail(*_):
        (out.parent / f".a-{os.getpid()}.tmp" / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_lm.utils.save_model", fail)
    with pytest.raises(UserError, match=r"a cannot be written \(No space left on device\)"):
        nano.build(NanoConfig(out=str(out), **TINY | {"sequences": 32}))
    assert [path.name for path in out.parent.iterdir()] == ["a.unfinished"]  # what it learned is kept


def test_the_package_stays_small():
    folder, _ = names.resolve("nano")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1e6
    dense = loading.load("nano", device="cpu", weights="dense").model
    assert sum(array.size for _, array in tree_flatten(dense.parameters())) < 1.2e6


def test_the_comparison_without_arguments_tells_the_story(monkeypatch, tmp_path):
    """The shipped adapters fit nano, mlx_lm puts them on too, each round answers more than the one before, truly."""
    from mlx_lm import load

    from mlx_traces.pipelines import compare

    monkeypatch.chdir(tmp_path)  # found beside the package, wherever the command runs
    evals = [settings.model_copy(update={"limit": 40, "seed": 1}) for settings in compare.default_evals()]
    shown = [(settings.adapter and Path(settings.adapter).name, settings.prompt) for settings in evals]
    assert shown == [(None, "direct"), (None, "thinking"), *((name, "thinking") for name in compare.TRAINED)]
    frame, *_ = compare.compared(CompareConfig(evals=evals, runs_dir=str(tmp_path)))
    direct, thinking, epoch1, epoch2, *round3 = frame["accuracy"]
    assert direct < thinking - 0.1 and thinking < epoch1 < epoch2 < min(round3)
    assert min(round3) > 0.85 and min(round3) > thinking + 0.25
    assert math.isnan(frame["true_equations"][0]) and frame["true_equations"][1:].min() > 0.97
    assert frame["true_equations"][1] > 0.98  # nano itself
    for settings in evals[2:]:
        load(str(names.resolve("nano")[0]), adapter_path=settings.adapter)


def test_the_share_of_true_equations_is_that_of_the_thoughts():
    from mlx_traces.evaluation.comparison import Run
    from mlx_traces.pipelines.quality import true_equations

    def share(*completions):
        made = object.__new__(Run)  # only its samples are read
        object.__setattr__(made, "samples", [{"completion": text} for text in completions])
        return true_equations(made)

    assert share("<think>\n1 + 1 = 2, 2 + 2 = 5</think> 3 = 4 - 2", "<think>2 * 2 = 4") == 2 / 3
    assert math.isnan(share("1 + 1 = 2", "<think>none</think>"))
