// --- numbers in base64; images in the order of their rank in their groups, so the first ones are the most typical
const names = data.names, n = names.length, k = data.k
const xy = Float32Array.from(words(data.xy), o => o/65535)
const groupOf = words(data.group), distance = words(data.distance), near = words(data.near)
const cosine = new Int8Array(bytes(data.cosine).buffer), twins = words(data.twins), twinCosine = words(data.twinCosine)
const members = data.groups.map(() => [])
for (let i = 0; i < n; i++) members[groupOf[i]].push(i)
const folderOf = names.map(o => o.includes('/') ? o.slice(0, o.indexOf('/')) : '')
const folders = [...new Set(folderOf)].sort()
const baseName = i => names[i].slice(names[i].lastIndexOf('/') + 1)
const groupName = g => data.groups[g]
const thumb = (i, caption = '', label = '') => {
  const o = el('button', {className: 'thumb', title: names[i], 'aria-label': [names[i], label || caption].filter(Boolean).join(', ')},
               picture(i), ...(caption ? [el('span', {}, caption)] : []))
  o.onclick = () => select(i, true)
  return o
}
arrived = () => redraw()

// --- the map: which images are drawn as thumbnails at which zoom
const map = $('map'), ctx = map.getContext('2d')
const view = {x: .5, y: .5, s: 1}       // middle of the map, pixels per unit
let width = 1, height = 1, fitScale = 1, hovered = -1, selected = -1, shown = null, colorBy = 'groups', frame = 0, paper = ''
const maxLevel = 24, level = new Uint8Array(n)
// at half a level more there are more images, and they are larger; those that are drawn never overlap
const sizeAt = s => Math.min(160, Math.max(28, Math.min(40, Math.sqrt(width*height)/21))*(s/fitScale)**.3)
const levelAt = s => Math.floor(2*Math.log2(s/fitScale) + 1e-6)
function layOut() {
  const first = [], rest = []
  for (let i = 0; i < n; i++) (!shown || shown[i] ? first : rest).push(i)
  level.fill(255)
  for (let l = 0; l <= maxLevel; l++) {
    const s = fitScale*2**(l/2), step = sizeAt(s)*1.06/s, wide = Math.ceil(1/step) + 2, cells = new Map()
    const place = i => Math.floor(xy[2*i + 1]/step)*wide + Math.floor(xy[2*i]/step)
    const free = i => {
      const p = place(i)
      for (const row of [-wide, 0, wide]) for (const col of [-1, 0, 1]) {
        const j = cells.get(p + row + col)
        if (j !== undefined && Math.abs(xy[2*i] - xy[2*j]) < step && Math.abs(xy[2*i + 1] - xy[2*j + 1]) < step) return false
      }
      return true
    }
    for (const i of first) if (level[i] < l) cells.set(place(i), i)
    for (const i of first) if (level[i] === 255 && (l === maxLevel || free(i))) { level[i] = l; cells.set(place(i), i) }
  }
}
const hue = i => colorBy === 'groups' ? groupOf[i] : folders.indexOf(folderOf[i])
const colors = Array.from({length: Math.max(members.length, folders.length)}, (_, i) => `hsl(${(i*137.5 + 215)%360} 65% 52%)`)
const colorOf = i => colorBy === 'groups' && data.none === groupOf[i] ? 'gray' : colors[hue(i)]
let byColor = []
const sortColors = () => { byColor = Array.from({length: n}, (_, i) => i).sort((a, b) => hue(a) - hue(b)) }
const px = i => (xy[2*i] - view.x)*view.s + width/2
const py = i => (xy[2*i + 1] - view.y)*view.s + height/2
const isThumb = (i, l) => level[i] <= l && ready(i) !== undefined
function draw() {
  frame = 0
  const style = getComputedStyle(document.body), gray = style.getPropertyValue('--gray'), dpr = devicePixelRatio || 1
  paper = style.getPropertyValue('--paper')
  ctx.setTransform(dpr, 0, 0, dpr, 0, 0)
  ctx.clearRect(0, 0, width, height)
  ctx.globalAlpha = selected < 0 || shown ? 1 : .55
  const l = levelAt(view.s), t = sizeAt(view.s), r = n > 5000 ? 1.5 : 2.5
  const inside = (x, y, m) => x > -m && x < width + m && y > -m && y < height + m
  for (const pass of shown ? [0, 1] : [1]) {
    let last = null
    for (const i of byColor) {
      if (shown && shown[i] !== pass || isThumb(i, l) && pass) continue
      const x = px(i), y = py(i)
      if (!inside(x, y, r)) continue
      const color = pass ? colorOf(i) : gray
      if (color !== last) ctx.fillStyle = last = color
      ctx.fillRect(x - r, y - r, 2*r, 2*r)
    }
  }
  ctx.lineWidth = 2
  for (let i = n - 1; i >= 0; i--) {
    if (!isThumb(i, l) || shown && !shown[i]) continue
    const x = px(i), y = py(i)
    if (inside(x, y, t)) frameOf(i, x, y, t, colorOf(i))
  }
  if (selected >= 0) drawSelected(t, style)
  ctx.globalAlpha = 1
  performance.getEntriesByName('map').length || performance.mark('map')
  ready(0) && (performance.getEntriesByName('thumbnails').length || performance.mark('thumbnails'))
}
function frameOf(i, x, y, t, color) {
  const bw = box[2*i], bh = box[2*i + 1], f = (t - 4)/Math.max(bw, bh), w = bw*f, h = bh*f
  if (ctx.globalAlpha < 1) {                // dots below do not shine through
    const alpha = ctx.globalAlpha
    ctx.globalAlpha = 1
    ctx.fillStyle = paper
    ctx.fillRect(x - w/2, y - h/2, w, h)
    ctx.globalAlpha = alpha
  }
  if (ready(i)) paint(ctx, i, x - w/2, y - h/2, w, h)
  ctx.strokeStyle = color
  ctx.strokeRect(x - w/2 - 1, y - h/2 - 1, w + 2, h + 2)
}
function drawSelected(t, style) {
  ctx.globalAlpha = .7
  const x = px(selected), y = py(selected), mark = style.getPropertyValue('--mark')
  ctx.strokeStyle = mark
  for (let j = 0; j < k; j++) {
    const i = near[selected*k + j]
    ctx.beginPath()
    ctx.moveTo(x, y)
    ctx.lineTo(px(i), py(i))
    ctx.stroke()
  }
  ctx.globalAlpha = 1
  for (let j = k - 1; j >= 0; j--) {
    const i = near[selected*k + j]
    frameOf(i, px(i), py(i), t*.9, mark)
  }
  ctx.lineWidth = 4
  frameOf(selected, x, y, t*1.5, mark)
}
const redraw = () => { frame ||= requestAnimationFrame(draw) }

// --- moving
function bounds(idxs) {
  let [x0, y0, x1, y1] = [1, 1, 0, 0]
  for (const i of idxs) {
    x0 = Math.min(x0, xy[2*i]), x1 = Math.max(x1, xy[2*i]), y0 = Math.min(y0, xy[2*i + 1]), y1 = Math.max(y1, xy[2*i + 1])
  }
  let s = fitScale
  for (let i = 0; i < 3; i++) {             // room for half a thumbnail on each side, which are larger at a larger zoom
    const room = Math.min(sizeAt(idxs === all ? fitScale : s) + 24, .4*width, .4*height)
    s = Math.min((width - room)/Math.max(x1 - x0, 1e-4), (height - room)/Math.max(y1 - y0, 1e-4))
  }
  return {x: (x0 + x1)/2, y: (y0 + y1)/2, s: Math.min(s, fitScale*2**(maxLevel/2))}
}
const all = Array.from({length: n}, (_, i) => i)
function resize() {
  const whole = Math.abs(view.s/fitScale - 1) < 1e-6, dpr = devicePixelRatio || 1, zoom = view.s/fitScale
  width = map.clientWidth
  height = map.clientHeight
  map.width = Math.round(width*dpr)
  map.height = Math.round(height*dpr)
  fitScale = 1e9                            // no limit yet
  const fit = bounds(all)
  fitScale = fit.s = Math.min(fit.s, 100*Math.max(width, height))
  whole ? Object.assign(view, fit) : view.s = zoom*fitScale
  layOut()
  redraw()
}
function zoom(by, x = width/2, y = height/2) {
  const s = Math.max(fitScale*.5, Math.min(fitScale*2**(maxLevel/2), view.s*by))
  view.x += (x - width/2)*(1/view.s - 1/s)
  view.y += (y - height/2)*(1/view.s - 1/s)
  view.s = s
  keepInside()
  redraw()
}
const keepInside = () => { view.x = Math.max(0, Math.min(1, view.x)); view.y = Math.max(0, Math.min(1, view.y)) }
let flight = 0
function fly(to) {
  const from = {...view}, own = ++flight, start = performance.now()
  const still = matchMedia('(prefers-reduced-motion: reduce)').matches
  const step = now => {
    if (own !== flight) return
    const p = still ? 1 : Math.max(0, Math.min(1, (now - start)/350)), e = p*p*(3 - 2*p)
    view.s = from.s*(to.s/from.s)**e
    // the middle moves in step with what it looks like, not with the zoom
    const f = Math.abs(to.s/from.s - 1) < 1e-6 ? e : (1/view.s - 1/from.s)/(1/to.s - 1/from.s)
    view.x = from.x + (to.x - from.x)*f
    view.y = from.y + (to.y - from.y)*f
    redraw()
    if (p < 1) requestAnimationFrame(step)
  }
  requestAnimationFrame(step)
}
function bringIntoView(i) {
  const m = 40
  if (px(i) < m || px(i) > width - m || py(i) < m || py(i) > height - m) fly({x: xy[2*i], y: xy[2*i + 1], s: view.s})
}

// --- mouse and touch
function at(x, y) {
  const l = levelAt(view.s), half = sizeAt(view.s)/2
  let best = -1, least = Infinity
  for (let i = 0; i < n; i++) {
    if (shown && !shown[i]) continue
    const dx = Math.abs(px(i) - x), dy = Math.abs(py(i) - y), d = Math.hypot(dx, dy), thumb = isThumb(i, l)
    if ((thumb ? Math.max(dx, dy) <= half : d < 9) && d - 1e4*thumb < least) { least = d - 1e4*thumb; best = i }
  }
  return best
}
const pointers = new Map()
let moved = 0
const place = e => { const r = map.getBoundingClientRect(); return [e.clientX - r.left, e.clientY - r.top] }
map.onpointerdown = e => {
  flight++
  map.setPointerCapture(e.pointerId)
  if (!pointers.size) moved = 0
  pointers.set(e.pointerId, place(e))
  hover(-1)
}
map.onpointermove = e => {
  const now = place(e), before = pointers.get(e.pointerId)
  if (!before) return e.pointerType === 'mouse' ? hover(at(...now), now[1]) : undefined
  const other = [...pointers].find(([id]) => id !== e.pointerId)?.[1]
  moved += Math.hypot(now[0] - before[0], now[1] - before[1])
  pointers.set(e.pointerId, now)
  if (pointers.size > 2) return
  const share = other ? 2 : 1               // of two fingers, each moves the middle by half
  view.x -= (now[0] - before[0])/view.s/share
  view.y -= (now[1] - before[1])/view.s/share
  if (other) {
    moved = 99
    const apart = p => Math.max(20, Math.hypot(p[0] - other[0], p[1] - other[1]))
    zoom(apart(now)/apart(before), (now[0] + other[0])/2, (now[1] + other[1])/2)
  }
  keepInside()
  redraw()
}
map.onpointerup = map.onpointercancel = e => {
  pointers.delete(e.pointerId)
  if (e.type === 'pointerup' && !pointers.size && moved < 8) select(at(...place(e)))
}
map.onpointerleave = () => hover(-1)
map.addEventListener('wheel', e => {
  e.preventDefault()
  flight++
  const lines = e.deltaMode ? 30 : 1
  zoom(Math.exp(-Math.max(-200, Math.min(200, e.deltaY*lines))*(e.ctrlKey ? .01 : .0025)), ...place(e))
}, {passive: false})
function hover(i, y = 0) {
  const tip = $('tip')
  if (i !== hovered) {
    tip.replaceChildren(...(i < 0 ? [] : [picture(i), baseName(i), el('div', {className: 'soft'}, groupName(groupOf[i]))]))
    tip.hidden = i < 0
    map.style.cursor = i < 0 ? '' : 'pointer'
    hovered = i
  }
  if (i < 0) return
  const aside = 12 + (isThumb(i, levelAt(view.s)) ? sizeAt(view.s)/2 : 0), right = px(i) + aside
  tip.style.left = `${right + tip.offsetWidth < width ? right : Math.max(4, px(i) - aside - tip.offsetWidth)}px`
  tip.style.top = `${Math.max(4, Math.min(y - 40, height - tip.offsetHeight - 6))}px`
}

// --- keys
const ways = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}
function next([wx, wy]) {
  const from = selected < 0 ? [view.x, view.y] : [xy[2*selected], xy[2*selected + 1]]
  let best = -1, least = Infinity
  for (let i = 0; i < n; i++) {
    if (i === selected || shown && !shown[i]) continue
    const dx = xy[2*i] - from[0], dy = xy[2*i + 1] - from[1], ahead = dx*wx + dy*wy, aside = Math.abs(dx*wy) + Math.abs(dy*wx)
    if (selected >= 0 && (ahead <= 0 || aside > ahead)) continue
    const d = selected < 0 ? Math.hypot(dx, dy) : ahead + 2*aside
    if (d < least) { least = d; best = i }
  }
  return best
}
map.onkeydown = e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return
  if (ways[e.key]) { const i = next(ways[e.key]); if (i >= 0) { select(i); bringIntoView(i) } }
  else if (e.key === '+' || e.key === '=') zoom(1.5, ...(selected < 0 ? [] : [px(selected), py(selected)]))
  else if (e.key === '-') zoom(1/1.5)
  else if (e.key === '0') fly(bounds(all))
  else if (e.key === 'Enter' && selected >= 0) $('image').querySelector('.thumb')?.focus()
  else if (e.key === 'Escape') { shown ? show(null) : select(-1) }
  else return
  e.preventDefault()
}
document.addEventListener('keydown', e => {
  if (e.key === '/' && !/INPUT|SELECT/.test(document.activeElement.tagName)) { e.preventDefault(); $('find').focus() }
})
$('in').onclick = () => fly({...view, s: Math.min(view.s*2, fitScale*2**(maxLevel/2))})
$('out').onclick = () => fly({...view, s: Math.max(view.s/2, fitScale*.5)})
$('fit').onclick = () => fly(bounds(all))
$('help').onclick = () => $('about').showModal()

// --- showing a part of the images
function show(idxs, text) {
  shown = idxs && new Uint8Array(n)
  for (const i of idxs || []) shown[i] = 1
  $('filter').hidden = !idxs
  $('filter').textContent = idxs ? `${text}  ✕` : ''
  $('filter').setAttribute('aria-label', `${text || ''}: show all images again`)
  layOut()
  fly(idxs && idxs.length ? bounds(idxs) : bounds(all))
}
$('filter').onclick = () => { $('find').value = ''; show(null); map.focus() }
let typing = 0
$('find').oninput = () => {
  clearTimeout(typing)
  typing = setTimeout(() => {
    const text = $('find').value.trim().toLowerCase()
    if (!text) return show(null)
    const found = all.filter(i => names[i].toLowerCase().includes(text))
    show(found, count(found.length, 'match').replace(/matchs$/, 'matches'))
    say($('filter').textContent)
  }, 150)
}
$('find').onkeydown = e => {
  const first = shown ? shown.indexOf(1) : -1
  if (e.key === 'Enter' && first >= 0) select(first, true)
  if (e.key === 'Escape') { $('find').value = ''; show(null) }
}

// --- the panel
const tabs = ['image', 'groups', 'twins']
function open(name) {
  for (const o of tabs) {
    $(o).hidden = o !== name
    $(`tab-${o}`).setAttribute('aria-selected', o === name)
    $(`tab-${o}`).tabIndex = o === name ? 0 : -1
  }
  if (name === 'groups' && !$('groups').children.length) listGroups()
  if (name === 'twins' && !$('twins').children.length) listTwins()
}
for (const [j, o] of tabs.entries()) {
  $(`tab-${o}`).onclick = () => open(o)
  $(`tab-${o}`).onkeydown = e => {
    const to = {ArrowLeft: j + 2, ArrowRight: j + 1}[e.key]
    if (to === undefined) return
    open(tabs[to%3])
    $(`tab-${tabs[to%3]}`).focus()
  }
}
const swatch = g => {
  const o = el('span', {className: 'swatch', 'aria-hidden': 'true'})
  o.style.background = data.none === g ? 'gray' : colors[g]
  return o
}
// a name that is a path; each part is encoded, so it stays one
const address = i => data.base + (data.odd[i] ?? names[i].split('/').map(encodeURIComponent).join('/'))
function select(i, move = false) {
  selected = i
  const panel = $('image')
  if (i < 0) {
    panel.replaceChildren(el('p', {}, 'Choose an image on the map to see the images that are most like it.'),
      el('p', {className: 'soft'}, 'Zoom with the wheel, two fingers, or + and −.'))
    return redraw()
  }
  const g = groupOf[i], own = members[g], rank = own.indexOf(i) + 1
  const toGroup = el('button', {}, swatch(g), groupName(g))
  toGroup.onclick = () => openGroup(g)
  const nearest = Array.from({length: k}, (_, j) => thumb(near[i*k + j], (cosine[i*k + j]/100).toFixed(2),
                                                        `similarity ${(cosine[i*k + j]/100).toFixed(2)}`))
  const name = data.base === null ? names[i] :
    el('a', {href: address(i), target: '_blank', rel: 'noopener', title: 'Open the image, if it is still there'}, names[i])
  panel.replaceChildren(
    el('figure', {className: 'large'}, picture(i), el('figcaption', {}, name)),
    el('p', {}, toGroup), el('p', {className: 'soft'}, data.none === g ? 'near no other images' :
      `${rank.toLocaleString('en')} of ${count(own.length, 'image')} by how typical they are; distance to the center ${(distance[i]/32767).toFixed(2)}`),
    el('h2', {}, 'Nearest images'), el('div', {className: 'grid'}, ...nearest))
  panel.scrollTop = 0
  open('image')
  say(`${names[i]}. ${groupName(g)}, ${rank} of ${own.length}. Most similar: ${k ? names[near[i*k]] : 'none'}.`)
  if (move) bringIntoView(i)
  redraw()
}
function more(box, items, make, step = 60) {
  // `items` in parts, a button for the next one
  let done = 0
  const button = el('button', {})
  const add = () => {
    box.append(...items.slice(done, done + step).map(make))
    done = Math.min(items.length, done + step)
    button.textContent = `Show more: ${(items.length - done).toLocaleString('en')} left`
    button.hidden = done === items.length
  }
  button.onclick = add
  add()
  return button
}
function listGroups() {
  const sized = data.groups.map((_, g) => g).filter(g => members[g].length && g !== data.none)
  if (members[data.none]?.length) sized.push(data.none)
  const list = el('div')
  const cards = more(list, sized, g => {
    const own = members[g], typical = own.slice(0, own.length > 9 ? 6 : 9), strange = own.slice(typical.length).slice(-3)
    const all = el('button', {'aria-label': `Show ${groupName(g)}`}, 'Show')
    all.onclick = () => openGroup(g)
    return el('section', {className: 'card'},
      el('header', {}, el('h3', {}, swatch(g), `${groupName(g)}: ${count(own.length, 'image')}`), all),
      el('div', {className: 'grid six'}, ...typical.map(i => thumb(i))),
      ...(strange.length ? [el('div', {className: 'soft'}, 'Strangest'),
                            el('div', {className: 'grid six'}, ...strange.reverse().map(i => thumb(i)))] : []))
  }, 30)
  $('groups').replaceChildren(el('h2', {}, count(sized.filter(g => g !== data.none).length, 'group')),
    el('p', {className: 'soft'}, 'The most typical images first.'), list, cards)
}
function openGroup(g) {
  open('groups')
  const back = el('button', {}, '← All groups'), grid = el('div', {className: 'grid'})
  back.onclick = () => { show(null); listGroups(); $('tab-groups').focus() }
  $('groups').replaceChildren(back, el('h2', {}, swatch(g), `${groupName(g)}: ${count(members[g].length, 'image')}`),
    el('p', {className: 'soft'}, 'The most typical images first, the strangest last.'), grid,
    more(grid, members[g], i => thumb(i)))
  $('groups').scrollTop = 0
  show(members[g], groupName(g))
  back.focus()
}

// --- near-duplicates: pairs above the cosine that the reader chooses, linked to sets
function twinSets(least) {
  const parent = new Map(), root = i => {
    while (parent.get(i) !== i) i = parent.get(i)
    return i
  }
  for (let j = 0; j < twinCosine.length; j++) {
    if (twinCosine[j] < least*1e4 - .5) continue
    const [a, b] = [twins[2*j], twins[2*j + 1]]
    for (const i of [a, b]) if (!parent.has(i)) parent.set(i, i)
    parent.set(root(b), root(a))
  }
  const sets = new Map()
  for (const i of parent.keys()) (sets.get(root(i)) ?? sets.set(root(i), []).get(root(i))).push(i)
  return [...sets.values()].map(o => o.sort((a, b) => names[a] < names[b] ? -1 : 1)).sort((a, b) => b.length - a.length)
}
const quoted = text => `"${text.replaceAll('"', '""')}"`
function listTwins() {
  if (!twinCosine.length) return $('twins').replaceChildren(el('p', {}, `No two images have a similarity of ${data.leastTwin} or more.`))
  const range = el('input', {type: 'range', min: data.leastTwin, max: .999, step: .001, value: data.twin, id: 'least'})
  const head = el('h2'), label = el('label', {htmlFor: 'least'}), list = el('div')
  const save = el('button', {}, 'Save as CSV')
  let sets = []
  const update = () => {
    sets = twinSets(+range.value)
    label.textContent = `Similarity of at least ${(+range.value).toFixed(3)}`
    head.textContent = `${count(sets.length, 'set')} of near-duplicates`
    list.replaceChildren()
    const rest = more(list, sets, set => el('section', {className: 'card'},
      el('div', {className: 'grid'}, ...set.slice(0, 24).map(i => thumb(i, baseName(i), ' '))),
      ...(set.length > 24 ? [el('p', {className: 'soft'}, `and ${count(set.length - 24, 'more image')}`)] : [])), 40)
    list.append(rest)
    save.disabled = !sets.length
  }
  range.oninput = update
  save.onclick = () => {
    const rows = sets.flatMap((set, j) => set.map(i => `${j},${quoted(data.cells[i] ?? names[i])}`))
    download(`set,file\n${rows.join('\n')}\n`, 'near_duplicates.csv')
  }
  $('twins').replaceChildren(head, label, range, el('p', {}, save), list)
  update()
}

// --- begin
if (folders.length > 1 && folders.length <= 60) $('color-label').hidden = false
$('color').onchange = () => { colorBy = $('color').value; sortColors(); redraw() }
sortColors()
select(-1)
open('image')
new ResizeObserver(resize).observe(map)
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw)
resize()
