"""Schemathesis asks the server whatever its OpenAPI description allows, and what it does not."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
from server import running

from gmsa import GMSA
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.serve.service import Service
from gmsa.serve.settings import Settings

KEY = "key"
# 400 is for what no schema can say: prompt and answer together too long, a memory of another model, safetensors that
# are none. 404 is for ids of no memory.
CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "404"]
"""


def test_the_description_holds(
    tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel], tmp_path: Path
) -> None:
    gmsa = GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama"))
    settings = Settings(
        store=tmp_path / "store", api_key=KEY, max_new_tokens=4, max_prompt_tokens=256, auto_compress=32,
        accept_soft_tokens=True,
    )  # fmt: skip
    service = Service(gmsa, settings)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    with running(service) as url:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(tmp_path / "schemathesis.toml")),
            *("run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {KEY}", "--checks", "all"),
            *("--max-examples", "8", "--seed", "1", "--workers", "1", "--suppress-health-check", "all", "--no-color"),
            *("--generation-database", "none", "--request-timeout", "300", "--max-response-time", "300"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "12 passed" in done.stdout.replace("\n", " ") or "No issues found" in done.stdout
        assert service.open == 0
        assert httpx.get(f"{url}/health").status_code == 200
