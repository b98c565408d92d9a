"""The built documentation in a browser: what a reader sees, and what the search finds.

    python tests/check_site.py site --screenshots screenshots

Needs playwright (`pip install playwright`) and a Chromium: the system's, or playwright's own
(`playwright install chromium`). `make docs-check` builds the site and runs this.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

WIDE, NARROW = 1400, 390
# What is typed, and where the first result leads.
SEARCHES = {
    "na2d": "operations.html#natten.functional.na2d",
    "NeighborhoodAttention2D": "modules.html#natten.nn.NeighborhoodAttention2D",
    "get_configs_for_cutlass_fna": (
        "operations.html#natten.functional.configs.get_configs_for_cutlass_fna"
    ),
    "onnx": "export.html",
    "install": "install.html",
}

_CUT_TABLES = """() => [...document.querySelectorAll('.md-typeset__scrollwrap')]
    .filter(wrap => wrap.scrollWidth > wrap.clientWidth + 1)
    .map(wrap => wrap.innerText.slice(0, 60))"""
_SCROLLS = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
_BROKEN_IMAGES = """() => [...document.images]
    .filter(image => image.offsetParent && !image.naturalWidth).map(image => image.src)"""
_BRIGHT_FIGURES = """() => [...document.querySelectorAll('.md-content img')]
    .filter(image => image.offsetParent && image.src.includes('/figures/'))
    .map(image => image.src).filter(source => !/-dark\\./.test(source))"""
_MATHS_FONTS = """() => [...document.querySelectorAll('math')]
    .map(math => getComputedStyle(math).fontFamily)"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def _keep(messages: list[str], error: Any) -> None:
    messages.append(str(error))


def wait(page: Page) -> None:
    page.wait_for_load_state("networkidle")
    page.evaluate(
        """() => Promise.all([...document.images].map(image => {
            image.loading = 'eager';
            return image.complete || new Promise(done => image.onload = image.onerror = done);
        }))"""
    )


def check_page(browser: Browser, address: str, name: str, pictures: Path | None) -> list[str]:
    wrong = []
    for width in (WIDE, NARROW):
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": width, "height": 900},
                color_scheme=scheme,  # type: ignore[arg-type]
            )
            messages: list[str] = []
            page.on("pageerror", partial(_keep, messages))
            page.goto(f"{address}/{name}")
            wait(page)
            found = {
                "an error": messages,
                "broken images": page.evaluate(_BROKEN_IMAGES),
                "maths in a text font": [
                    font for font in page.evaluate(_MATHS_FONTS) if "math" not in font.lower()
                ],
            }
            if width == WIDE:
                found["a table that hides columns"] = page.evaluate(_CUT_TABLES)
            if (beyond := page.evaluate(_SCROLLS)) > 0:
                found["a page that scrolls sideways"] = [f"{beyond} pixels"]
            if scheme == "dark":
                found["a bright figure"] = page.evaluate(_BRIGHT_FIGURES)
            wrong += [
                f"{name}, {width} pixels, {scheme}: {what}: {where}"
                for what, places in found.items()
                for where in places
            ]
            if pictures is not None:
                target = pictures / f"{name.replace('/', '-')}-{width}-{scheme}.png"
                page.screenshot(path=str(target), full_page=True)
            page.close()
    return wrong


def check_search(browser: Browser, address: str) -> list[str]:
    wrong = []
    for typed, expected in SEARCHES.items():
        page = browser.new_page(viewport={"width": WIDE, "height": 900})
        page.goto(f"{address}/index.html")
        wait(page)
        page.click("input.md-search__input")
        page.keyboard.type(typed)
        page.wait_for_timeout(2000)
        # The first result is a page, with those of its sections that match.
        first = page.locator(".md-search-result__item").first
        links = first.locator("a").evaluate_all("links => links.map(link => link.href)")
        found = [re.sub(r"\?[^#]*", "", link.removeprefix(address + "/")) for link in links]
        if not any(link.startswith(expected) for link in found):
            wrong.append(f"search for {typed!r} finds {found[:3]} first, not {expected}")
        page.close()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--screenshots", type=Path, help="a folder for pictures of every page")
    parser.add_argument("--pages", nargs="*", help="only these, such as index.html")
    options = parser.parse_args()
    if options.screenshots is not None:
        options.screenshots.mkdir(parents=True, exist_ok=True)

    handler = partial(Quiet, directory=str(options.site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    pages = sorted(
        str(path.relative_to(options.site))
        for path in options.site.rglob("*.html")
        if path.name != "404.html"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-quic", "--disable-background-networking"],
        )
        wrong = [] if options.pages else check_search(browser, address)
        for name in options.pages or pages:
            wrong += check_page(browser, address, name, options.screenshots)
        browser.close()
    server.shutdown()
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    sys.stdout.write(f"{len(pages)} pages, {len(wrong)} complaints\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
