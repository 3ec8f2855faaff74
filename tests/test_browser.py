"The helper that opens pages in a browser: it sees what a page does, and what goes wrong on it."
import pytest
from browser import BrowserError, needs_browser, open_page

html = '''<!doctype html><meta charset=utf-8><title>t</title><style>body{color:#111}
@media (prefers-color-scheme: dark){body{color:#eee}}</style>
<h1>a</h1><button id=b onclick="h.textContent+='b'">b</button><input id=i><input id=f type=file>
<a id=d download="out.csv" href="data:text/csv,x%0A1">save</a><script>const h=document.querySelector('h1')
f.onchange=async()=>h.textContent=await f.files[0].text()
document.ontouchstart=()=>h.textContent='touched'</script>'''

@needs_browser
def test_page_is_read_clicked_typed_and_saved(tmp_path):
    (tmp_path/'p.html').write_text(html)
    with open_page(tmp_path/'p.html', dark=True, phone=True, width=390, downloads=tmp_path/'down') as page:
        page.click('#b')
        assert page.text('h1')=='ab' and page.eval('getComputedStyle(document.body).color')=='rgb(238, 238, 238)'
        page.click('#i')
        page.type('x=1')
        page.key('Backspace')
        assert page.eval('i.value')=='x=' and page.eval('innerWidth')==980 and page.ok
        assert page.download('#d').read_text()=='x\n1'
        page.choose('#f', tmp_path/'down'/'out.csv')
        page.wait("h.textContent==='x\\n1'")
        page.tap('#b')
        page.wait("h.textContent.startsWith('touched')")
        page.reload()
        assert page.text('h1')=='a' and page.ok
        page.screenshot(tmp_path/'p.png')
        assert (tmp_path/'p.png').read_bytes().startswith(b'\x89PNG')

@needs_browser
def test_faults_of_a_page_are_seen(tmp_path):
    script = 'setTimeout(() => {alert(1); fetch("http://127.0.0.1:9/"); none.none}, 1)'
    (tmp_path/'p.html').write_text(f'<p>x<script>{script}</script>')
    with open_page(tmp_path/'p.html') as page:
        page.wait('performance.now()>100')
        assert page.outside==['http://127.0.0.1:9/'] and page.dialogs==['1'] and not page.ok
        assert any('none is not defined' in o for o in page.errors)
        with pytest.raises(BrowserError, match='nothing to be seen of #no'): page.click('#no')
        with pytest.raises(BrowserError, match='never'): page.eval('never')
