"""What starting costs: processor seconds, user and system, of whole processes; medians over rounds, all by turns.

    python benchmarks/start.py --output docs/results/start.json

One round goes before and is not counted, so files are in the system's cache and modules compiled. Each step up to
`gmsa ask` is a process that does what the one before does and one thing more, so differences say what a thing costs.
A server is counted until it says where it listens. Linux and macOS; the server Linux alone.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measuring

from gmsa.evaluate.latency import QUESTION, text_of

TEXT_TOKENS = 211
NEW_TOKENS = 16
# (key, what the step adds to the one before)
STEPS = (
    ("python", "Python alone"),
    ("torch", "import PyTorch"),
    ("gmsa", "import the rest: transformers, GMSA"),
    ("load", "load the model"),
    ("ask", f"compress {TEXT_TOKENS} tokens, answer: gmsa ask"),
)


def finished(command: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command to its end: its processor seconds.

    Raises:
        SystemExit: it failed; with what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed: {said.read()}")
    return {"seconds": round(usage.ru_utime + usage.ru_stime, 2)}


def listening(command: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a server until it listens: its processor seconds so far and the megabytes it has resident.

    Raises:
        SystemExit: it ended before; with what it said.
    """
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if "serving on http" in line:
                break
        else:
            raise SystemExit(f"{' '.join(command)} ended: {said}")
        folder = Path("/proc") / str(process.pid)
        # The 14th and 15th field, the first after the name in parentheses being the third.
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        resident = re.search(r"VmRSS:\s+(\d+) kB", (folder / "status").read_text())
        assert resident is not None
        process.send_signal(signal.SIGTERM)
    return {"seconds": round(seconds, 2), "megabytes": round(int(resident[1]) * 1024 / 1e6)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = measuring.parser_of(__doc__ or "")
    options = parser.parse_args(arguments)
    rounds = 1 if options.quick else options.rounds
    gmsa = measuring.load(options)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else GMSA's own modules are compiled at every start
    dtype = str(gmsa.model.dtype).removeprefix("torch.")
    model = ("--model", options.model, "--dtype", dtype)
    code = {
        "python": "pass",
        "torch": "import torch",
        "gmsa": "import torch; from gmsa import GMSA",
        "load": f"import torch; from gmsa import GMSA; GMSA.from_pretrained({options.model!r}, dtype={dtype!r})",
    }
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder) / "context.txt"
        context.write_text(text_of(gmsa, TEXT_TOKENS))
        command = [sys.executable, "-m", "gmsa"]
        ask = [*command, "ask", QUESTION, "--context", str(context), "--max-new-tokens", str(NEW_TOKENS), *model]
        serve = [*command, "serve", options.model, "--dtype", dtype, "--port", "0", "--store", f"{folder}/store"]
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "help": partial(finished, [*command, "--help"], environment),
            **{key: partial(finished, [sys.executable, "-c", text], environment) for key, text in code.items()},
            "ask": partial(finished, ask, environment),
        }
        if sys.platform == "linux":
            ways["serve"] = partial(listening, serve, environment)
        found = measuring.by_turns(ways, rounds)
    steps, before = [], 0.0
    for key, adds in STEPS:
        seconds = found[key]["seconds"]
        steps.append({"step": key, "adds": adds, "seconds": seconds, "more_seconds": round(seconds - before, 2)})
        before = seconds
    ends = {key: found[key] for key in ("help", "serve") if key in found}
    results: dict[str, Any] = {
        "meta": {
            **measuring.meta(options, gmsa, "benchmarks/start.py"),
            "clock": "processor",
            "rounds": rounds,
            "text_tokens": len(gmsa.tokenizer(text_of(gmsa, TEXT_TOKENS), add_special_tokens=False)["input_ids"]),
            "new_tokens": NEW_TOKENS,
        },
        "steps": steps,
        **ends,
    }
    lines = [[row["step"], row["adds"], row["seconds"], row["more_seconds"]] for row in steps]
    others = [[key, "", figures["seconds"], ""] for key, figures in ends.items()]
    print(measuring.table([["process", "adds", "seconds", "more"], *lines, *others]))
    measuring.write(options.output, results)


if __name__ == "__main__":
    main()
