"""Chat templates: one of each kind, and a folder of real ones where MLX_TRACES_TEMPLATES names it."""

import csv
import os
from datetime import date
from pathlib import Path

import pytest
from zoo import ANSWER, ONE, TALKS, THOUGHT, Zoo, squeezed

from mlx_traces.errors import UserError

HERE = Path(__file__).parent / "templates"
TOKENS = {
    "spaces": {"kind": "sp-legacy", "eos": "</s>"},
    "another_head_in_the_history": {"kind": "sp-first", "eos": "</s>"},
    "channels": {"eos": "<|return|>", "stops": "<|return|>,<|call|>"},
    "tags_of_its_own": {"kind": "sp-none", "eos": "<eos>", "stops": "<eos>,<turn|>"},
    "turns_without_end": {"eos": "<|endoftext|>", "stops": "<|endoftext|>,<|user|>"},
}


def zoo(name: str) -> Zoo:
    return Zoo((HERE / f"{name}.jinja").read_text(encoding="utf-8"), **TOKENS.get(name, {}))


@pytest.mark.parametrize("name", sorted(path.stem for path in HERE.glob("*.jinja")))
def test_every_kind(name):
    assert zoo(name).faults() == []
