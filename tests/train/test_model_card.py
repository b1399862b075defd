"""Model cards: what the hub checks of them, the licence of the base, foreign text, and paths that must not get out."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from factories import save_model
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from mlx_traces.config import EvalConfig, GRPOConfig, SFTConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import run
from mlx_traces.rl import grpo
from mlx_traces.runtime.fingerprints import fingerprint
from mlx_traces.train import fuse, model_card, sft

ROOT = Path(__file__).parents[2]
# Of the hub's documentation, "Licenses": some of each family, and what people write in their place.
LISTED = ("apache-2.0", "mit", "llama3.2", "gemma", "cc-by-nc-4.0", "bigscience-bloom-rail-1.0", "other", "openrail++")
NOT_LISTED = ("Apache 2.0", "apache2", "llama-3", "qwen", "")


def accepted(path):
    """Check a card as the hub does when it is pushed, as far as that is written down, and return it.

    The hub's documentation (modelcard.md, "Model cards", "Licenses"): ids of models and data sets, licences of the
    list, the tasks and relations it knows, and a model-index of the form that loads back.
    """
    text = path.read_text()
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert front.get("license") is None or front["license"] in model_card.LICENCES
    if front.get("license") == "other":
        assert re.fullmatch(r"[a-z0-9.+-]+", front.get("license_name", "x"))
        assert re.match("https://", front.get("license_link", "https://"))
    for name in [*filter(None, [front.get("base_model")]), *front.get("datasets", [])]:
        validate_repo_id(name)
        assert name.count("/") == 1
    assert ("base_model" in front) == ("base_model_relation" in front)
    assert front.get("base_model_relation", "adapter") in ("adapter", "finetune", "merge", "quantized")
    assert front["pipeline_tag"] == "text-generation" and front["library_name"] == "mlx" and "mlx" in front["tags"]
    assert all(isinstance(tag, str) and tag for tag in front["tags"])
    languages = front.get("language", [])
    assert all(re.fullmatch("[a-z]{2,3}|code|multilingual", one) for one in ([languages] * isinstance(languages, str)))
    for entry in front.get("model-index", []):
        assert entry["name"] and entry["results"]
        for result in entry["results"]:
            assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            assert all(metric["type"] and isinstance(metric["value"], float) for metric in result["metrics"])
    card = ModelCard(text)
    assert len(card.data.eval_results or []) == sum(
        len(result["metrics"]) for entry in front.get("model-index", []) for result in entry["results"]
    )
    return card


def adapter_in(folder, model="nano", **training):
    """Write an adapter's folder, its weights one array that nobody reads."""
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"a": mx.zeros((1,))})
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    about = {"model": model, "trained_by": "mlx-traces grpo", "training": {"model": model, **training}}
    settings = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters, **about}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("cards") / "tiny")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: Tiny Licence\nlicense_link: https://example.org/l\n---\n# Tiny\n"
    )
    return folder


def test_the_shipped_adapters_have_cards_that_say_what_was_measured():
    told = {"nano-epoch1": 68.1, "nano-epoch2": 78.8, "nano-grpo": 91.6, "nano-ppo": 93.5}
    for name, accuracy in told.items():  # as the table of nano's study has them
        card = accepted(ROOT / "adapters" / name / "README.md")
        found = {re.search("prompt ([a-z]+)", one.metric_name)[1]: one.metric_value for one in card.data.eval_results}
        assert found == {"thinking": accuracy}
        assert card.data.license == "mit" and "base_model" not in card.data.to_dict()  # nano is not on the hub
        assert card.data.model_name == name and "n = 1,000" in card.data.eval_results[0].metric_name
        assert f"--adapter path/to/{name} --task countdown --data 3-numbers --prompt thinking\n" in card.text


def test_generated_problems_are_called_so(tmp_path):
    told = {"3-numbers": "from generated problems (`3-numbers`),", str(tmp_path / "own.jsonl"): "from the data of `"}
    for data, expected in told.items():
        training = {"task": "countdown", "data": data}
        (line,) = model_card._data_lines(training, "grpo")
        assert expected in line
        uses = dict(model_card._uses(model_card.Base("nano", None), "a", training, False))
        assert uses["bash"].endswith("--task countdown --data 3-numbers" if data == "3-numbers" else "countdown")


def test_sft_writes_the_card_of_the_adapter_it_keeps(model_folder, tmp_path):
    file = tmp_path / "traces.jsonl"
    asked = [[{"role": "user", "content": f"{i}+1"}] for i in range(6)]
    rows = [{"id": f"t{i}", "messages": asked[i], "completion": f"{i + 1}"} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(model_folder), "data": str(file), "rank": 2, "batch_size": 2, "device": "cpu"}
    out = tmp_path / "a run"
    sft.train(SFTConfig(**settings, valid_share=0), out)
    card = accepted(out / "adapter" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "tiny-licence")
    assert card.data.license_link == "https://example.org/l"
    assert "base_model" not in card.data.to_dict() and "`tiny`" in card.text
    assert "at its last step" in card.text and "# a run" in card.text and "sft" in card.data.tags
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| `loss` | {last['loss']:.4g} |" in card.text
    assert str(tmp_path) not in str(card) and str(model_folder.parent) not in str(card)
    before = fingerprint(out / "adapter")
    assert model_card.rewrite(out / "adapter").read_text() == str(card)
    assert fingerprint(out / "adapter") == before  # evaluations know the adapter as before
    valid = sft.train(SFTConfig(**settings, valid_share=0.4, learning_rate=0.01, eval_every=1), tmp_path / "valid")
    text = (tmp_path / "valid" / "adapter" / "README.md").read_text()
    assert f"at step {valid.best_step}, the one" in text and f"| `valid/loss` | {valid.valid_loss:.4g} |" in text
    assert model_card.rewrite(tmp_path / "valid" / "adapter").read_text() == text  # the step that its result names
    (tmp_path / "valid" / "result.json").unlink()  # as in a run that was cut off
    assert model_card.rewrite(tmp_path / "valid" / "adapter").read_text() == text
    fuse.fuse(str(model_folder), str(out / "adapter"), tmp_path / "whole")
    fused = accepted(tmp_path / "whole" / "README.md")
    assert "with an adapter (16 bits" in fused.text and "adapter_path" not in fused.text and "# whole" in fused.text


def test_grpo_writes_its_validation_into_the_model_index(model_folder, tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}+1", "answer": str(i)}) + "\n" for i in range(4)))
    held_out = {"task": "qa", "data": str(file), "limit": 2, "max_tokens": 4}
    size = {"num_steps": 1, "prompts_per_step": 2, "group_size": 2, "max_tokens": 4, "rank": 2, "eval_every": 1}
    settings = {"model": str(model_folder), "task": "qa", "data": str(file), **size, "evaluate": held_out}
    result = grpo.train(GRPOConfig(**settings, device="cpu"), tmp_path / "rl")
    card = accepted(tmp_path / "rl" / "adapter" / "README.md")
    (own,) = card.data.eval_results
    assert own.metric_value == 100 * result.accuracy and own.dataset_split == "valid" and "chose" in own.metric_name
    assert own.dataset_name == "qa, problems.jsonl" and str(tmp_path) not in str(card)


def test_a_hub_model_is_the_base_and_its_data_set_is_named(tmp_path, monkeypatch):
    fronts = {"license": "apache-2.0", "language": "en", "base_model": "Qwen/Qwen2.5-0.5B-Instruct"}
    monkeypatch.setattr(model_card, "_front_matter_of", lambda name, revision: fronts)
    name = "mlx-community/Qwen2.5-0.5B-Instruct-4bit"
    card = accepted(model_card.write(adapter_in(tmp_path / "a", f"{name}@main", task="gsm8k")))
    assert (card.data.base_model, card.data.base_model_relation) == (name, "adapter")
    assert card.data.license == "apache-2.0" and card.data.datasets == ["openai/gsm8k"]
    assert f'load("{name}", adapter_path=' in card.text
    other = model_card.write(
        adapter_in(tmp_path / "b", name, task="countdown", data="Jiayi-Pan/Countdown-Tasks-3to4@main")
    )
    assert accepted(other).data.datasets == ["Jiayi-Pan/Countdown-Tasks-3to4"]
    assert accepted(model_card.write(adapter_in(tmp_path / "c", name))).data.get("datasets") is None


def test_sft_tells_its_file_and_how_many_traces_the_manifest_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = adapter_in(tmp_path / "a", data="own.jsonl")
    (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace("mlx-traces grpo", "mlx-traces sft")
    )
    for counts, words in (({"written": 1234}, "- 1,234 traces, from"), ({}, "- Traces, from"), ([], "- Traces, from")):
        Path("own.manifest.json").write_text(json.dumps({"counts": counts}))
        card = accepted(model_card.write(folder))
        assert f"{words} the file `own.jsonl`." in card.text and card.data.get("datasets") is None


@pytest.mark.parametrize("given", [*LISTED, *NOT_LISTED])
def test_licences_are_the_hubs_or_other(given):
    licence = model_card.licence_of({"license": given, "license_link": "LICENSE"}, "org/name")
    if given in LISTED[:-2] or given == "openrail++":
        assert licence == {"license": given}
    elif given:
        assert licence["license"] == "other"
        assert licence["license_link"] == "https://huggingface.co/org/name/blob/main/LICENSE"
    else:
        assert licence == {}


def test_a_base_without_a_card_or_with_a_broken_one_has_no_licence(tmp_path):
    for number, text in enumerate(
        (None, "no front matter", "---\na: [\n---\n", "---\n- a\n---\n", "---\nlicense: 3\n---\n")
    ):
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        if text is not None:
            (folder / "README.md").write_text(text)
        card = accepted(model_card.write(adapter_in(tmp_path / f"a{number}", str(folder))))
        assert "license" not in card.data.to_dict() or card.data.license is None
        assert "not known here" in card.text and str(tmp_path) not in str(card)


def test_foreign_text_is_neither_yaml_nor_markdown_nor_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "people" / "ada"))
    home = str(tmp_path / "people" / "ada")
    evil = "---\nlicense: mit\n---\n```\n# heading <script>alert(1)</script> {{ 7 * 7 }} | a: [b\n````x"
    folder = adapter_in(
        tmp_path / "a|b<i> `x` [y](z) {{ 7*7 }}: #1",
        str(tmp_path / "some model `with` | marks"),
        system=f"{evil} see {home}/secret.txt",
        data=f"{home}/data/my `file` | <b>.jsonl",
        prompt="/somewhere/else/prompt.yaml",
        adapter=f"{home}/runs/start/adapter",
        prefill="/no_think",
    )
    card = accepted(model_card.write(folder))
    text = str(card)
    assert str(tmp_path) not in text and "/somewhere" not in text and "start/adapter" in text
    assert text.count("\n---\n") == 2 - 1 + text.partition("yaml\n")[2].count("\n---\n")  # only inside the settings
    outside = re.sub(r"(?s)(`{4,})yaml\n.*?\n\1\n", "", card.text)
    assert "<script>" not in outside and "49" not in outside
    assert not re.search(r"(?<![`\\])<[bi]>", re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside))
    fence, settings = re.search(r"(?s)(`{4,})yaml\n(.*?)\n\1\n", card.text).groups()
    assert len(fence) == 5  # longer than any run inside
    stored = yaml.safe_load(settings)
    assert stored["system"] == f"{evil} see ~/secret.txt" and stored["prefill"] == "/no_think"
    (row,) = [line for line in card.text.splitlines() if line.startswith("# ")][:1]
    assert row == r"# a\|b\<i\> \`x\` \[y\](z) {{ 7\*7 }}: \#1"


def test_evaluations_of_the_adapter_and_its_base_are_put_in_and_others_refused(tmp_path):
    folder = tmp_path / "nano-grpo"
    shutil.copytree(ROOT / "adapters" / "nano-grpo", folder, ignore=shutil.ignore_patterns("README.md"))
    ask = {"task": "countdown", "limit": 2, "max_tokens": 2, "rows": 2, "prompt": "direct"}
    runs = {name: tmp_path / name for name in ("with", "without", "other")}
    for name, adapter in (("with", str(folder)), ("without", None)):
        run.evaluate(config=EvalConfig(**ask, adapter=adapter), out=runs[name])
    shutil.copytree(runs["with"], runs["other"])
    about = json.loads((runs["other"] / "run.json").read_text())
    about["identity"]["adapter_files"] = fingerprint(ROOT / "adapters" / "nano-ppo")
    (runs["other"] / "run.json").write_text(json.dumps(about))
    card = accepted(model_card.rewrite(folder, [runs["without"], runs["with"]]))
    (own,) = card.data.eval_results
    result = json.loads((runs["with"] / "result.json").read_text())
    assert own.metric_value == round(100 * result["accuracy"], 1) and own.dataset_split == "test"
    assert "none, the base model" in card.text and "| `nano-grpo` | `countdown` | `direct` |" in card.text
    assert "95 % interval [" in own.metric_name and "n = 2" in own.metric_name
    with pytest.raises(UserError, match="of another adapter"):
        model_card.rewrite(folder, [runs["other"]])
    (folder / "README.md").write_text("# My own words\n")
    with pytest.raises(UserError, match="not written by mlx-traces; move it away"):
        model_card.rewrite(folder)
