"""Where GMSA keeps things."""

import os
from pathlib import Path


def home() -> Path:
    """The folder for what GMSA keeps: GMSA_HOME, else the user's cache folder."""
    given = os.environ.get("GMSA_HOME")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gmsa"
