"""Build the documentation site into site/: offline, and failing on a broken link, anchor, image or docstring.

    python scripts/maintain/build_docs.py

Zensical reads mkdocs.yml. It gets a copy of docs/ (build/docs) in which
- a link to a file of the repository that is not in docs/ leads to a page that shows the file,
- `<!-- generated: NAME -->` is what the code says of itself (GENERATED below), so that it cannot go stale.
Every page that comes out is then read: each link and anchor has to be there, and nothing may be loaded from elsewhere.
"""

import argparse
import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
STAGED = ROOT / "build" / "docs"  # docs_dir and site_dir of mkdocs.yml
SITE = ROOT / "site"
FILES = "files"  # where pages of repository files lie
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md")  # pages of their own, linked or not
LANGUAGES = {".yaml": "yaml", ".yml": "yaml", ".py": "python", ".sh": "bash", ".json": "json", ".toml": "toml"}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
CODE = re.compile(r"`[^`]*`")
MARK = re.compile(r"<!-- generated: ([a-z-]+) -->")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//")
# What links may lead to in each tag; of these only <a> may leave the site.
ATTRIBUTES = {"a": "href", "img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src"}
NOT_LOADED = ("canonical", "prev", "next", "edit")
# Search on file:// needs this script; the theme would load it from a CDN (npm: iframe-worker 1.0.4, MIT).
SHIM = ('"https://unpkg.com/iframe-worker/shim"', "javascripts/iframe-worker.js")


class DocsError(Exception):
    """The documentation cannot be built as it stands; one line per fault."""


# -- staging -----------------------------------------------------------------------------------------------------------


def stage(folder: Path = STAGED) -> None:
    """Write the pages that the site is built from.

    Raises:
        DocsError: a link leads to a file that is not there, or to a folder outside docs/.
    """
    shutil.rmtree(folder, ignore_errors=True)
    faults: list[str] = []
    todo = [*sorted(DOCS.rglob("*")), *(ROOT / name for name in PROJECT)]
    done: set[Path] = set()
    while todo:
        source = todo.pop()
        if source in done or source.is_dir():
            continue
        done.add(source)
        target = folder / staged_place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text, more = rewritten(source, faults)
            todo += more
            target.write_text(MARK.sub(lambda mark: GENERATED[mark[1]](), text))
        elif source.is_relative_to(DOCS):
            shutil.copyfile(source, target)
        else:
            language = LANGUAGES.get(source.suffix, "text")
            name = source.relative_to(ROOT)
            target.write_text(f"# {name}\n\n~~~~~~{language}\n{source.read_text()}\n~~~~~~\n")
    if faults:
        raise DocsError("\n".join(faults))


def staged_place(source: Path) -> Path:
    """Where a file of the repository lies among the staged ones."""
    if source.is_relative_to(DOCS):
        return source.relative_to(DOCS)
    place = FILES / source.relative_to(ROOT)
    return place if source.suffix == ".md" else place.with_name(f"{place.name}.md")


def rewritten(source: Path, faults: list[str]) -> tuple[str, list[Path]]:
    """A page with its links as they are after staging, and the files outside docs/ that it links to."""
    linked: list[Path] = []
    here = staged_place(source).parent

    def relink(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        if not path or ELSEWHERE.match(path):
            return match[0]
        target = (source.parent / unquote(path)).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            faults.append(f"{source.relative_to(ROOT)}: {match[2]} is not a file of the repository")
            return match[0]
        if not target.is_relative_to(DOCS):
            linked.append(target)
        place = os.path.relpath(staged_place(target), here)
        return f"{match[1]}{place}{'#' if anchor else ''}{anchor}{match[3]}"

    lines, fence = [], ""
    for line in source.read_text().splitlines():
        opening = re.match(r" *(`{3,}|~{3,})", line)
        if opening and (not fence or opening[1].startswith(fence)):
            fence = "" if fence else opening[1]
        # What stands in `code` is no link: put it aside meanwhile.
        kept = CODE.findall(line)
        lines.append(line if fence else LINK.sub(relink, line) if not kept else relink_around(line, relink))
    return "\n".join(lines) + "\n", linked


def relink_around(line: str, relink: Callable[[re.Match[str]], str]) -> str:
    """Links of a line, with `code` in their text left as it is."""
    kept = CODE.findall(line)
    hidden = LINK.sub(relink, CODE.sub("\0", line))
    for code in kept:
        hidden = hidden.replace("\0", code, 1)
    return hidden


# -- what the code says of itself --------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; cells are Markdown in one line, and a bar may stand only in `code`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def command_line() -> str:
    """Every command with its arguments, from the parser itself."""
    from gmsa.cli.main import build_parser

    return "\n".join(_commands(build_parser()))


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)  # type: ignore[assignment,misc]
    subcommands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not subcommands:
        usage = parser.format_usage().removeprefix("usage: ").strip()
        yield f"## {parser.prog}\n\n{plain(parser.description or '')}\n\n```text\n{usage}\n```\n"
        rows = [[_names(action), plain(action.help or "")] for action in parser._actions if action.dest != "help"]
        if rows:
            yield table(["argument", ""], rows)
    for action in subcommands:
        for subparser in action.choices.values():
            yield from _commands(subparser)


def _names(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else None
    if action.choices:
        value = value or "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return f"`{value or action.dest}`"
    takes = "" if action.nargs == 0 else f" {value or action.dest.upper()}"
    return ", ".join(f"`{name}{takes}`" for name in action.option_strings)


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([*_\[\]`\\|])", r"\\\1", escape(text, quote=False))


def recipe_fields() -> str:
    """The fields of a recipe: names, kinds and defaults, and the comment that stands beside each."""
    from gmsa.train import recipe

    source = inspect.getsource(recipe)
    lines = source.splitlines()
    made = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Recipe")
    rows = []
    for node in made.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()  # type: ignore[operator]
        default = ast.unparse(node.value) if node.value else "required"
        default = re.sub(r"^field\(default_factory=(?:lambda: )?(.*)\)$", r"\1", default)
        default = {"dict": "{}", "list": "[]"}.get(default, default)
        rows.append(
            [f"`{ast.unparse(node.target)}`", f"`{ast.unparse(node.annotation)}`", f"`{default}`", plain(comment)]
        )
    rows += trainer_settings()
    nested = {"data": recipe.DATA_KEYS, "evaluate": recipe.EVALUATE_KEYS}
    keys = "\n".join(
        f"- an entry of `{name}`: {', '.join(f'`{key}`' for key in found)}" for name, found in nested.items()
    )
    return f"{table(['field', 'kind', 'default', ''], rows)}\nKeys of the nested parts:\n\n{keys}\n"


def trainer_settings() -> list[list[str]]:
    """A row for each setting of the Trainer that has a default in recipes: name, kind, default, comment."""
    from gmsa.train import arguments

    source = inspect.getsource(arguments)
    lines = source.splitlines()
    nodes = (node for node in ast.parse(source).body if isinstance(node, ast.AnnAssign))
    defaults = next(node.value for node in nodes if ast.unparse(node.target) == "DEFAULTS")
    assert isinstance(defaults, ast.Dict)
    rows = []
    for key, value in zip(defaults.keys, defaults.values, strict=True):
        name = ast.literal_eval(key)  # type: ignore[arg-type]
        kind = type(arguments.DEFAULTS[name]).__name__
        comment = lines[value.end_lineno - 1].partition("#")[2].strip()  # type: ignore[operator]
        rows.append([f"`trainer.{name}`", f"`{kind}`", f"`{ast.unparse(value)}`", plain(comment)])
    return rows


def server_routes() -> str:
    """Every route with what it takes and gives, from the description that the server serves as /openapi.json."""
    from gmsa.serve.app import create_app
    from gmsa.serve.metrics import Metrics
    from gmsa.serve.scheduler import Scheduler
    from gmsa.serve.settings import Settings
    from gmsa.serve.tenants import Keys

    own = object.__new__(Scheduler)  # that of a decoder in the server itself
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(store=Path(folder))
        service: Any = SimpleNamespace(settings=settings, keys=Keys(), metrics=Metrics(), scheduler=own)
        described = create_app(service).openapi()  # describing loads no model
    schemas = described["components"]["schemas"]
    parts, shown = [], set()
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            parts.append(f"## {method.upper()} {path}\n\n{plain(route.get('description') or route['summary'])}\n")
            asked = [
                [f"`{p['name']}`", _kind(p["schema"]), plain(p.get("description") or p["in"])]
                for p in route.get("parameters", [])
            ]
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body:
                name = body.get("$ref", "").rpartition("/")[2]
                if name in shown:
                    parts.append(f"Body: as above ({name}).\n")
                else:
                    shown.add(name)
                    asked += _fields(schemas[name])
            if asked:
                parts.append(table(["takes", "", ""], asked))
            answered = [
                [f"`{status}`", plain(answer.get("description", ""))] for status, answer in route["responses"].items()
            ]
            parts.append(table(["answers", ""], answered))
    parts.append("## What stands in bodies and answers\n")
    for name, schema in schemas.items():
        if schema.get("properties") and name not in shown:
            parts.append(
                f"### {name}\n\n{plain(schema.get('description', ''))}\n\n{table(['field', '', ''], _fields(schema))}"
            )
    return "\n".join(parts)


def _fields(schema: dict[str, Any]) -> list[list[str]]:
    required = schema.get("required", [])
    properties = sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required)
    return [
        [f"`{name}`", _kind(field) + (", required" if name in required else ""), plain(field.get("description", ""))]
        for name, field in properties
    ]


def _kind(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_kind(one) for one in schema[several] if one.get("type") != "null"))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "anything"))


GENERATED: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "recipe-fields": recipe_fields,
    "server-routes": server_routes,
}


# -- checking ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page links to, loads, and can be linked to by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = {"", "__skip"}
        self.links: list[tuple[str, str]] = []  # tag and address
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a link, a resource or an anchor."""
        found = dict(attrs)
        self.anchors.update(str(found[name]) for name in ("id", "name") if found.get(name))
        address = found.get(ATTRIBUTES.get(tag, ""))
        if address is not None and found.get("rel") not in NOT_LOADED:
            self.links.append((tag, address))


def faults_of(site: Path) -> list[str]:
    """What is broken in a site: links and anchors that lead nowhere, and what would be loaded from elsewhere."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    faults = []
    for path, page in pages.items():
        for tag, address in page.links:
            parts = urlsplit(address)
            if parts.scheme in ("data", "mailto") or (parts.netloc and tag == "a"):
                continue
            here = f"{path.relative_to(site)}: <{tag}> {address}"
            if parts.scheme or parts.netloc:
                faults.append(f"{here} is loaded from elsewhere")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                faults.append(f"{here} is not there")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                faults.append(f"{here}: no such anchor")
    for style in site.rglob("*.css"):
        faults += [
            f"{style.relative_to(site)}: {found}"
            for found in re.findall(r"url\([\"']?(?:https?:)?//[^)]+", style.read_text())
        ]
    return faults


def build() -> None:
    """Stage, build and check.

    Raises:
        DocsError: what is broken.
    """
    stage()
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(ROOT / "mkdocs.yml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    # --strict does not count what mkdocstrings finds wrong with docstrings.
    complaints = [line for line in said.splitlines() if re.match(r"(griffe|mkdocstrings|ERROR|WARNING)", line)]
    if done.returncode or complaints:
        raise DocsError("\n".join(complaints) if not done.returncode else said)
    for page in SITE.rglob("*.html"):
        local = os.path.relpath(SITE / SHIM[1], page.parent)
        page.write_text(page.read_text().replace(SHIM[0], f'"{local}"'))
    if faults := faults_of(SITE):
        raise DocsError("\n".join(faults))


if __name__ == "__main__":
    try:
        build()
    except DocsError as error:
        sys.exit(f"the documentation is broken:\n{error}")
    print(f"wrote {SITE.relative_to(ROOT)}/index.html, links whole")
