// Draw the explorers of this page that are not yet drawn: the chart, its controls, and the sentence and tables beside it.
(() => {
  // On the site the library is one file at its root; a page of its own and a live notebook bring it along.
  const library = () => window.vegaEmbed ? Promise.resolve() : window.sparsecodVega ??= new Promise((done, failed) => {
    const script = document.createElement('script')
    script.src = (document.querySelector('meta[name="quarto:offset"]')?.content ?? '') + 'vega.js'
    script.onload = done
    script.onerror = failed
    document.head.append(script)
  })

  const element = (tag, text, attributes = {}) => {
    const made = Object.assign(document.createElement(tag), attributes)
    made.append(text)
    return made
  }
  const text = value => typeof value !== 'number' ? value ?? '–' : Number.isFinite(value) ? String(+value.toPrecision(4)) : '–'
  const cell = (value, tag) => {
    const link = String(value).startsWith('https://')
    return element(tag, link ? element('a', 'record', {href: value}) : text(value), tag === 'th' ? {scope: 'row'} : {})
  }
  const table = (columns, rows) => {
    const head = element('tr', '')
    head.append(...Object.values(columns).map(title => element('th', title, {scope: 'col'})))
    const body = rows.map(row => {
      const line = element('tr', '')
      line.append(...Object.keys(columns).map((name, k) => cell(row[name], k ? 'td' : 'th')))
      return line
    })
    const made = document.createElement('table'), top = made.createTHead(), rest = made.createTBody()
    top.append(head)
    rest.append(...body)
    return made
  }

  const start = async root => {
    const part = name => root.querySelector('.' + name)
    const {spec, tables} = JSON.parse(part('data').textContent)
    const picture = part('picture'), room = picture.clientWidth || 720
    const columns = Math.max(1, Math.min(Math.floor(room / 280), spec.columns, spec.concat.length))
    const embed = width => {
      const concat = spec.concat.map(view => view.width === 'container' ? {...view, width} : view)
      const actions = {export: true, source: false, compiled: false, editor: false}
      return vegaEmbed(picture, {...spec, columns, concat}, {renderer: 'svg', actions, bind: part('controls'), logLevel: 1})
    }
    await library()
    const guess = Math.floor(room / columns)
    let drawn = await embed(guess)  // once to see what the labels need, then with all the room that is left
    const left = Math.floor(guess + (room - picture.querySelector('svg').getAttribute('width')) / columns)
    part('controls').replaceChildren()
    drawn.finalize()
    drawn = await embed(Math.max(100, Math.min(left, spec.usermeta.widest)))

    const marks = group => (group.marks ?? []).flatMap(mark => [mark, ...marks(mark)])
    const source = view => marks(drawn.vgSpec).find(mark => mark.name?.replace(/(_\d+)?_marks$/, '') === view).from.data  // Altair may add a number
    const rows = view => drawn.view.data(source(view))
    const show = () => {
      const said = rows(tables[0].view).find(row => row.says)?.says ?? ''
      if (part('says').textContent !== said) part('says').textContent = said
      Object.entries(spec.usermeta.limits).forEach(([slider, limit]) => {
        part('controls').querySelector(`[name="${slider}"]`).max = drawn.view.signal(limit)
      })
      root.querySelectorAll('details[data-table]').forEach(fold => {
        const {view, columns} = tables[fold.dataset.table]
        if (fold.open) fold.lastElementChild.replaceChildren(table(columns, rows(view)))
      })
    }
    new Set(tables.map(t => source(t.view))).forEach(name => drawn.view.addDataListener(name, show))
    root.querySelectorAll('details[data-table]').forEach(fold => fold.addEventListener('toggle', show))
    root.querySelectorAll('.controls :is(input, select)').forEach(input => { input.dataset.lmSuppressShortcuts = 'true' })
    root.querySelectorAll('.vega-bind-radio').forEach(group => {
      group.setAttribute('role', 'radiogroup')
      group.setAttribute('aria-label', group.previousSibling.textContent)
    })
    show()
    root.view = drawn.view
  }

  for (const root of document.querySelectorAll('.sce:not([data-drawn])')) {
    if (!root.querySelector(':scope > .data')) continue     // a panel of widgets that has only its look
    root.dataset.drawn = 'true'
    start(root).catch(error => { root.querySelector('.says').textContent = `The chart cannot be drawn: ${error.message ?? 'its library is missing'}` })
  }
})()
