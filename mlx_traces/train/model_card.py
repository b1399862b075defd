"""Model cards: the README.md of an adapter's folder, for the hub and for people. No MLX.

A card names the base model, data, settings, measured figures, the way to load the adapter, and the base's licence. All
of it comes from the adapter's settings and its run folder, so a card can be rewritten. Texts of users and models are
quoted as code; of this machine's paths only the ends are shown.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, errors, hf_hub_download
from huggingface_hub.repocard import metadata_load

from mlx_traces.errors import UserError
from mlx_traces.models import adapter_config, names
from mlx_traces.readers import is_file, is_number, read_json
from mlx_traces.runtime import hub
from mlx_traces.runtime.files import on_the_way, write_atomic
from mlx_traces.runtime.fingerprints import doubt, fingerprint
from mlx_traces.runtime.run_folder import RunFolder, best_of, existing
from mlx_traces.tasks import TASKS, countdown, gsm8k, math
from mlx_traces.text import clean, interval, percent
from mlx_traces.traces.files import manifest_path

CARD = "README.md"
TEMPLATE = Path(__file__).parent / "templates" / "card.md"
MARK = "<!-- Written by mlx-traces"
GENERIC = ("adapter", "adapters", "best", "last", "final")  # the card's title is then the parent folder's name
KINDS = {"lora": "LoRA adapter", "dora": "DoRA adapter", "full": "set of fully trained weights"}
METHODS = {
    "sft": "supervised fine-tuning on traces",
    "grpo": "reinforcement learning (GRPO)",
    "ppo": "reinforcement learning (PPO)",
}
# Metrics about the adapter, not the machine.
TOLD = ("loss", "valid/", "reward/", "steps/", "rollout/", "policy/", "value/")
FILES = (  # settings that name one
    *("model", "adapter", "data", "valid", "reference", "shots_data", "prompt"),
    *("judge", "judge_prompt", "judge_cache"),
)
# The hub's identifiers of licences (hub documentation, "Licenses", and those added since).
IDENTIFIERS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other
"""
LICENCES = frozenset(IDENTIFIERS.split())


@dataclass(frozen=True)
class Base:
    """A base model as a card names it.

    ``name`` has no paths of this machine. ``hub_id`` is None for a model that is not on the hub. ``licence`` holds the
    hub's fields ``license``, ``license_name`` and ``license_link``, and is empty if the licence is unknown.
    """

    name: str
    hub_id: str | None
    licence: dict[str, str] = field(default_factory=dict)


def base_of(spec: str, folder: Path | None = None) -> Base:
    """Describe a base model, from its own card if it has one.

    Args:
        spec: ``nano``, a folder, or a hub id with a revision or without.
        folder: where the model is, if it was loaded.
    """
    if spec == names.NANO:
        return Base(spec, None, {"license": "mit"})
    if names.is_folder(spec) or not re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", spec):
        return Base(last_parts(spec), None, licence_of(_front_matter(folder or Path(spec).expanduser()), None))
    name, _, revision = spec.partition("@")
    front = _front_matter(folder) if folder and (folder / CARD).is_file() else _front_matter_of(name, revision or None)
    return Base(spec, name, licence_of(front, name))


def licence_of(front: Mapping[str, Any], hub_id: str | None) -> dict[str, str]:
    """Return the hub's fields of a licence; one that is not on the hub's list is ``other``, with its name."""
    given = front.get("license")
    if not isinstance(given, str) or not given.strip() or given == "unknown":
        return {}
    if given in LICENCES - {"other"}:
        return {"license": given}
    name = front.get("license_name") if given == "other" else given
    fields = {"license": "other"}
    if isinstance(name, str) and (slug := re.sub(r"[^a-z0-9.+-]+", "-", name.lower()).strip("-")[:60]):
        fields["license_name"] = slug
    link = front.get("license_link")
    if isinstance(link, str) and re.fullmatch(r"https?://\S+", link):
        fields["license_link"] = link
    elif isinstance(link, str) and hub_id and re.fullmatch(r"[\w.-]+", link):
        fields["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return fields


def _front_matter(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's card; empty if there is no readable card."""
    try:
        return metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}


@cache
def _front_matter_of(hub_id: str, revision: str | None) -> dict[str, Any]:
    """Return the metadata of a card on the hub, which mlx_lm does not download; empty if it is out of reach."""
    away = bool(hub.out_of_reach())
    try:
        return _front_matter(Path(hf_hub_download(hub_id, CARD, revision=revision, local_files_only=away)).parent)
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError):
        return {}


def write(
    adapter: Path,
    base: Base | None = None,
    runs: Sequence[Path] = (),
    fused: tuple[Path, str] | None = None,
    title: str | None = None,
) -> Path:
    """Write the card of an adapter, or of a model that it was fused into. The metrics are those of its run folder.

    Args:
        adapter: its folder, complete except for the card.
        base: the base model; default: from its name and the hub.
        runs: finished evaluations with the adapter, and of the base model alone.
        fused: the folder of the fused model, which gets the card, and its kind of weights.
        title: the card's title; default: the name of the folder or of its run.

    Returns:
        The file.

    Raises:
        UserError: if the folder is no adapter, or an evaluation is unfinished or of another adapter.
    """
    config = adapter_config.read_config(adapter)
    training = config.get("training") if isinstance(config.get("training"), dict) else {}
    base = base or base_of(str(config.get("model") or "an unknown model"))
    title = title or title_of(adapter)
    method = str(config.get("trained_by", "")).rpartition(" ")[2]
    results = [_evaluation(Path(run), adapter, config) for run in runs]
    row, chosen = _kept(adapter.parent)
    settings = yaml.safe_dump(shown(training), sort_keys=False, allow_unicode=True, width=100).strip()
    measured = [*(result for result in results if result["adapter"]), *_validation(row, training)]
    content = {
        "title": _plain(title),
        "summary": _summary(config, base, method, fused[1] if fused else None),
        "uses": list(_uses(base, title, training, fused is not None)),
        "evaluations": [_table_row(result, title) for result in results],
        "measured": [
            (code(name), f"{value:.4g}") for name, value in row.items() if name.startswith(TOLD) and is_number(value)
        ],
        "moment": f"at step {row.get('step', 0):,}, the one that was kept" if chosen else "at its last step",
        "chosen": chosen,
        "data": list(_data_lines(training, method)),
        "settings": settings,
        "fence": fence_for(settings),
        "licence": _licence_text(base),
    }
    metadata = _metadata(base, config, training, method, title, measured)
    if fused and "base_model" in metadata:
        metadata["base_model_relation"] = "finetune"
    path = (fused[0] if fused else adapter) / CARD
    with nullcontext() if fused else on_the_way(path):
        card = ModelCard.from_template(ModelCardData(**metadata), template_path=str(TEMPLATE), **content)
        write_atomic(path, f"{card}\n")
    return path


def rewrite(adapter: Path, runs: Sequence[Path] = ()) -> Path:
    """Rewrite a finished adapter's card: ``mlx-traces card``. The metrics are those of its run folder.

    Raises:
        UserError: as `write`; if mlx-traces did not write the card.
    """
    adapter = adapter.expanduser()
    adapter_config.read_config(adapter)
    there = adapter / CARD
    if there.exists() and MARK not in there.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{there}: not written by mlx-traces; move it away first, or it would be lost")
    return write(adapter, runs=runs)


def _kept(run: Path) -> tuple[Mapping[str, Any], bool]:
    """Return the line of metrics at the step of a run's adapter, and whether a validation chose it.

    The step is that of the best validation so far, else the last; the line is empty if the folder is no run folder.
    """
    folder = RunFolder(run)
    rows = folder.metrics if folder.begun else []
    if best := best_of(rows):  # an unfinished run has no result that names it
        return best, True
    return (rows[-1] if rows else {}), False


def title_of(adapter: Path) -> str:
    """Return the name of an adapter's folder, or of its run if that folder is called ``adapter`` or alike."""
    folder = adapter.resolve()
    named = folder.parent if folder.name in GENERIC and folder.parent.name else folder
    return clean(named.name) or "adapter"


def _metadata(
    base: Base, config: dict[str, Any], training: dict[str, Any], method: str, title: str, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the card's front matter, in the hub's fields and terms."""
    kind = config.get("fine_tune_type", "lora")
    tags = ["mlx", "mlx-traces", *([] if kind == "full" else [kind]), *([method] if method in METHODS else [])]
    task = _task_of(training)
    found = [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=result["dataset"],
            dataset_name=result["dataset_name"],
            dataset_config=gsm8k.CONFIG if result["dataset"] == gsm8k.HUB else None,
            dataset_split=result["split"],
            metric_type="accuracy",
            metric_value=round(100 * result["accuracy"], 1),
            metric_name=result["metric"],
        )
        for result in results
    ]
    return {
        **base.licence,
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        **(
            {"base_model": base.hub_id, "base_model_relation": "finetune" if kind == "full" else "adapter"}
            if base.hub_id
            else {}
        ),
        "datasets": _datasets(training, method) or None,
        "tags": [*tags, *([task] if task else [])],
        **({"model_name": title, "eval_results": found, "metrics": ["accuracy"]} if found else {}),
    }


def _summary(config: dict[str, Any], base: Base, method: str, fused: str | None) -> str:
    """Return a sentence on the adapter, its model and how it was made."""
    kind = config.get("fine_tune_type", "lora")
    settings = config.get("lora_parameters") or {}
    size = f", rank {settings['rank']}, scale {settings['scale']:g}" if "rank" in settings else ""
    layers = config.get("num_layers", -1)
    on = "all layers" if layers in (-1, None) else f"the last {layers} layers"
    made = METHODS.get(method, "training")
    whole = f"A base model fused with an adapter ({fused}). The adapter is a" if fused else "A"
    if base.hub_id:
        model = f"[{_plain(base.name)}](https://huggingface.co/{base.hub_id})"
    elif base.name == names.NANO:
        model = "`nano`, the small model that comes with mlx-traces (it is not on the hub)"
    else:
        model = f"the model in a folder {code(base.name)}"
    return f"{whole} {KINDS[kind]} ({on}{size}) for {model}, made by {made} with mlx-traces and MLX."


def _uses(base: Base, title: str, training: dict[str, Any], fused: bool) -> Iterator[tuple[str, str]]:
    """Yield (language, code) examples of the adapter, or the fused model, in mlx_lm and mlx_traces."""
    folder = f"path/to/{_slug(title)}"
    spec = base.name if base.hub_id or base.name == names.NANO else f"path/to/{_slug(Path(base.name).name)}"
    plain = base.hub_id or spec
    first = ["from mlx_lm import generate, load", ""]
    model = json.dumps(plain)
    if base.name == names.NANO and not fused:
        first = ["from mlx_lm import generate, load", "from mlx_traces.models import names", ""]
        model = 'str(names.resolve("nano")[0])'
    asked = [
        f"model, tokenizer = load({json.dumps(folder) if fused else f'{model}, adapter_path={json.dumps(folder)}'})",
        'messages = [{"role": "user", "content": "your question"}]',
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)",
        "print(generate(model, tokenizer, prompt, max_tokens=256))",
    ]
    yield "python", "\n".join([*first, *asked])
    words = ["mlx-traces", "eval", "--model", *([folder] if fused else [spec, "--adapter", folder])]
    if task := _task_of(training):
        words += ["--task", task]
        held_out = training.get("evaluate") or {}
        data = held_out.get("data") or (training.get("data") if training.get("task") else None)
        if isinstance(data, str) and countdown.generated_operands(data):  # a file may not be where the card is read
            words += ["--data", data]
        prompt = held_out.get("prompt") or training.get("prompt")
        if isinstance(prompt, str) and re.fullmatch(r"[\w-]+", prompt):
            words += ["--prompt", prompt]
    yield "bash", shlex.join(words)


def _task_of(training: Mapping[str, Any]) -> str | None:
    """Return the task of a training, or of its validation; None if its settings do not name one."""
    task = training.get("task") or (training.get("evaluate") or {}).get("task")
    return task if task in TASKS else None


def _datasets(training: Mapping[str, Any], method: str) -> list[str]:
    """Return the hub data set whose problems GRPO or PPO trained on, if its settings name one."""
    data = training.get("data")
    if method not in ("grpo", "ppo"):
        return []  # a file of traces
    if data is None:
        return list(filter(None, [_own_set(training.get("task"), training.get("split", "train"))]))
    return [data.partition("@")[0]] if _is_hub_set(data) else []


def _own_set(task: Any, split: Any) -> str | None:
    """Return the hub data set that a task reads by itself; None for one that makes its problems."""
    return {"gsm8k": gsm8k.HUB, "math": math.HUB.get(str(split).partition("[")[0])}.get(str(task))


def _is_hub_set(name: Any) -> bool:
    """Whether a text has the form of a hub id and is no file here."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", name)) and not is_file(name)


def _data_lines(training: Mapping[str, Any], method: str) -> Iterator[str]:
    """Describe the training data, in lines."""
    data = training.get("data")
    if method in ("grpo", "ppo"):
        task = training.get("task") or "countdown"
        known = _own_set(task, training.get("split", "train"))
        own = f"the data set {code(known)}" if known else "generated problems" if task in TASKS else "its own problems"
        if data is None:
            source = own
        elif task == "countdown" and countdown.generated_operands(str(data)):
            source = f"generated problems ({code(data)})"
        else:
            source = f"the data of {code(last_parts(data))}"
        prompt = training.get("prompt")
        yield f"Problems of the task {code(task)}, from {source}, graded by the task's own checker" + (
            f", in the prompt {code(last_parts(prompt))}." if isinstance(prompt, str) else "."
        )
    elif isinstance(data, str):
        count = "Traces"
        with suppress(UserError, OSError, ValueError, LookupError, TypeError):
            count = f"{read_json(manifest_path(Path(data)))['counts']['written']:,} traces"
        yield f"{count}, from the file {code(last_parts(data))}."
    else:
        yield "The settings do not say what data it was trained on."


def _validation(row: Mapping[str, Any], training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the held-out accuracy of a training's kept step as a result for the hub, if it has one."""
    settings = training.get("evaluate")
    if "valid/accuracy" not in row or not isinstance(settings, dict):
        return []
    task, data = settings.get("task", "countdown"), settings.get("data")
    dataset, name = _dataset(task, data, settings.get("split", "valid"))
    metric = f"accuracy in %, on the validation problems that chose the step, {settings.get('limit', 200)} at most"
    split = str(settings.get("split", "valid")).partition("[")[0]
    accuracy = row["valid/accuracy"]
    return [{"dataset": dataset, "dataset_name": name, "split": split, "accuracy": accuracy, "metric": metric}]


def _dataset(task: Any, data: Any, split: Any) -> tuple[str, str]:
    """Return a data set's identifier and a name for readers."""
    if _is_hub_set(data):
        own = data.partition("@")[0]
        return own, own
    if data is not None:
        return clean(task), f"{clean(task)}, {last_parts(data)}"
    if own := _own_set(task, split):
        return own, own.partition("/")[2] if task == "math" else "GSM8K"
    return clean(task), f"{clean(task)}, generated by mlx-traces" if task in TASKS else clean(task)


def _evaluation(run: Path, adapter: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Read a finished evaluation of the adapter, or of its base alone.

    Raises:
        UserError: if it is neither.
    """
    folder = existing(run, "run.json", "result.json")
    about, result = folder.identity, folder.result or {}
    if "problems" not in about:
        raise UserError(f"{run}: not an evaluation; make one with: mlx-traces eval --adapter {adapter}")
    own = about.get("adapter_files")
    now = fingerprint(adapter)
    if own is not None and (reason := doubt(own, now)):
        raise UserError(
            f"{run}: it may be an evaluation of other weights (adapter_files: {reason}); make a new one with: "
            "mlx-traces eval"
        )
    if own not in (None, now):
        raise UserError(f"{run}: an evaluation of another adapter, {about.get('adapter')}, or of other weights in it")
    if own is None and str(about.get("model")) != str(config.get("model")):
        raise UserError(f"{run}: an evaluation of {about.get('model')}, not of this adapter or its base")
    dataset, name = _dataset(result["task"], about.get("data"), result["split"])
    greedy = "greedy" if not result["temperature"] else f"temperature {result['temperature']:g}"
    decoding = f"{greedy}, at most {result['max_tokens']:,} tokens"
    prompt, number = last_parts(result["prompt"]), f"n = {result['total_questions']:,}"
    ends = f"95 % interval {interval(result['ci_low'], result['ci_high'])}"
    metric = f"accuracy in %, prompt {prompt}, extractor {result['extractor']}, {decoding}, {number}, {ends}"
    split = str(result["split"]).partition("[")[0]
    told = {"dataset": dataset, "dataset_name": name, "split": split, "decoding": decoding, "metric": clean(metric)}
    return {**result, **told, "prompt": prompt, "adapter": own is not None}


def _table_row(result: dict[str, Any], title: str) -> tuple[str, ...]:
    name = code(title) if result["adapter"] else "none, the base model"
    task, prompt, extractor = (code(clean(result[key])).replace("|", "\\|") for key in ("task", "prompt", "extractor"))
    share, ends = f"{percent(result['accuracy'])} %", interval(result["ci_low"], result["ci_high"])
    counts = f"{result['correct_count']:,}", f"{result['total_questions']:,}"
    return name.replace("|", "\\|"), task, prompt, extractor, share, ends, *counts, result["decoding"]


def _licence_text(base: Base) -> str:
    if not base.licence:
        return "The licence of the base model is not known here; look it up before you share or use this adapter."
    name = base.licence.get("license_name") or base.licence["license"]
    link = base.licence.get("license_link")
    return f"That of the base model: {code(name)}" + (f", see <{link}>." if link else ".")


def shown(value: Any, name: str = "") -> Any:
    """Return settings without paths of this machine: cut files to their last parts, shorten folders in texts."""
    if isinstance(value, dict):
        return {clean(key): shown(one, str(key)) for key, one in value.items() if one is not None}
    if isinstance(value, (list, tuple)):
        return [shown(one, name) for one in value]
    if not isinstance(value, str):
        return value
    text = last_parts(value) if name in FILES and "\n" not in value else value
    for folder, short in ((Path.cwd(), "."), (Path.home(), "~")):
        text = text.replace(str(folder), short) if len(folder.parts) > 2 else text
    return text


def last_parts(path: str) -> str:
    """Cut a path of this machine to its last parts; names, hub ids and paths from here stay as they are."""
    text = clean(path)
    if not text.startswith(("/", "~", "\\")) and ".." not in Path(text).parts and text[1:2] != ":":
        return text
    parts = [part for part in re.split(r"[/\\]+", text) if part not in ("", "~", "..")]
    return "/".join(parts[-2:] if parts and parts[-1] in GENERIC else parts[-1:]) or "folder"


def fence_for(text: str, least: int = 3) -> str:
    """Return a fence of ``least`` or more backticks that nothing in ``text`` can close."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def code(text: str) -> str:
    """Quote foreign text as code, so that Markdown and HTML in it have no effect."""
    text = clean(text)
    marks = fence_for(text, 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{marks}{pad}{text}{pad}{marks}"


def _plain(text: str) -> str:
    """Escape the characters that Markdown and HTML interpret."""
    return re.sub(r"([\\`*_\[\]<>#|~&$!])", r"\\\1", clean(text))


def _slug(text: str) -> str:
    """Return a text as a folder's name that needs no quotes in a command."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "folder"
