// --- names and classes as text: on the page, and as cells of a table, as `escape_name` and `csv_name` in Python
const names = data.names, n = data.n, place = new Map(names.map((o, i) => [o, i]))
const unprintable = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u, shownAnyway = /[\p{Zs}\u200c\u200d]/u
const hex = (c, prefix, width) => `\\${prefix}${c.toString(16).padStart(width, '0')}`
function escaped(c) {
  const code = c.codePointAt(0)
  if (code >= 0xdc80 && code <= 0xdcff) return hex(code - 0xdc00, 'x', 2)  // a byte that is not UTF-8
  return code < 0x10000 ? hex(code, 'u', 4) : hex(code, 'U', 8)
}
const shown = text => [...text].map(c => unprintable.test(c) && !shownAnyway.test(c) ? escaped(c) : c).join('')
function csvName(text) {
  const out = [...text].map(c => c === '\\' ? '\\\\' : unprintable.test(c) ? escaped(c) : c).join('')
  return /^[=+@-]/.test(out) ? escaped(out[0]) + out.slice(1) : out
}
const unescapeName = text => text.replace(/\\(\\|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})/g, (all, o) => {
  if (o === '\\') return o
  const code = parseInt(o.slice(1), 16) + (o[0] === 'x' ? 0xdc00 : 0)
  return code > 0x10ffff ? all : String.fromCodePoint(code)
})
const csvCell = text => { const o = csvName(text); return /[",\n\r]/.test(o) ? `"${o.replaceAll('"', '""')}"` : o }

// --- what is known: a Map from a name to {c: class, g: name that it was labeled with}, for names elsewhere, too
let labels = new Map(), classes = [], steps = [], at = 0, saved = true, kept = true
const own = i => labels.get(names[i])
const pack = () => [...labels].map(([name, {c, g}]) => [name, c, g])
const unpack = rows => new Map(rows.map(([name, c, g]) => [name, {c, g}]))
function keep() {
  try {
    localStorage.setItem(data.key, JSON.stringify({labels: pack(), classes, steps: steps.slice(-200), at, saved}))
    kept = true
  } catch { kept = false }
}
function recall() {
  try {
    const o = JSON.parse(localStorage.getItem(data.key))
    if (![o?.labels, o?.classes, o?.steps].every(Array.isArray)) return false
    labels = unpack(o.labels)
    ;({classes, steps, at, saved} = o)
    at = Math.max(0, Math.min(n - 1, at|0))
    return true
  } catch { return false }
}
const used = () => new Set([...labels.values()].map(o => o.c))
function addClasses(more) { for (const c of more) if (!classes.includes(c)) classes.push(c) }
function change(changes) {
  // a Map from a name to its new {c, g}, or to null; one step for undo
  const before = [...changes.keys()].map(name => { const o = labels.get(name); return [name, o ? [o.c, o.g] : null] })
  steps.push({at, classes: [...classes], before})
  for (const [name, o] of changes) o ? labels.set(name, o) : labels.delete(name)
  addClasses([...changes.values()].filter(Boolean).map(o => o.c))
  saved = false
  keep()
}
function undo() {
  const step = steps.pop()
  if (!step) return
  for (const [name, o] of step.before) o ? labels.set(name, {c: o[0], g: o[1]}) : labels.delete(name)
  classes = step.classes
  saved = false
  tell('')
  show(step.at)
  say(`Undone. ${about(at)}`)
}
const root = name => {
  // what an image was labeled with may itself have been labeled with another one
  const passed = new Set()
  while (!passed.has(name) && labels.get(name) && labels.get(name).g !== name) { passed.add(name); name = labels.get(name).g }
  return name
}
function csv() {
  const grouped = [...labels].some(([name, o]) => o.g !== name)
  const rows = [...labels].map(([name, {c}]) => [name, c, ...(grouped ? [root(name)] : [])].map(csvCell).join(','))
  return `file,class${grouped ? ',group' : ''}\n${rows.map(o => o + '\n').join('')}`
}
function parse(text) {
  // rows of cells; ; separates where the first line has no comma, as spreadsheets in many countries write it
  const first = text.split(/\r?\n/, 1)[0], apart = first.includes(';') && !first.includes(',') ? ';' : ','
  const rows = [[]]
  let cell = '', quoted = false
  const end = () => { rows.at(-1).push(cell); cell = '' }
  for (let i = 0; i < text.length; i++) {
    const c = text[i]
    if (quoted) {
      if (c !== '"') cell += c
      else if (text[i + 1] === '"') { cell += c; i++ }
      else quoted = false
    } else if (c === '"' && !cell) quoted = true
    else if (c === apart) end()
    else if (c === '\n' || c === '\r') {
      if (c === '\r' && text[i + 1] === '\n') i++
      end()
      rows.push([])
    } else cell += c
  }
  end()
  return rows.filter(row => row.some(Boolean))
}
function readLabels(text) {
  const [head = [], ...rows] = parse(text), [file, cls, group] = ['file', 'class', 'group'].map(o => head.indexOf(o))
  if (file < 0 || cls < 0) throw new Error(`It must have the columns file and class, it has ${head.map(shown).join(', ') || 'none'}.`)
  const found = new Map()
  for (const row of rows) {
    const name = unescapeName(row[file] || ''), c = unescapeName(row[cls] || '').trim(), g = unescapeName(row[group] || '')
    if (!name || !c) continue
    const before = found.get(name)
    if (before && before.c !== c) throw new Error(`It gives ${shown(name)} two classes: ${shown(before.c)} and ${shown(c)}.`)
    found.set(name, {c, g: g || name})
  }
  return found
}

// --- showing it
const near = i => data.near[i]
const marked = new Set()                  // similar images that get the same label
const hue = c => `hsl(${(classes.indexOf(c)*137.5 + 215)%360} 65% 52%)`
function swatch(c) {
  const o = el('span', {className: 'swatch', 'aria-hidden': 'true'})
  o.style.background = hue(c)
  return o
}
const about = i => `Image ${i + 1} of ${n}, ${shown(names[i])}${own(i) ? `: ${shown(own(i).c)}` : ''}.`
function tell(text, bad = false) {
  $('message').textContent = text
  $('message').hidden = !text
  $('message').className = bad ? 'bad' : ''
}
function show(i) {
  at = i
  marked.clear()
  for (const j of near(i)) if (names[j] !== names[i] && own(j)?.g === names[i]) marked.add(j)
  const img = $('picture')
  img.src = data.large[i]
  img.alt = shown(names[i])
  $('name').textContent = $('name').title = shown(names[i])
  $('find').value = ''
  keep()
  draw()
}
function draw() {
  const done = names.slice(0, n).filter((_, i) => own(i)).length, others = labels.size - done
  $('bar').max = n
  $('bar').value = done
  $('count').textContent = `${done.toLocaleString('en')} of ${n.toLocaleString('en')} labeled${others ? `, ${count(others, 'more image')}` : ''}`
  $('place').textContent = `${at + 1} of ${n}`
  $('label').replaceChildren(...(own(at) ? [swatch(own(at).c), ` ${shown(own(at).c)}`] : []))
  $('clear').hidden = !own(at)
  $('undo').disabled = !steps.length
  $('save').disabled = !labels.size
  $('save').textContent = saved ? 'Download' : 'Download ●'
  $('save').title = saved ? 'labels.csv' : 'labels.csv: there are labels that you have not downloaded yet'
  drawClasses()
  drawNeighbors()
  drawChosen()
}
let enter = 0                             // which of the classes on show Enter takes
function matches() {
  const text = typed(), low = text.toLowerCase()
  if (!text) return {list: classes, fresh: false}
  const list = classes.filter(c => c.toLowerCase().includes(low)), rank = c => c === text ? 0 : c.toLowerCase() === low ? 1 :
    c.toLowerCase().startsWith(low) ? 2 : 3
  list.sort((a, b) => rank(a) - rank(b))
  return {list, fresh: !classes.includes(text)}
}
const typed = () => $('find').value.normalize('NFC').replace(/\s+/gu, ' ').trim()
function drawClasses() {
  const {list, fresh} = matches(), text = typed(), focused = document.activeElement?.dataset?.class
  const sizes = new Map()
  for (const {c} of labels.values()) sizes.set(c, (sizes.get(c) || 0) + 1)
  const chips = list.map((c, j) => {
    const number = classes.indexOf(c) + 1, o = el('button', {type: 'button', className: 'chip', title: shown(c),
      'aria-pressed': own(at)?.c === c, 'aria-label': `${shown(c)}, ${count(sizes.get(c) || 0, 'image')}`},
      ...(number < 10 && !text ? [el('kbd', {}, String(number))] : []), swatch(c), el('span', {}, shown(c)),
      el('span', {className: 'soft'}, String(sizes.get(c) || 0)))
    o.dataset.class = c
    o.onclick = e => assign(c, e)
    return o
  })
  if (fresh) {
    const o = el('button', {type: 'button', className: 'chip', id: 'fresh', title: shown(text)}, el('span', {}, `New class: ${shown(text)}`))
    o.onclick = e => assign(text, e)
    chips.push(o)
  }
  const begins = list[0]?.toLowerCase().startsWith(text.toLowerCase())
  if (enter < 0) enter = text && !begins ? chips.length - 1 : 0
  enter = Math.min(enter, chips.length - 1)
  if (text && chips[enter]) {
    chips[enter].classList.add('enter')
    chips[enter].append(el('kbd', {'aria-hidden': 'true'}, 'Enter'))
  }
  $('classes').replaceChildren(...chips)
  if (!chips.length) $('classes').append(el('p', {className: 'soft'}, 'No class yet: type the first one, then Enter.'))
  if (focused !== undefined) chips.find(o => o.dataset.class === focused)?.focus()
}
function thumb(i, caption) {
  const c = own(i)?.c
  return el('button', {className: 'thumb', title: shown(names[i]) + (c ? `: ${shown(c)}` : ''),
    'aria-label': shown(names[i]) + (c ? `, ${shown(c)}` : ', no label')},
    picture(i), el('span', {}, ...(c ? [swatch(c), shown(c)] : [caption])))
}
function drawNeighbors() {
  $('near').hidden = !near(at).length
  $('neighbors').replaceChildren(...near(at).map((i, j) => {
    const o = thumb(i, (data.cosine[at][j]/100).toFixed(2))
    o.dataset.i = i
    o.onclick = e => { marked.has(i) ? marked.delete(i) : marked.add(i); drawMarks(); leave(e) }
    return o
  }))
  drawMarks()
}
function drawMarks() {
  for (const o of $('neighbors').children) o.setAttribute('aria-pressed', marked.has(+o.dataset.i))
  $('same').setAttribute('aria-pressed', marked.size > 0)
  $('with').textContent = marked.size ? `${count(marked.size, 'image')} will get the same label.` :
    'Mark those that show the same, and they get the same label.'
}
let cards = null
function drawChosen() {
  // the cards stay, so that their pictures are painted once
  cards ??= names.slice(0, n).map((_, i) => {
    const o = thumb(i, '')
    o.onclick = () => { tell(''); show(i); scrollTo({top: 0}); say(about(i)) }
    return o
  })
  for (const [i, o] of cards.entries()) {
    const c = own(i)?.c, text = c ? shown(c) : ''
    o.setAttribute('aria-current', i === at)
    o.setAttribute('aria-label', `${shown(names[i])}, ${text || 'no label'}`)
    o.title = shown(names[i]) + (c ? `: ${text}` : '')
    o.lastChild.replaceChildren(...(c ? [swatch(c), text] : []))
  }
  if (!$('chosen').children.length) $('chosen').append(...cards)
}
function toggleAll() {
  if (marked.size) marked.clear()
  else for (const j of near(at)) if (!own(j)) marked.add(j)
  tell(marked.size || near(at).some(j => !own(j)) || !near(at).length ? '' :
       'All similar images have a label already. Click one to mark it all the same.')
  drawMarks()
  say($('with').textContent)
}

// --- labeling
const leave = e => { if (e?.detail) document.activeElement.blur() }  // after a click, keys are for the page again
function assign(c, e) {
  const name = names[at], changes = new Map([[name, {c, g: name}]])
  for (const [other, o] of labels) if (o.g === name && other !== name && near(at).includes(place.get(other))) changes.set(other, null)
  for (const j of marked) changes.set(names[j], {c, g: name})
  const with_ = marked.size ? ` and ${count(marked.size, 'similar image')}` : ''
  change(changes)
  $('find').value = ''
  if (document.activeElement === $('find')) $('find').blur()
  leave(e)
  for (let step = 1; step <= n; step++) {
    const i = (at + step)%n
    if (!own(i)) {
      tell(kept ? '' : 'This browser keeps nothing for this page: download your labels before you close it.', !kept)
      show(i)
      return say(`${shown(c)}${with_}. ${about(i)}`)
    }
  }
  draw()
  const alone = new Map()
  for (const [name, o] of labels) (alone.get(o.c) ?? alone.set(o.c, new Set()).get(o.c)).add(root(name))
  const few = [...alone].filter(([, o]) => o.size < 2).map(([c]) => shown(c))
  tell(`All images have a label: download labels.csv.${few.length ? ` swav finetune needs at least 2 images of each class that were labeled on their own; too few: ${few.join(', ')}.` : ''}`)
}
function clear() {
  if (!own(at)) return
  const name = names[at], changes = new Map([[name, null]])
  for (const j of marked) if (own(j)?.g === name) changes.set(names[j], null)
  change(changes)
  tell('')
  show(at)
  say(`No label. ${about(at)}`)
}
function move(by) {
  tell('')
  show((at + by + n)%n)
  say(about(at))
}
async function load(file) {
  try {
    if (file.size > 5e7) throw new Error('It is larger than 50 MB.')
    let text
    try { text = new TextDecoder('utf-8', {fatal: true}).decode(await file.arrayBuffer()) }
    catch { throw new Error('It is not in UTF-8: save it as CSV UTF-8.') }
    const found = readLabels(text)
    if (!found.size) throw new Error('It has no labels: its column class is empty.')
    change(found)
    const elsewhere = [...found.keys()].filter(o => !place.has(o)).length
    const next = names.slice(0, n).findIndex((_, i) => !own(i))
    show(next < 0 ? at : next)
    tell(`${count(found.size, 'label')} from ${shown(file.name)}${elsewhere ? `, ${elsewhere.toLocaleString('en')} of them for images that are not on this page: they stay in the table` : ''}.`)
  } catch (e) { tell(`${shown(file.name)} cannot be taken. ${e.message}`, true) }
}

// --- buttons and keys
$('undo').onclick = e => { undo(); leave(e) }
$('back').onclick = e => { move(-1); leave(e) }
$('next').onclick = e => { move(1); leave(e) }
$('clear').onclick = e => { clear(); leave(e) }
$('same').onclick = e => { toggleAll(); leave(e) }
$('help').onclick = () => $('about').showModal()
$('load').onclick = () => $('file').click()
$('file').onchange = async () => { for (const o of $('file').files) await load(o); $('file').value = '' }
$('save').onclick = e => {
  download(csv(), 'labels.csv')
  saved = true
  keep()
  draw()
  leave(e)
}
$('find').oninput = () => { enter = -1; drawClasses() }
const take = () => $('classes').querySelector('.enter')?.click()
$('form').onsubmit = e => { e.preventDefault(); take() }
$('find').onkeydown = e => {
  const empty = !$('find').value
  if (e.isComposing) return
  if (e.key === 'Escape') { $('find').value = ''; drawClasses(); $('find').blur() }
  else if (e.key === 'ArrowDown') { enter++; drawClasses() }
  else if (e.key === 'ArrowUp') { enter = Math.max(0, enter - 1); drawClasses() }
  else if (empty && e.key === 'Backspace' && !e.repeat) undo()
  else if (empty && e.key === 'ArrowLeft') move(-1)
  else if (empty && e.key === 'ArrowRight') move(1)
  else return
  e.preventDefault()
}
document.addEventListener('keydown', e => {
  const o = document.activeElement, typing = o === $('find')
  if ($('about').open || e.isComposing) return
  if ((e.ctrlKey || e.metaKey) && !e.shiftKey && !e.altKey && e.key.toLowerCase() === 'z' && !(typing && o.value)) undo()
  else if (e.ctrlKey || e.metaKey || e.altKey || typing) return
  else if ((e.key === ' ' || e.key === 'Enter') && o?.tagName === 'BUTTON') return
  else if (/^[1-9]$/.test(e.key)) {
    const c = classes[e.key - 1]
    c === undefined ? tell(`There is no class ${e.key} yet: type its name, then Enter.`) : assign(c)
  }
  else if (e.key === ' ') toggleAll()
  else if (e.key === 'Backspace' && !e.repeat) undo()
  else if (e.key === 'Delete') clear()
  else if (e.key === 'ArrowLeft') move(-1)
  else if (e.key === 'ArrowRight') move(1)
  else if (e.key === '?') $('about').showModal()
  else {
    if (e.key.length === 1) $('find').focus()  // and there the letter goes
    return
  }
  e.preventDefault()
})
addEventListener('storage', e => { if (e.key === data.key && recall()) { show(at); tell('Taken over from another tab.') } })
addEventListener('beforeunload', e => { if (!kept && !saved) e.preventDefault() })

// --- begin: with what this browser has kept, else with the labels that came with the page
if (!recall()) {
  labels = unpack(data.labels)
  addClasses(data.classes)
  addClasses(used())
  at = Math.max(0, names.slice(0, n).findIndex((_, i) => !own(i)))
}
show(at)
