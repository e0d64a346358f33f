"""What lm-evaluation-harness sends with `examples/lm-eval/`, in its own form; the harness itself is not needed."""

from collections.abc import Callable
from pathlib import Path

import httpx
import jinja2
import pytest
import yaml

TASK = yaml.safe_load((Path(__file__).parents[2] / "examples/lm-eval/gmsa_qa.yaml").read_text())
ROW = {"input": "Herons stand by rivers. " * 10, "prompt": "Who stands there?", "answer": ["herons"]}
SETTINGS = {"model": "gmsa", "max_tokens": 4, "temperature": 0, "stop": ["\n"], "seed": 1234}


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_the_context_is_compressed_and_the_question_stays_text(route: str, serve_tiny: Callable[..., str]) -> None:
    text = jinja2.Template(TASK["doc_to_text"]).render(ROW)
    given = {"prompt": [text]} if route == "completions" else {"messages": [{"role": "user", "content": text}]}
    address = serve_tiny(max_prompt_tokens=512, merge_size=4, auto_compress=64)
    said = httpx.post(f"{address}/v1/{route}", json={**SETTINGS, **given}, timeout=60).json()
    details = said["usage"]["prompt_tokens_details"]
    assert details["soft_tokens"] == 60
    assert details["origin_tokens"] == len(ROW["input"])  # without the question
    assert ROW[TASK["doc_to_target"]] == ["herons"]
