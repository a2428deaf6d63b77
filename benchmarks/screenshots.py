"""Check a run's report, or the docs site, in headless Chromium, and take the pictures of the docs.

python benchmarks/screenshots.py RUN_FOLDER [--out docs/images] [--whole FOLDER]
python benchmarks/screenshots.py build/site --site [PAGE ...] [--whole FOLDER]

Checks at phone (390 px) and desktop width (1280 px), light and dark: console errors, network requests, axe findings,
and pages wider than the screen. --out writes report.png, report-phone.png and report-phone-tradeoff.png; --whole writes
a picture of the whole page for each width and style. --site checks the pages that `make docs` built, all of them or
the given ones, such as quickstart (`.`: the first). Needs a chromium on the PATH (or --chromium) and playwright and
axe-playwright-python from the dev extra. The last line is JSON; the exit code is 1 if there is any problem.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ColorScheme = Literal["light", "dark"]
VIEWPORT_WIDTHS = {"phone": 390, "desktop": 1280}
VIEWPORT_HEIGHTS = {"phone": 844, "desktop": 1500}
COLOR_SCHEMES: tuple[ColorScheme, ...] = ("light", "dark")
PHONE_SCALE = 1.5
"""Device pixels per CSS pixel in phone pictures."""
DOCS_PICTURES: dict[str, tuple[str, ColorScheme, str]] = {
    "report-phone": ("phone", "dark", ""),
    "report-phone-tradeoff": ("phone", "dark", "tradeoff"),
    "report": ("desktop", "light", ""),
}
"""Width, style and section at the top of each picture of the docs."""

logger = logging.getLogger("benchmarks.screenshots")


def find_chromium(browser_name: str | None = None) -> str:
    """Path of a Chromium. Raises SystemExit if there is none."""
    browser_path = next(
        filter(None, map(shutil.which, (browser_name or "chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser_path is None:
        raise SystemExit("no Chromium on the PATH (Debian: apt-get install chromium); name one with --chromium")
    return browser_path


def open_report(browser: Browser, report: Path, size: str, scheme: ColorScheme, problems: list[str]) -> Page:
    """Open the report in a new page with all plots rendered; console and network messages go to `problems`."""
    page = open_page(browser, report.resolve().as_uri(), size, scheme, f"{size}, {scheme}", problems)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # also draws the plots outside the viewport
    return page


def open_page(
    browser: Browser,
    url: str,
    size: str,
    scheme: ColorScheme,
    view: str,
    problems: list[str],
    allowed_url: str = "file:",
) -> Page:
    """Open a page; its console messages and requests to other addresses go to `problems`."""
    page = browser.new_page(
        viewport={"width": VIEWPORT_WIDTHS[size], "height": VIEWPORT_HEIGHTS[size]},
        color_scheme=scheme,
        device_scale_factor=PHONE_SCALE if size == "phone" else 1,
        reduced_motion="reduce",
    )
    page.on("console", lambda message: problems.append(f"{view}: console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"{view}: error: {error}"))
    page.on(
        "request",
        lambda request: problems.extend(
            [] if request.url.startswith((allowed_url, "data:", "blob:")) else [f"{view}: requests {request.url}"]
        ),
    )
    page.goto(url)
    return page


def find_problems(page: Page, view: str) -> list[str]:
    """Axe findings with all details open, plots that are not rendered, and a page wider than the screen."""
    from axe_playwright_python.sync_playwright import Axe

    # axe does not check hidden content.
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    violations: list[dict[str, Any]] = Axe().run(page).response["violations"]
    problems = [
        f"{view}: axe {violation['id']}: {node['html'][:160]}"
        for violation in violations
        for node in violation["nodes"]
    ]
    missing_plots = page.evaluate("document.querySelectorAll('[data-figure]:not(.js-plotly-plot)').length")
    page_width = page.evaluate("document.documentElement.scrollWidth")
    problems += [f"{view}: {missing_plots} plots are not drawn"] if missing_plots else []
    return problems + (
        [f"{view}: the page is {page_width} pixels wide"] if page_width > VIEWPORT_WIDTHS[view.split(",")[0]] else []
    )


class SiteRequestHandler(SimpleHTTPRequestHandler):
    """Serves a folder without a line of log per request."""

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; yields the URL. A site's search does not work from files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SiteRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def check_site(
    site_folder: Path, browser_path: str, page_names: list[str], full_page_folder: Path | None
) -> dict[str, Any]:
    """Check pages of the docs site in each width and color scheme; returns problems and pictures."""
    from playwright.sync_api import sync_playwright

    all_names = sorted(path.parent.relative_to(site_folder).as_posix() for path in site_folder.rglob("index.html"))
    problems: list[str] = []
    picture_paths: list[str] = []
    with sync_playwright() as playwright, serve_folder(site_folder) as url:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name in page_names or all_names:
            for size, scheme in itertools.product(VIEWPORT_WIDTHS, COLOR_SCHEMES):
                view = f"{size}, {scheme}, {name}"
                page = open_page(browser, f"{url}/{name}/", size, scheme, view, problems, url)
                problems += find_problems(page, view)
                if full_page_folder is not None:
                    full_page_folder.mkdir(parents=True, exist_ok=True)
                    path = full_page_folder / f"{name.replace('/', '-').strip('.') or 'index'}-{size}-{scheme}.png"
                    page.screenshot(path=path, full_page=True)
                    picture_paths.append(str(path))
                page.close()
        version = browser.version
        browser.close()
    return {"benchmark": "screenshots", "chromium": version, "problems": problems, "pictures": picture_paths}


def take_docs_pictures(page: Page, size: str, scheme: ColorScheme, folder: Path) -> list[str]:
    """Take the pictures of the docs that show this view: the top on desktop and phone, and the trade-off on a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    picture_paths = []
    for name, (picture_size, picture_scheme, section) in DOCS_PICTURES.items():
        if (picture_size, picture_scheme) != (size, scheme):
            continue
        if section and page.locator(f"#{section}").count():
            page.evaluate(f"document.getElementById('{section}').scrollIntoView()")
            page.wait_for_timeout(300)  # let the page settle after scrolling
        page.screenshot(path=folder / f"{name}.png")
        picture_paths.append(str(folder / f"{name}.png"))
    return picture_paths


def check_report(
    report: Path, browser_path: str, docs_folder: Path | None, full_page_folder: Path | None
) -> dict[str, Any]:
    """Check the report in each width and color scheme; returns problems and pictures."""
    from playwright.sync_api import sync_playwright

    problems: list[str] = []
    picture_paths: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for size, scheme in itertools.product(VIEWPORT_WIDTHS, COLOR_SCHEMES):
            page = open_report(browser, report, size, scheme, problems)
            # Before the search for problems, which opens all details.
            if docs_folder is not None:
                picture_paths += take_docs_pictures(page, size, scheme, docs_folder)
            if full_page_folder is not None:
                full_page_folder.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=full_page_folder / f"{size}-{scheme}.png", full_page=True)
                picture_paths.append(str(full_page_folder / f"{size}-{scheme}.png"))
            problems += find_problems(page, f"{size}, {scheme}")
            page.close()
        version = browser.version
        browser.close()
    return {"benchmark": "screenshots", "chromium": version, "problems": problems, "pictures": picture_paths}


def main(arguments: list[str]) -> int:
    """Check one report; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="screenshots.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="a run folder with a report.html, or with --site a docs site")
    parser.add_argument("--site", nargs="*", metavar="PAGE", help="check the docs site in the folder, or pages of it")
    parser.add_argument("--out", type=Path, help="folder for the pictures of the docs")
    parser.add_argument("--whole", type=Path, help="folder for pictures of the whole page")
    parser.add_argument("--chromium", help="the browser to use")
    args = parser.parse_args(arguments)
    if args.site is not None:
        result = check_site(args.folder, find_chromium(args.chromium), args.site, args.whole)
    else:
        report = args.folder / "report.html"
        if not report.is_file():
            parser.error(f"{report} does not exist; python -m rluf.report {args.folder} writes it")
        result = check_report(report, find_chromium(args.chromium), args.out, args.whole)
    for problem in result["problems"]:
        logger.info("%s", problem)
    sys.stdout.write(json.dumps(result) + "\n")
    return int(bool(result["problems"]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
