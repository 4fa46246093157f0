"""Open a page in headless Chromium as a reader would: from disk or from this machine, with no network, at
some width and theme."""
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

ARGUMENTS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update',
             '--disable-sync', '--no-first-run']
INSTALL = ("no Chromium for the browser tests: apt-get install chromium fonts-dejavu-core, and pip install "
           "playwright (without its own browsers)")


def chromium() -> str:
    "Path of the system's Chromium; a failure of one line where there is none."
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser'))), None)
    if found is None: pytest.fail(INSTALL, pytrace=False)
    return found


@contextmanager
def open_browser():
    "A browser for several pages."
    try: from playwright.sync_api import sync_playwright
    except ImportError: pytest.fail(INSTALL, pytrace=False)
    binary = chromium()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=ARGUMENTS)
        try: yield browser
        finally: browser.close()


@contextmanager
def visit(
    browser,               # from `open_browser`
    address: str,          # of the page
    width: int = 1000,     # of the window, in CSS pixels
    theme: str = 'light',  # or 'dark': what the reader's system asks for
    height: int = 900,     # of the window
    strict: bool = True,   # at the end, fail on console errors and outside requests
    within: str = '',      # what the page may ask for starts like this; '': for nothing but itself
    warnings: bool = True, # whether a warning in the console is an error
):                         # Playwright's page; page.errors and page.outside list what went wrong
    "A page in a browser. All requests but those for the page's own files are noted and refused."
    context = browser.new_context(viewport=dict(width=width, height=height), color_scheme=theme,
                                  reduced_motion='reduce')
    try:
        page = context.new_page()
        page.errors, page.outside = [], []
        page.on('console', lambda m: page.errors.append(m.text)
                if m.type in ('error', 'warning')[:1 + warnings] else None)
        page.on('pageerror', lambda error: page.errors.append(str(error)))
        page.on('websocket', lambda socket: page.outside.append(socket.url))
        def decide(route):
            asked = route.request.url
            if asked == address or within and asked.startswith(within): return route.continue_()
            page.outside.append(asked)
            route.abort()
        context.route(lambda url: not url.startswith(('data:', 'about:', 'blob:')), decide)
        page.goto(address)
        yield page
        if strict:
            assert page.outside == [], 'the page asks for other files'
            assert page.errors == [], 'the page complains in the console'
    finally: context.close()


@contextmanager
def open_page(
    source,      # a file (Path, or str without a tag), or the page's HTML
    *given,      # see `visit`, as in all that follow
    **options,
):               # the page
    "A page opened from disk, in a browser of its own."
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        path = Path(source) if isinstance(source, Path) or '<' not in source else Path(folder) / 'page.html'
        if path.parent == Path(folder): path.write_text(source, encoding='utf-8')
        with visit(browser, path.absolute().as_uri(), *given, **options) as page: yield page
