"""The pages as a reader sees them: opened in headless Chromium with no network, in both themes, on a phone
and on a desk.

    pytest tests/test_site.py                 a preview made without Quarto, opened from disk
    pytest tests/test_site.py --site _docs    the pages that Quarto rendered, from a server on this machine

SPARSECOD_SCREENSHOTS=folder saves what was seen.
"""
import json
import os
import re
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest

import docs_check
from browser import open_browser, visit
from sparsecod import explorers

SITE = docs_check.read_site(docs_check.ROOT)
PAGES = docs_check.sidebar_pages(SITE.quarto['website']['sidebar']['contents'])
# pages with explorers
LIVELY = [p for p in PAGES if '<section class=\\"sce\\"' in (SITE.nbs / p).read_text(encoding='utf-8')]
THOROUGH = list(dict.fromkeys(['index.ipynb', 'reproduce/01_depth.ipynb', *LIVELY]))
SIZES = [(width, theme) for width in (360, 1100) for theme in ('light', 'dark')]
DRAWN = "e => [...e.querySelectorAll('svg.marks, .says')].map(x => x.outerHTML).join()"


class Quiet(SimpleHTTPRequestHandler):
    "A server that says nothing."
    def log_message(self, *said): pass


@pytest.fixture(scope='module')
def site(request, tmp_path_factory):
    "The address that all pages and their files start with."
    folder = request.config.getoption('--site')
    if folder is None:
        folder = request.config.getoption('--preview')
        if folder is None: docs_check.write_pages(folder := tmp_path_factory.mktemp('site'))
        yield f'{Path(folder).resolve().as_uri()}/'
        return
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture(scope='module')
def browser():
    with open_browser() as one: yield one


def address(site: str, page: str) -> str:
    "Where the page of a notebook is."
    return site + re.sub(r'(^|/)\d+_', r'\1', page).replace('.ipynb', '.html')


@pytest.fixture
def opened(site, browser):
    "Opens a page of the site."
    def at(page: str, width: int, theme: str):
        return visit(browser, address(site, page), width, theme, within=site,
                     warnings=site.startswith('file:'))
    return at


def keep(page, name: str, of=None):
    "Save a picture of the top of a page, or of a part of it, where that was asked for."
    folder = os.environ.get('SPARSECOD_SCREENSHOTS')
    if not folder: return
    path = Path(folder) / f"site-{re.sub('[^a-z0-9]+', '-', name)}.png"
    if of: return of.screenshot(path=path)
    size = page.evaluate('[innerWidth, document.documentElement.scrollHeight]')
    page.screenshot(path=path, full_page=True, clip=dict(x=0, y=0, width=size[0], height=min(size[1], 12000)))


def wear(page, theme: str):
    "Quarto's pages begin in the light theme whatever the system wants, and have a switch."
    if page.evaluate("t => document.body.matches('.quarto-light, .quarto-dark') && "
                     "!document.body.classList.contains('quarto-' + t)", theme):
        page.evaluate('window.quartoToggleColorScheme()')


PALE = '''() => {
  const numbers = c => { const n = c.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1] }
  const over = (a, b) => a.slice(0, 3).map((v, i) => v * a[3] + b[i] * (1 - a[3]))
  const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
  const ground = e => e ? over(numbers(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : [255, 255, 255]
  const contrast = e => {
    const under = ground(e), [a, b] = [over(numbers(getComputedStyle(e).color), under), under].map(light).sort((x, y) => y - x)
    return (a + .05) / (b + .05) }
  return [...document.querySelectorAll('main *')].filter(e => !e.closest('svg, pre, math, select') && e.getClientRects().length && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
    .filter(e => contrast(e) < 4.4).slice(0, 5).map(e => contrast(e).toFixed(2) + ' ' + e.outerHTML.slice(0, 80)) }'''


def looks_right(page, theme: str):
    "What holds of every page at every size."
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide = page.evaluate('''() => document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll('main *')]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 3).map(e => e.outerHTML.slice(0, 120))''')
    assert wide == [], 'the page scrolls sideways'
    empty = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 80))")
    assert empty == [], 'a picture is not shown'
    flat = page.evaluate("[...document.querySelectorAll('main math')].filter(m => "
                         "!m.getBoundingClientRect().width).map(m => m.textContent)")
    assert flat == [], 'a formula is not shown'
    assert page.evaluate(PALE) == [], 'a text does not stand out from its ground'
    shades = page.evaluate("['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k])")
    text, ground = (sum(map(int, re.findall(r'\d+', shade)[:3])) for shade in shades)
    assert (text > ground) == (theme == 'dark') and abs(
        text - ground) > 300, 'text does not stand out from the ground'


def moves(explorer):
    "Every slider and every list of an explorer changes what is drawn, by keyboard and by choice."
    for slider in explorer.locator('input[type=range]:visible:enabled').all():
        at, low, high = (float(slider.evaluate(f'e => e.{k}')) for k in ('value', 'min', 'max'))
        if low == high: continue
        before = explorer.evaluate(DRAWN)
        slider.press('ArrowRight' if at < high else 'ArrowLeft')
        assert explorer.evaluate(DRAWN) != before, slider.get_attribute('name')
        slider.press('ArrowLeft' if at < high else 'ArrowRight')
        assert explorer.evaluate(DRAWN) == before, slider.get_attribute('name')
    for choice in explorer.locator('select:visible:enabled').all():
        before, own = explorer.evaluate(DRAWN), choice.input_value()
        others = [v for v in choice.evaluate('e => [...e.options].map(o => o.value)') if v != own]
        if not others: continue
        choice.select_option(others[0])
        assert explorer.evaluate(DRAWN) != before, choice.get_attribute('name')
        choice.select_option(own)


def works(explorer):
    "An explorer answers, and what the first one says is what Python says."
    moves(explorer)
    if explorer.get_attribute('id') != 'sce-variance': return
    made = json.loads(explorer.locator('script[type="application/json"]').text_content())['made']
    theory = explorers.theory_stack(made['L'], round(made['p'] - .05, 2), made['step'], made['norm'])
    explorer.locator('[name=p]').press('ArrowLeft')
    assert f"variance {theory['variance'][-1]:.3g} " in explorer.locator('.says').inner_text()


def test_pages_with_explorers_are_known():
    assert {'index.ipynb', 'tools/08_explorers.ipynb'} <= set(LIVELY)


@pytest.mark.parametrize('name', THOROUGH)
def test_a_page_on_a_phone_and_on_a_desk(opened, name):
    for width, theme in SIZES:
        with opened(name, width, theme) as page:
            wear(page, theme)
            for explorer in page.locator('section.sce').all(): explorer.locator('svg.marks').wait_for()
            keep(page, f'{name}-{width}-{theme}')
            looks_right(page, theme)
            for explorer in page.locator('section.sce').all():
                if (width == 360) == (theme == 'dark'): works(explorer)
                keep(page, f"{explorer.get_attribute('id')}-{name}-{width}-{theme}", explorer)
            looks_right(page, theme)


@pytest.mark.parametrize('name', [p for p in PAGES if p not in THOROUGH])
def test_any_other_page_on_a_phone(opened, name):
    with opened(name, 360, 'dark') as page:
        wear(page, 'dark')
        keep(page, f'{name}-360-dark')
        looks_right(page, 'dark')


class Lively(HTMLParser):
    "What is alive in HTML: the texts of scripts and styles, the pages inside frames, the number of drawings."
    def __init__(self, text: str):
        super().__init__()
        self.texts, self.inside, self.frames, self.drawings, self.links = [], False, [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag in ('script', 'style')
        if self.inside: self.texts.append('')
        if tag == 'iframe': self.frames.append(dict(attributes).get('srcdoc'))
        if tag == 'a': self.links.append(dict(attributes).get('href') or '')
        self.drawings += tag == 'svg'

    def handle_endtag(self, tag): self.inside = False

    def handle_data(self, text):
        if self.inside: self.texts[-1] += text


@pytest.mark.parametrize('name', PAGES)
def test_what_is_stored_arrives_whole(site, name):
    "No step from the notebook to the page drops or changes a script, a style, a frame or a drawing."
    notebook = json.loads((SITE.nbs / name).read_text(encoding='utf-8'))
    outputs = [out['data'] for cell in notebook['cells'] for out in cell.get('outputs', []) if 'data' in out]
    stored = Lively(''.join(''.join(text) for data in outputs for kind, text in data.items()
                            if kind in ('text/html', 'text/markdown')))
    with urlopen(address(site, name)) as reply: page = Lively(reply.read().decode('utf-8'))
    assert not [text[:80] for text in stored.texts if text not in page.texts]
    assert [f for f in page.frames if f] == stored.frames and page.drawings >= stored.drawings
    own = SITE.settings['doc_host'] + SITE.settings['doc_baseurl']
    assert not [to for to in page.links if to.startswith(own)], 'a copy of the site leads to the original'


@pytest.mark.parametrize('body, said', [('<p style="width: 900px">Wide.</p>', 'sideways'),
                                        ('<img src="data:image/png;base64,AAAA" alt="">', 'picture'),
                                        ('<p style="color: #999">Pale.</p>', 'text'),
                                        ('<p>A <code style="color: #fff; background: '
                                         '#f8f9fa">name</code>.</p>', 'text'),
                                        ('<p style="color: #000; background: rgb(0 0 0 / .8)">Dark.</p>',
                                         'text'), ('<p>All is <b style="color: #555">well</b>.</p>', None)])
def test_what_looks_wrong_is_noticed(browser, tmp_path, body, said):
    path = tmp_path / 'page.html'
    path.write_text(f'<!DOCTYPE html><html><head><meta charset="utf-8"><link rel="icon" '
                    f'href="data:,"></head><body style="color: #000; background: '
                    f'#fff"><main>{body}</main></body></html>', encoding='utf-8')
    with visit(browser, path.as_uri(), 360) as page:
        if said is None: return looks_right(page, 'light')
        with pytest.raises(AssertionError, match=said): looks_right(page, 'light')
