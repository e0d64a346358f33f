"""What experiments share with the benchmarks: `from shared import measuring`."""

import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
measuring = importlib.import_module("measuring")
