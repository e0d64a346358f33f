"""Scripts that take hours: what they call is there and understands them."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gmsa.cli.main import build_parser
from gmsa.evaluate.methods import check_methods

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_every_command_behind_the_results_is_understood(tmp_path: Path) -> None:
    log, fake = tmp_path / "called", tmp_path / "fake"
    fake.write_text(f'#!/bin/sh\necho "$0 $*" >>{log}\n')
    fake.chmod(0o755)
    environment = {**os.environ, "GMSA": str(fake), "PYTHON": str(fake)}
    subprocess.run([SCRIPTS / "results.sh", "DATA", tmp_path / "out", "text-decoder"], env=environment, check=True)
    calls = [shlex.split(line)[1:] for line in log.read_text().splitlines()]
    evaluated = [build_parser().parse_args(call) for call in calls if call[0] == "eval"]
    assert {options.task for options in evaluated} >= {"restoration", "qa", "summ"}
    for options in evaluated:
        if options.task in ("qa", "summ"):
            check_methods(options.methods)
    for call in calls:
        if call[0] != "eval":
            assert (SCRIPTS.parent / call[0]).is_file()


def join(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, SCRIPTS / "join_texts.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_texts_of_one_document_are_joined(tmp_path: Path) -> None:
    rows = [{"text": "aaa", "doc": "1"}, {"text": "zzzzz", "doc": "2"}, {"text": "bb", "doc": "1"}]
    rows += [{"text": "left", "doc": "1"}, {"input": "no", "prompt": "text", "answer": "at all"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [json.loads(line) for line in join(path, 5).stdout.splitlines()]
    assert found == [{"text": "aaa\n\nbb", "doc": "1"}, {"text": "zzzzz", "doc": "2"}]


@pytest.mark.parametrize("arguments", [(), ("none.jsonl", 5), ("none.jsonl", "many")])
def test_what_cannot_be_joined_is_one_line(arguments: tuple[object, ...]) -> None:
    done = join(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
