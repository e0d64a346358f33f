"""Pictures of the server's page with the model and the sample it has, for docs/images; the dark one is of a check.

    gmsa serve --store "$(mktemp -d)/store.sqlite" &
    python scripts/maintain/page_screenshots.py http://127.0.0.1:8000 docs/images

Needs Chromium (Debian: apt-get install chromium) and `pip install playwright`.
"""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FLAGS = [
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"),
    *("--disable-gpu", "--disable-quic"),
]
VIEWS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1240, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1240, "height": 900}},
    "phone": {
        "color_scheme": "light",
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "has_touch": True,
    },
}


def use(page: Page, merge_size: int, question: str, restore: str) -> None:
    """Take the sample, compress, restore ("Restore" or "Check") and ask, and wait until all is there."""
    page.get_by_role("button", name="Sample text").click()
    page.get_by_role("radio", name=f"{merge_size}×", exact=True).check()
    page.get_by_role("button", name="Compress").click()
    page.get_by_role("button", name=restore, exact=True).click()
    page.get_by_text("of words restored").wait_for(timeout=600_000)
    page.get_by_role("button", name=question).click()
    page.locator("#original-times:not(:empty)").wait_for(timeout=300_000)
    page.get_by_role("heading", name="GMSA", exact=True).first.click()  # away from the form, so that no ring is drawn


def main() -> None:
    """Write page-light.png, page-dark.png and page-phone.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a running server")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--merge-size", type=int, default=4, choices=[2, 4, 8, 16])
    parser.add_argument("--question", default="How long did the work take?", help="one of the page's suggestions")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "/usr/bin/chromium")
    options = parser.parse_args()
    flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=options.chromium, args=flags)
        for name, view in VIEWS.items():
            page = browser.new_page(**view)
            page.goto(options.url)
            use(page, options.merge_size, options.question, "Check" if name == "dark" else "Restore")
            page.screenshot(path=options.folder / f"page-{name}.png", full_page=True)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
