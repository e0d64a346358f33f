"""The page as a person uses it: in a real browser, over a real server with a tiny model."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from server import running

from gmsa import GMSA
from gmsa.decode.loop import Loop
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.serve.service import Service
from gmsa.serve.settings import Settings

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
MISSING = not Path(CHROMIUM).exists() and os.environ.get("GMSA_TEST_BROWSER") != "required"  # .ci/run
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING, reason="there is no Chromium (apt-get install chromium)"),
]
FLAGS = [
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"),
    *("--disable-gpu", "--disable-quic"),
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
]
TEXT = "The heron stood by the river."  # 29 tokens, windows of 16 and 13
KEY = "a key"


@pytest.fixture(scope="module")
def make_gmsa(tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]) -> Callable[[], GMSA]:
    return lambda: GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama"))


@pytest.fixture(scope="module")
def service(make_gmsa: Callable[[], GMSA], tmp_path_factory: pytest.TempPathFactory) -> Service:
    return Service(make_gmsa(), Settings(store=tmp_path_factory.mktemp("store") / "s"))


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as play:
        sync_api.expect.set_options(timeout=120_000)  # a busy machine takes its time
        made = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def page(browser: "sync_api.Browser", url: str, service: Service) -> Iterator["sync_api.Page"]:
    """The page, freshly opened over an empty store; it must not complain nor ask anybody else."""
    for entry in service.store.list():
        service.store.delete(entry.id)
    made = browser.new_page()
    complaints: list[str] = []
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    made.on("request", lambda request: None if request.url.startswith(url) else complaints.append(request.url))
    made.goto(url)
    yield made
    made.close()
    assert not complaints


def text_of(page: "sync_api.Page", selector: str) -> str:
    return page.locator(selector).inner_text()


def compress(page: "sync_api.Page", text: str = TEXT, size: str = "2×") -> None:
    page.get_by_label("Text of the document").fill(text)
    page.get_by_role("radio", name=size).check()
    page.get_by_role("button", name="Compress").click()
    page.get_by_role("heading", name="Memory", exact=True).wait_for()


def test_from_a_text_to_answers(page: "sync_api.Page", make_gmsa: Callable[[], GMSA], service: Service) -> None:
    expect = sync_api.expect
    page.get_by_role("button", name="Compress").click()
    expect(page.locator("#document-status")).to_contain_text("There is no text yet")
    compress(page)
    assert (text_of(page, "#tokens-before"), text_of(page, "#tokens-after")) == ("29", "15")
    entry = service.store.list()[0]
    assert text_of(page, "#bytes").startswith(f"{entry.bytes / 1000:.1f}")
    assert re.fullmatch(r"\d+\.\d\d s", text_of(page, "#seconds"))
    page.get_by_role("button", name="Restore", exact=True).click()
    page.get_by_text(re.compile(r"\d+ % of words restored in")).wait_for()
    gmsa = make_gmsa()
    memory = service.store.load(entry.id)
    restored = gmsa.restore(memory)
    shown = page.evaluate("[...document.querySelectorAll('#restored ins')].map((e) => e.textContent).join('')")
    assert "".join(shown.split()) == "".join(restored.split())
    left_out = page.evaluate(
        "[...document.querySelectorAll('#restored del, .right')].map((e) => e.textContent).join('')"
    )
    assert "".join(left_out.split()).replace("right", "", 1) == "".join(TEXT.split())  # the legend has one word
    page.get_by_label("Question").fill("Who?")
    page.keyboard.press("Enter")
    page.locator("#original-times:not(:empty)").wait_for()
    assert text_of(page, "#gmsa-said").split() == gmsa.answer("Who?", memory, max_new_tokens=128).split()
    assert text_of(page, "#original-said")
    assert text_of(page, "#original-said") != text_of(page, "#gmsa-said")
    for side in ("gmsa", "original"):
        assert re.fullmatch(r"first word \d+\.\d\d s · \d+ tokens? in \d+\.\d+ s", text_of(page, f"#{side}-times"))
    assert re.search(r"read 15 soft tokens and \d+ tokens of prompt, saved 14$", text_of(page, "#gmsa-reads"))
    expect(page.locator("#saved")).to_have_text(re.compile(r"^\d+ prompt tokens saved since the server started$"))
    expect(page.locator("#gmsa-doubt")).to_be_hidden()  # nothing was checked
    expect(page.locator("#chosen-reads")).to_have_text("At 2× the whole text is read: nothing to choose.")
    assert not text_of(page, "#chosen-said")


def test_an_answer_from_what_fits_the_question(page: "sync_api.Page", make_gmsa: Callable[[], GMSA]) -> None:
    text = f"{TEXT} The mill was built in 1731. " + "Larks sing over fields of rye. " * 6
    question = "When was the mill built?"
    compress(page, text, size="4×")
    gmsa = make_gmsa()
    memory = gmsa.compress_for(question, text, 4)
    sync_api.expect(page.locator("#chosen-reads")).to_contain_text("reads sentences that fit, in at most")
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")
    page.locator("#original-times:not(:empty)").wait_for()
    assert text_of(page, "#chosen-said").split() == gmsa.answer(question, memory, max_new_tokens=128).split()
    saved = gmsa.count(text) - len(memory)
    assert re.search(rf"read {len(memory)} soft tokens and \d+ .*, saved {saved}$", text_of(page, "#chosen-reads"))


def test_a_check_says_what_is_proven(page: "sync_api.Page", make_gmsa: Callable[[], GMSA], service: Service) -> None:
    compress(page)
    page.get_by_role("button", name="Check").click()
    status = page.locator("#restore-status")
    sync_api.expect(status).to_have_text(
        re.compile(r"^\d+ % of words restored in \d+\.\d+ s · \d+ of 15 soft tokens confirmed$")
    )
    page.reload()  # the text is not here any more
    page.get_by_role("button", name=re.compile("^Use")).click()
    page.get_by_role("button", name="Check").click()
    sync_api.expect(status).to_contain_text("soft tokens confirmed; what is in doubt is marked")
    pieces = list(make_gmsa().stream_checked(service.store.load(service.store.list()[0].id)))
    assert f"{sum(piece.confirmed for piece in pieces)} of 15 soft tokens" in text_of(page, "#restore-status")
    assert page.evaluate("document.querySelector('#restored').textContent") == "".join(piece.text for piece in pieces)
    marked = page.evaluate("[...document.querySelectorAll('#restored mark')].map((e) => e.textContent)")
    assert marked == [piece.text for piece in pieces if not piece.confirmed]
    page.get_by_label("Question").fill("Who?")
    page.keyboard.press("Enter")
    page.locator("#gmsa-times:not(:empty)").wait_for()
    doubt = page.locator("#gmsa-doubt")
    if marked:
        sync_api.expect(doubt).to_have_text(re.compile(f"^In doubt: {len(marked)} of 15 soft tokens fail the check"))
    else:
        sync_api.expect(doubt).to_be_hidden()


def test_an_answer_in_doubt_says_so(page: "sync_api.Page") -> None:
    compress(page)
    page.evaluate("""() => {
        const pieces = [["The ", true], ["hero", false], ["n s", false], ["tood", true], [" by", false]];
        const found = pieces.map(([text, confirmed]) => ({ text, confirmed }));
        state.checks[state.memory.id] = { sure: 2, of: 5, doubts: doubtsOf(found) };
    }""")
    page.get_by_label("Question").fill("Who?")
    page.keyboard.press("Enter")
    said = (
        "In doubt: 3 of 5 soft tokens fail the check (where it says “heron s”, “by”). What rests on them may be wrong."
    )
    sync_api.expect(page.locator("#gmsa-doubt")).to_have_text(said)
    compress(page, "Another text of the same.")
    sync_api.expect(page.locator("#gmsa-doubt")).to_be_hidden()  # it is of another memory


def test_right_and_wrong_words_are_told_apart(page: "sync_api.Page") -> None:
    parts = page.evaluate("differences(wordsOf('The heron stood still.'), wordsOf('The crane stood, still.'))")
    said = [("right", "The"), ("missing", " heron"), ("wrong", " crane"), ("right", " stood"), ("wrong", ",")]
    assert [tuple(part) for part in parts] == [*said, ("right", " still"), ("right", ".")]
    assert page.evaluate("showDifferences('a b c d', 'a b c d')") == "100 % of words"
    assert page.evaluate("showDifferences('a b c', 'b')") == "33 % of words"
    assert page.evaluate("showDifferences('x '.repeat(3000), 'x')") == "0 % of words of the first 2,000"


def test_memories_stay_and_can_be_used_and_deleted(page: "sync_api.Page") -> None:
    expect = sync_api.expect
    label = "<img src=x onerror=alert(1)> & more"
    compress(page, f"{label} of the same")
    page.reload()
    expect(page.locator("#stored .name")).to_contain_text(label)  # as text, not as markup
    expect(page.locator("#memory-card")).to_be_hidden()
    page.get_by_role("button", name=re.compile("^Use")).click()
    expect(page.locator("#original-reads")).to_contain_text("The server keeps no text")
    page.keyboard.type("Who?")  # the question has the focus
    page.keyboard.press("Enter")
    page.locator("#gmsa-times:not(:empty)").wait_for()
    page.get_by_role("button", name=re.compile("^Delete")).click()
    expect(page.locator("#stored li")).to_have_count(1)  # asked once more
    page.get_by_role("button", name=re.compile("^Really delete")).click()
    expect(page.locator("#stored li")).to_have_count(0)
    expect(page.locator("#memory-card")).to_be_hidden()


def test_the_keyboard_is_enough(page: "sync_api.Page") -> None:
    def focus() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.value || document.activeElement.text")

    seen = []
    for _ in range(7):
        page.keyboard.press("Tab")
        seen.append(focus())
    assert seen == ["Skip to the document", "API", "sample", "file", "document", "4", "compress"]
    page.locator("#document").focus()
    page.keyboard.type(TEXT)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")  # from 4 to 2
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#tokens-after")).to_have_text("15")


def test_files_are_opened(page: "sync_api.Page", tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(TEXT)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    page.locator("#file").set_input_files(tmp_path / "picture.png")
    page.get_by_text("picture.png is not UTF-8 text").wait_for()
    page.locator("#file").set_input_files(tmp_path / "notes.txt")
    sync_api.expect(page.get_by_label("Text of the document")).to_have_value(TEXT)
    page.get_by_role("radio", name="other").check()
    page.get_by_label("Another merge size").fill("5")
    page.get_by_role("button", name="Compress").click()
    sync_api.expect(page.locator("#stored .name")).to_have_text("notes.txt")
    assert text_of(page, "#tokens-after") == "7"  # four of the first window, three of the second
    # What is hidden is not checked; a label is cut between characters.
    page.get_by_label("Another merge size").fill("2000")
    page.get_by_role("radio", name="4×").check()
    emoji = "\N{SMILING FACE WITH OPEN MOUTH}" * 70
    (tmp_path / f"{'n' * 220}.txt").write_text(emoji)
    page.locator("#file").set_input_files(tmp_path / f"{'n' * 220}.txt")
    page.get_by_role("button", name="Compress").click()
    sync_api.expect(page.locator("#stored .name").first).to_have_text("n" * 60)
    page.get_by_label("Text of the document").fill(emoji + "!")
    page.get_by_role("button", name="Compress").click()
    sync_api.expect(page.locator("#stored .name").first).to_have_text(emoji[:60])
    page.get_by_role("button", name="Sample text").click()
    sync_api.expect(page.get_by_label("Text of the document")).to_have_value(re.compile("^In the summer of 1858"))


def test_stopping_frees_the_server(page: "sync_api.Page", service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = Loop.turn

    def slowly(loop: Loop) -> None:
        time.sleep(0.05)  # so that it is still going on, however late the click comes
        turn(loop)

    monkeypatch.setattr(Loop, "turn", slowly)
    compress(page, TEXT * 12)
    page.get_by_role("button", name="Restore", exact=True).click()
    page.locator("#restored:not(:empty)").wait_for()
    page.get_by_role("button", name="Stop").click()
    sync_api.expect(page.locator("#restore-status")).to_have_text("Stopped.")
    for _ in range(6000):
        if service.open == 0:
            break
        page.wait_for_timeout(10)
    assert service.open == 0


def test_it_fits_a_phone_and_the_dark(browser: "sync_api.Browser", url: str) -> None:
    papers = set()
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        page.goto(url)
        compress(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert len(papers) == 2


def test_the_key_is_asked_for(browser: "sync_api.Browser", make_gmsa: Callable[[], GMSA], tmp_path: Path) -> None:
    service = Service(make_gmsa(), Settings(store=tmp_path / "store", api_key=KEY))
    with running(service) as url:
        page = browser.new_page()
        page.goto(url)
        for given in ("wrong", KEY):
            page.get_by_role("dialog").wait_for()
            page.get_by_label("Key", exact=True).fill(given)
            page.keyboard.press("Enter")
        page.get_by_text("gmsa · compressor").wait_for()
        compress(page)
        assert text_of(page, "#tokens-after") == "15"
        page.get_by_role("link", name="API").click()
        page.get_by_text("/v1/chat/completions").wait_for()
        paths = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()["paths"]
        assert page.locator(".route").count() == sum(map(len, paths.values()))
        page.close()
