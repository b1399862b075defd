"""Names of models and adapters: what each means, and one line for what is none."""

import pytest

from mlx_traces.errors import UserError
from mlx_traces.models.loading import load
from mlx_traces.models.names import base_name, check, is_folder, is_here, local_folder, resolve, split_adapter


@pytest.mark.parametrize(
    "spec",
    [
        *("Qwen/Qwen2.5-0.5B-Instruct", "mlx-community/Qwen2.5-0.5B-Instruct-4bit", "me/qwen2.5-0.5b-instruct-mlx@v1"),
        "~/.cache/models--mlx-community--Qwen2.5-0.5B-Instruct-8bit/snapshots/0123abcd",
        *("/models/Qwen2.5-0.5B-Instruct/", "runs/models/Qwen2.5-0.5B-Instruct-4bit-g32-89abcdef"),
        *("Qwen2.5-0.5B-Instruct-mxfp4", "Qwen2.5-0.5B-Instruct-16bit-89abcdef"),
    ],
)
def test_conversions_and_downloads_have_one_base_name(spec):
    assert base_name(spec) == "qwen2.5-0.5b-instruct"


def test_split_adapter(tmp_path):
    (tmp_path / "a+b").mkdir()
    (tmp_path / "c").mkdir()
    assert split_adapter("nano") == ("nano", None)
    assert split_adapter("org/model@main+runs/x") == ("org/model@main", "runs/x")
    assert split_adapter(str(tmp_path / "a+b")) == (str(tmp_path / "a+b"), None)
    assert split_adapter(f"{tmp_path}/a+b+{tmp_path}/c") == (f"{tmp_path}/a+b", f"{tmp_path}/c")
    assert split_adapter(f"nano+{tmp_path}/a+b") == ("nano", f"{tmp_path}/a+b")


def test_split_adapter_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ad").mkdir()
    assert split_adapter("nano+~/ad") == ("nano", f"{tmp_path}/ad")
    assert split_adapter("~/ad+~/ad") == (f"{tmp_path}/ad", f"{tmp_path}/ad")
    assert split_adapter("~/ad") == (f"{tmp_path}/ad", None)
    assert split_adapter("nano+~/nothing") == ("nano", "~/nothing")
    assert split_adapter("nano", "~/ad") == ("nano", f"{tmp_path}/ad") and split_adapter("nano", "") == ("nano", None)
    with pytest.raises(UserError, match="two adapters, a and ~/ad: give one"):
        split_adapter("nano+a", "~/ad")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nanno",
            r"unknown model 'nanno': give nano, a folder, or a hub id such as .*; did you mean 'nano'\?",
        ),
        ("Qwen2.5-0.5B-Instruct-4bit", r"did you mean 'mlx-community/Qwen2.5-0.5B-Instruct-4bit'\?"),
        (
            "mlx-community/Qwen2.5-7B-Instruct-4bt",
            r"could not be downloaded \(HF_HUB_OFFLINE is set\); pass nano",
        ),
        ("mlx-community/Qwen2.5-7B-Instruct-4bt", r"did you mean 'mlx-community/Qwen2.5-7B-Instruct-4bit'\?"),
        ("org/model@v1", r"org/model@v1 could not be downloaded"),
        ("./nothing", r"\./nothing: no such folder; give nano"),
        ("a/b/c", r"a/b/c: no such folder"),
        ("nano@main", "has no revisions"),
        ("", "unknown model ''"),
        ("x" * 400, r"unknown model 'x+\.\.\.x+': give nano"),
        ("~/" + "x" * 400, r"~/x+\.\.\.x+: no such folder"),
        ("~nosuchuser/model", "~nosuchuser/model: no such folder"),
        ("org/" + "x" * 200, "unknown model 'org/x.*: not of the form of a hub id"),
        ("./two\nlines", r"\./two\?lines: no such folder"),
    ],
)
def test_names_that_are_no_model(name, message, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_folder_named_nano_is_the_model_only_if_it_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert (resolve("nano")[0] / "tokenizer.json").is_file() and is_here("nano") and load("nano").name == "nano"
    with pytest.raises(UserError, match=r"^\./nano: not a model folder, config.json is missing$"):
        check("./nano")
    (tmp_path / "nano" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^nano: not a model folder, model\*.safetensors is missing$"):
        check("nano")


def test_names_too_long_for_a_folder():
    assert not is_folder("x" * 400) and not is_folder("") and not is_folder("~nosuchuser/x") and is_folder(".")
    assert split_adapter("x" * 400 + "+" + "y" * 400) == ("x" * 400, "y" * 400)
    for name, adapter_name in (("x" * 400, None), ("nano", "x" * 400), ("nano+" + "x" * 400, None)):
        for refuse in (check, load):
            with pytest.raises(UserError) as caught:
                refuse(name, adapter_name)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def hub_error(kind: str) -> Exception:
    """Make the error that the hub client raises."""
    from unittest.mock import Mock

    from huggingface_hub import errors

    return getattr(errors, kind)("many\nlines", response=Mock(headers={}, status_code=404))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "unknown model 'org/model': not on the hub, or private"),
        ("GatedRepoError", "org/model asks for an agreement first"),
        ("RevisionNotFoundError", "org/model has no revision 'v1'"),
    ],
)
def test_hub_errors_are_one_line(kind, message, monkeypatch, tmp_path):
    import huggingface_hub

    def fail(*_, **__):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message) as caught:
        resolve("org/model@v1")
    assert "\n" not in str(caught.value)


def test_half_a_download_is_no_model_where_the_rest_cannot_be_had(tmp_path, monkeypatch):
    """Older clients of the hub return its folder; what is missing in it is no fault of the model's."""
    import huggingface_hub

    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match=r"org/model could not be downloaded \(HF_HUB_OFFLINE is set\); pass nano"):
        resolve("org/model")


def test_what_is_on_this_machine_is_told_from_the_hub(tiny_folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert local_folder(str(tiny_folder)) == tiny_folder and local_folder("nano").is_dir()
    assert local_folder("org/model") is None and is_here("nano") and not is_here("org/model@v1")
    with pytest.raises(UserError, match="not a model folder"):
        local_folder(str(tmp_path))
