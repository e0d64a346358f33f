"""Every fenced block of README.md, CONTRIBUTING.md and docs/ is executed, on a tiny model in place of the default one.

The blocks of a page run in order, in a folder that has the repository's examples and recipes and FILES below; a title
on a fence (```json title="rows.jsonl"```) writes the block there.

    python     runs; one namespace per page
    sh         `gmsa` runs in this process (`gmsa serve` until the page ends; `gmsa pull` and
               `gmsa serve --decoder` are only parsed). Of make, pip,
               scripts, torchrun and accelerate it is checked that target, extra, file and options exist
    yaml       is a recipe
    json       is rows of training data, one a line
    text       is shown: what something printed, or a form of words

A comment just above a block changes that: `<!-- parsed: reason -->` checks arguments, recipes and paths of its
commands, or syntax and imports of its Python, and runs nothing; `<!-- not run: reason -->` leaves it alone. Any other
language, program or marker fails. That, and parsing without running, is what no package for it does (pytest-examples,
mktestdocs, pytest-markdown-docs and sybil pass over languages they do not know), so markdown-it finds blocks and the
rest is here.
"""

import ast
import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from server import running

from gmsa import GMSA, GmsaConfig, GmsaModel
from gmsa import api as engine
from gmsa.cli import main as cli
from gmsa.cli.serve import settings_of
from gmsa.io import backbones
from gmsa.io.backbones import Backbone
from gmsa.io.files import home
from gmsa.io.rows import parse_row
from gmsa.serve.service import Service
from gmsa.store import MemoryStore
from gmsa.train.recipe import Recipe

pytestmark = pytest.mark.slow

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # before it is imported: tests talk to nobody
ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "sh", "yaml", "json", "text")
MARKER = re.compile(r"<!-- (parsed|not run): (\S.*?) -->\s*$", re.DOTALL)
SERVER = "http://127.0.0.1:8000"
MEMORY_ID = re.compile(r"[0-9a-f]{12,64}|(?=.*[a-f])(?=.*\d)[0-9a-f]{6,11}")  # of a memory of the default model
FOLDERS = ("recipes/", "scripts/", "benchmarks/", "experiments/", "examples/", "deploy/", "docs/", "tests/")
TEXT = "The mill was built in 1731 by two brothers. The bridge beside it was opened in 1894, and it stands."
ROW = json.dumps({"input": TEXT, "prompt": "When was the mill built?", "answer": "1731"})
FILES = {
    **dict.fromkeys(("report.txt", "minutes.txt", "book.txt", "doc.txt"), TEXT),
    **dict.fromkeys(
        ("texts.jsonl", "my.jsonl", "corpus.jsonl", "corpus/one.jsonl"), json.dumps({"id": "a", "text": TEXT}) + "\n"
    ),
    **dict.fromkeys(("questions.jsonl", "qa.jsonl"), f"{ROW}\n{ROW}\n"),
}


@dataclass
class Block:
    """One fenced block, and what the comment above it says."""

    page: Path
    line: int
    language: str
    title: str | None
    source: str
    marker: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    found: list[Block] = []
    marker: str | None = None
    for token in MarkdownIt("commonmark").parse(page.read_text() if text is None else text):
        if token.type == "fence":
            language, _, rest = token.info.strip().partition(" ")
            title = re.fullmatch(r'title="([^"]+)"', rest)
            assert not rest or title, f"{page.name}: {token.info!r} says more than a language and a title"
            assert token.map
            found.append(Block(page, token.map[0] + 1, language, title and title[1], token.content, marker))
        else:
            assert marker is None, f"{page.name}: a marker ({marker}) without a block below it"
        match = MARKER.search(token.content) if token.type == "html_block" else None
        marker = match[1] if match else None
        loose = "<!-- parsed" in token.content or "<!-- not run" in token.content
        assert match or token.type in ("fence", "inline") or not loose, f"{page.name}: {token.content!r}"
    return found


class World:
    """What a page finds: a folder with files, a namespace for its Python, a server once it has started one."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.address = SERVER

    def execute(self, block: Block) -> str:
        """run, parsed, marked or shown; raises where the block is wrong."""
        assert block.language in LANGUAGES, f"unknown language {block.language!r}"
        if block.title is not None:
            Path(block.title).write_text(block.source)
        if block.marker == "not run":
            return "marked"
        if block.language == "text":
            return "shown"
        return getattr(self, block.language)(block.source, block.marker is None)

    def python(self, source: str, run: bool) -> str:
        tree = ast.parse(source)
        if run:
            exec(compile(source.replace(SERVER, self.address), "<block>", "exec"), self.names)
            return "run"
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})
        return "parsed"

    def yaml(self, source: str, run: bool) -> str:
        Path("recipe-of-a-block.yaml").write_text(source)
        Recipe.load("recipe-of-a-block.yaml")
        return "run"

    def json(self, source: str, run: bool) -> str:
        for line in source.splitlines():
            assert parse_row(line.encode()), "an empty line"
        return "run"

    def sh(self, source: str, run: bool) -> str:
        did = {self.command(words, run) for line in lines_of(source) for words in commands(line)}
        return "run" if "run" in did else "parsed"

    def command(self, words: list[str], run: bool) -> str:
        """Run one command, or check what can be checked of it."""
        for word in words:
            assert not word.startswith(FOLDERS) or (ROOT / word).exists(), f"{word} is not there"
        program, *rest = words
        if program == "gmsa":
            return self.gmsa(rest, run)
        if "-m" in rest and rest[rest.index("-m") + 1] == "gmsa":
            return self.gmsa(rest[rest.index("-m") + 2 :], False)
        if program == "make":
            targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in rest if "=" not in word} <= set(targets), f"no such target: {rest}"
        elif program == "pip" and rest[0] == "install":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for word in rest:
                for extra in re.findall(r"[\w,-]+", "".join(re.findall(r"^(?:gmsa|\.)\[(.*)\]$", word))):
                    assert set(extra.split(",")) <= set(extras), f"no such extra: {word}"
        elif program in ("python", "python3") and rest[0].endswith(".py"):
            script = (ROOT / rest[0]).read_text()
            if "import measuring" in script:  # options that all benchmarks have
                script += (ROOT / "benchmarks/measuring.py").read_text()
            for word in rest[1:]:
                assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in script, f"{rest[0]} has no {word}"
        elif words[:3] != ["python3", "-m", "venv"] and program != "." and not program.startswith("scripts/"):
            raise AssertionError(f"{program}: nothing is known of this program; mark the block")
        return "parsed"

    def gmsa(self, arguments: list[str], run: bool) -> str:
        parser = cli.build_parser()
        arguments = ["RECIPE.yaml" if word == "..." else word for word in arguments]
        options, more = parser.parse_known_args(arguments)
        assert not [word for word in more if word.startswith("-")], f"unknown arguments: {more}"
        if arguments[0] == "train" and options.recipe != "RECIPE.yaml":
            Recipe.load(options.recipe, [*options.changes, *more])
        if not run or arguments[0] == "pull":
            return "parsed"
        if arguments[0] == "serve" and getattr(options, "decoder", None):  # of other machines
            return "parsed"
        if arguments[0] == "serve":
            assert self.address == SERVER, "one server a page"
            service = Service(GMSA.from_pretrained(options.model), settings_of(options))
            self.address = self.stack.enter_context(running(service))
            return "run"
        if any(map(MEMORY_ID.fullmatch, arguments)):  # here the newest is meant
            with MemoryStore(home() / "store.sqlite") as store:
                newest = store.list()[0].id
            arguments = [newest if MEMORY_ID.fullmatch(word) else word for word in arguments]
        if "--workers" in arguments:  # one works in this process
            arguments[arguments.index("--workers") + 1] = "1"
        assert cli.main(arguments) == 0, "it failed"
        return "run"


def lines_of(source: str) -> list[str]:
    """The lines of a script, each with those that continue it."""
    return source.replace("\\\n", " ").splitlines()


def commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a line, without the variables set before them."""
    words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    words.whitespace_split = True
    command: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set("&|;"):
            if command:
                yield command
            command = []
        elif command or not re.match(r"[A-Z_]+=", word):
            command.append(word)


@pytest.fixture(scope="module")
def tiny_default(
    tiny_backbone: Callable[..., Backbone],
    save_backbone: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """Folders of a tiny backbone, as deep as recipes want it, and of a model on a shallower one."""
    backbone = tiny_backbone("llama", num_hidden_layers=2, max_position_embeddings=16384)
    config = GmsaConfig(decoder=backbone.pointer, encoder_layers=1, window_size=64, system_prompt="")
    folder = tmp_path_factory.mktemp("docs") / "default"
    GMSA(GmsaModel(config, backbone.model), backbone).save_pretrained(folder)
    return save_backbone("llama", num_hidden_layers=8, max_position_embeddings=16384), folder


@pytest.fixture
def world(tmp_path: Path, tiny_default: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    backbone, model = tiny_default
    monkeypatch.setattr(backbones, "default_backbone_folder", lambda: backbone)
    monkeypatch.setattr(engine, "BUNDLED", model)
    monkeypatch.delenv("GMSA_API_KEY", raising=False)
    for folder in ("examples", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    document = tmp_path / "examples/thames.txt"
    document.write_text(document.read_text()[:200])  # the tiny tokenizer has a token for every byte
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        yield World(stack)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_blocks_of_a_page(page: Path, world: World) -> None:
    for block in blocks_of(page):
        try:
            world.execute(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block}: {type(error).__name__}: {error}\n{block.source}") from error


def test_every_block_is_run_parsed_or_marked(capsys: pytest.CaptureFixture[str]) -> None:
    """What becomes of each block follows from its language, marker and programs; the tests above do it."""
    kinds = Counter(kind_of(block) for page in PAGES for block in blocks_of(page))
    with capsys.disabled():
        print("\nblocks:", ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())))
    assert kinds["run"]
    assert kinds["parsed"]
    assert set(kinds) <= {"run", "parsed", "not run", "shown"}


def kind_of(block: Block) -> str:
    assert block.language in LANGUAGES, f"{block}: unknown language {block.language!r}"
    if block.marker or block.language != "sh":
        return block.marker or ("shown" if block.language == "text" else "run")
    found = [words for line in lines_of(block.source) for words in commands(line)]
    return "run" if any(words[0] == "gmsa" and words[1] != "pull" for words in found) else "parsed"


MARKED = "<!-- parsed: why not -->\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```sh\ngmsa compress doc.txt -o m.safetensors --merge-sizes 3\n```", "unknown arguments"),
        ("```sh\ngmsa compress doc.txt\n```", "2"),  # argparse's exit code
        ("```sh\ngmsa compress missing.txt -o m.safetensors\n```", "it failed"),
        (f"{MARKED}```sh\ngmsa train recipes/restore.yaml stepz=3\n```", "stepz"),
        (f"{MARKED}```sh\ngmsa train recipes/nothing.yaml\n```", "is not there"),
        (f"{MARKED}```sh\ntorchrun -m gmsa train recipes/restore.yaml --resumed\n```", "unknown arguments"),
        ("```sh\nmake nothing\n```", "no such target"),
        ("```sh\npip install '.[nothing]'\n```", "no such extra"),
        ("```sh\npython benchmarks/decoding.py --nothing 3\n```", "has no --nothing"),
        ("```sh\npython benchmarks/nothing.py\n```", "is not there"),
        ("```sh\nrm -r /nowhere\n```", "nothing is known of this program"),
        ("```python\nfrom gmsa import Nothing\n```", "cannot import name 'Nothing'"),
        (f"{MARKED}```python\nfrom gmsa import Nothing\n```", "cannot import name 'Nothing'"),
        (f"{MARKED}```python\n1 +\n```", "invalid syntax"),
        ("```yaml\noutput: runs/x\ndata: [{path: texts.jsonl}]\nstepz: 3\n```", "stepz"),
        ('```json\n{"input": "a", "answer": "b"}\n```', "prompt"),
        ("```ruby\nputs 1\n```", "unknown language 'ruby'"),
        ("```\nno language\n```", "unknown language ''"),
        ("<!-- not run -->\n```sh\nls\n```", "<!-- not run -->"),
        ("<!-- not run: not just above -->\n\nWords.\n\n```sh\nls\n```", "without a block below it"),
    ],
)
def test_what_is_wrong_fails(text: str, complaint: str, world: World) -> None:
    def execute() -> None:
        for block in blocks_of(ROOT / "README.md", text):
            world.execute(block)

    with pytest.raises((Exception, SystemExit), match=re.escape(complaint)):
        execute()


# -- the site's builder ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builder() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts/maintain/build_docs.py"))


def test_pages_are_staged_with_what_they_link_to(builder: dict[str, Any], tmp_path: Path) -> None:
    builder["stage"](tmp_path)
    assert "../files/CONTRIBUTING.md" in (tmp_path / "howto/own-backbone.md").read_text()
    assert "docs/training-log.md" in (tmp_path / "files/CONTRIBUTING.md").read_text()  # in `code`: no link
    commands = (tmp_path / "reference/command-line.md").read_text()
    assert all(f"## gmsa {name}\n" in commands for name in ("compress", "store add", "eval qa", "data check"))
    assert "`--merge-size N`" in commands
    recipe = (tmp_path / "reference/recipe.md").read_text()
    assert "| `trainer.max_steps` | `int` | `1000` | optimiser steps; 0 saves the model as it is |" in recipe
    assert "## POST /v1/chat/completions" in (tmp_path / "reference/server.md").read_text()
    assert not [page for page in tmp_path.rglob("*.md") if "<!-- generated" in page.read_text()]


def test_a_link_to_nothing_is_a_fault(builder: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "a.md"
    page.parent.mkdir()
    page.write_text("[no](b.md) [no](..) [`yes`](a.md#b) `[no](c.md)`\n```sh\n[no](d.md)\n```\n![no](e.png)\n")
    for name, value in {"ROOT": tmp_path, "DOCS": page.parent}.items():
        monkeypatch.setitem(builder["rewritten"].__globals__, name, value)
    faults: list[str] = []
    builder["rewritten"](page, faults)
    assert [fault.split()[1] for fault in faults] == ["b.md", "..", "e.png"]


def test_a_built_site_is_checked(builder: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text('<h1 id="here">A</h1><a href="https://elsewhere.org">a link may leave</a>')
    whole = '<a href="there.html#here">a</a> <a href="#top" id="top">b</a> <a href="mailto:a@b">c</a>'
    (tmp_path / "index.html").write_text(whole)
    assert builder["faults_of"](tmp_path) == []
    broken = (
        '<a href="gone.html">a</a><a href="there.html#gone">b</a><img src="gone.png"><a href="#gone">c</a>'
        '<script src="https://cdn.org/a.js"></script><link rel="stylesheet" href="//fonts.org/a.css">'
    )
    (tmp_path / "index.html").write_text(broken)
    (tmp_path / "a.css").write_text("@font-face {src: url(https://fonts.org/a.woff)}")
    assert len(builder["faults_of"](tmp_path)) == 7
