'use strict'
// What stands before the script of each page: its data, elements, thumbnails
const data = JSON.parse(document.getElementById('data').textContent)
const $ = id => document.getElementById(id)
const bytes = text => {
  const s = atob(text), out = new Uint8Array(s.length)
  for (let i = 0; i < s.length; i++) out[i] = s.charCodeAt(i)
  return out
}
const words = text => new Uint16Array(bytes(text).buffer)
const count = (m, what) => `${m.toLocaleString('en')} ${what}${m === 1 ? '' : 's'}`
const say = text => { $('said').textContent = text }

// --- elements: text goes in as text, never as markup
const el = (tag, props = {}, ...children) => {
  const o = document.createElement(tag)
  for (const [key, v] of Object.entries(props)) key.includes('-') ? o.setAttribute(key, v) : o[key] = v
  o.append(...children)
  return o
}
function download(text, name) {
  const link = el('a', {download: name, href: URL.createObjectURL(new Blob([text], {type: 'text/csv'}))})
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 1e4)
}

// --- thumbnails: sheets arrive one after the other; a canvas that waits for its sheet is painted when it comes
const {cell, cols} = data, perSheet = cols*cols, box = bytes(data.box)
const sheets = [], waiting = new Map()
let arrived = () => {}
const ready = i => sheets[Math.floor(i/perSheet)]
function paint(c, i, x, y, w, h) {
  const slot = i%perSheet, bw = box[2*i], bh = box[2*i + 1]
  c.drawImage(ready(i), slot%cols*cell, Math.floor(slot/cols)*cell, bw, bh, x, y, w, h)
}
function fill(canvas) {
  const i = +canvas.dataset.i
  if (!ready(i)) return waiting.set(canvas, i)
  canvas.width = box[2*i]
  canvas.height = box[2*i + 1]
  paint(canvas.getContext('2d'), i, 0, 0, canvas.width, canvas.height)
}
const seen = new IntersectionObserver(entries => {
  for (const e of entries) if (e.isIntersecting) { seen.unobserve(e.target); fill(e.target) }
}, {rootMargin: '200px'})
const picture = i => {
  const canvas = el('canvas', {width: 8, height: 8})
  canvas.dataset.i = i
  seen.observe(canvas)
  return canvas
}
async function arrive(img) {
  const bitmap = await createImageBitmap(img)
  sheets[+img.dataset.sheet] = bitmap
  img.remove()
  for (const [canvas, i] of waiting) if (ready(i)) { waiting.delete(canvas); fill(canvas) }
  if (sheets.filter(Boolean).length === data.sheets) performance.mark('all-thumbnails')
  arrived()
}
document.addEventListener('load', e => { if (e.target.matches?.('img.sheet')) arrive(e.target) }, true)

