"Open a page in headless Chromium as a reader would: from disk, with no network, at some width and theme."
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

ARGUMENTS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run']
INSTALL = "no Chromium for the browser tests: apt-get install chromium, and pip install playwright (without its own browsers)"


def chromium() -> str:
    "Path of the system's Chromium; a failure of one line where there is none."
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser'))), None)
    if found is None: pytest.fail(INSTALL, pytrace=False)
    return found


@contextmanager
def open_page(
    source,                # a file (Path, or str without a tag), or the page's HTML
    width: int = 1000,     # of the window, in CSS pixels
    theme: str = 'light',  # or 'dark': what the reader's system asks for
    height: int = 900,     # of the window
    strict: bool = True,   # at the end, fail on console errors and outside requests
):                         # Playwright's page; page.errors and page.outside list what went wrong
    "A page opened from disk. Requests to any host are noted and refused."
    try: from playwright.sync_api import sync_playwright
    except ImportError: pytest.fail(INSTALL, pytrace=False)
    binary = chromium()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        path = Path(source) if isinstance(source, Path) or '<' not in source else Path(folder) / 'page.html'
        if path.parent == Path(folder): path.write_text(source, encoding='utf-8')
        browser = driver.chromium.launch(executable_path=binary, args=ARGUMENTS)
        try:
            context = browser.new_context(viewport=dict(width=width, height=height), color_scheme=theme, reduced_motion='reduce')
            page = context.new_page()
            page.errors, page.outside = [], []
            page.on('console', lambda m: page.errors.append(m.text) if m.type in ('error', 'warning') else None)
            page.on('pageerror', lambda error: page.errors.append(str(error)))
            page.on('websocket', lambda socket: page.outside.append(socket.url))
            def decide(route):
                if route.request.url == path.absolute().as_uri(): return route.continue_()
                page.outside.append(route.request.url)
                route.abort()
            context.route(lambda url: not url.startswith(('data:', 'about:', 'blob:')), decide)
            page.goto(path.absolute().as_uri())
            yield page
            if strict:
                assert page.outside == [], 'the page asks for other files'
                assert page.errors == [], 'the page complains in the console'
        finally:
            browser.close()
