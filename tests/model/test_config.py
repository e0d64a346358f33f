"""Every field that cannot work is named."""

import re
from typing import Any

import pytest

from gmsa.config import GmsaConfig
from gmsa.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_layers": 0}, "encoder_layers must be a whole number >= 1, got 0"),
        ({"encoder_layers": "half"}, "encoder_layers must be"),
        ({"encoder_layers": True}, "encoder_layers must be"),
        ({"lsa_layers": 1.5}, "lsa_layers must be"),
        ({"window_size": 0}, "window_size must be"),
        ({"max_appended": 0}, "max_appended must be"),
        ({"merging": "max"}, "merging must be one of mean, appended, got 'max'"),
        ({"lsa": "attention"}, "lsa must be one of"),
        ({"prompt": None}, "prompt must be one of"),
        ({"lsa": "ridge", "encoder": {"name": "x/y"}}, "lsa 'ridge' needs an encoder and a decoder of one backbone"),
        ({"memory_marks": ["<a>"]}, "memory_marks must be a list of two tokens, got"),
        ({"final_norm": True, "encoder_layers": 2, "entry_layer": 3}, "set final_norm to false"),
        ({"encoder_lora": {"r": 8}}, "encoder_lora needs"),
        ({"trained": ["encoder", "head"]}, r"trained must name groups of .*; unknown: \['head'\]"),
        ({"merging": "appended", "window_size": 100, "max_appended": 99}, "max_appended must be at least window_size"),
        ({"merging": "appended", "window_size": None}, "max_appended must be at least window_size"),
    ],
)
def test_a_field_that_cannot_work_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GmsaConfig(**fields)


def test_the_defaults_are_the_papers_and_valid() -> None:
    config = GmsaConfig()
    assert (config.encoder_layers, config.merging, config.lsa, config.lsa_layers) == (8, "mean", "decoder", 1)
    assert config.restore_instruction == "Restate the aforementioned Text."
    assert GmsaConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lsa": ["decoder"]}, "lsa must be one of"),
        ({"system_prompt": 5}, "system_prompt must be a text, got 5"),
        ({"trained": 5}, "trained must list groups of"),
        ({"decoder": "name"}, "decoder must point to a backbone by its name, got 'name'"),
        ({"encoder": {}}, "encoder must point to a backbone by its name, got {}"),
        ({"encoder_lora": {"r": "x", "alpha": 3}}, "encoder_lora: r must be a whole number"),
        ({"decoder_lora": {"r": 2, "alpha": "x"}}, "decoder_lora: alpha must be a number"),
    ],
)
def test_values_of_the_wrong_kind(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        GmsaConfig(**fields)
