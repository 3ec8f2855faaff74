"""A real browser for tests of pages: Chromium without a window, driven through DevTools over a pipe. Needs no package.

    @needs_browser
    def test_page(tmp_path):
        with open_page(tmp_path/'page.html', downloads=tmp_path) as page:
            page.click('#save')
            assert page.text('h1')=='Saved' and page.ok
"""
import base64, fcntl, json, os, select, shutil, signal, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path
import pytest

program = next((o for o in map(shutil.which, ('chromium','chromium-browser','google-chrome')) if o), None)
needs_browser = pytest.mark.skipif(program is None or os.name!='posix',
                                   reason='there is no Chromium to open pages with')

# DevTools speaks through the file descriptors 3 and 4
_launch = """import os, sys
for i,o in ((3,sys.argv[1]),(4,sys.argv[2])): os.dup2(int(o), i)
os.execv(sys.argv[3], sys.argv[3:])"""
_options = ('--headless=new','--no-sandbox','--disable-gpu','--hide-scrollbars','--no-first-run','--disable-extensions',
            '--disable-background-networking','--disable-component-update','--remote-debugging-pipe')
_codes = dict(Enter=13, Escape=27, Tab=9, Backspace=8, ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40, Delete=46,
              Home=36, End=35)

class BrowserError(AssertionError): "A script of the test, or the browser, failed"

class Page:
    "An open page; `errors`, `dialogs` and `requests` are what has happened on it"
    def __init__(self, read, write, downloads, seconds):
        self.read,self.write,self.downloads,self.seconds = read,write,downloads,seconds
        self.rest,self.last,self.session = b'',0,None
        self.errors,self.dialogs,self.requests,self.finished = [],[],[],[]

    # --- the wire -----------------------------------------------------------------------------------------------------
    def send(self, method, **params):
        "Call a method of DevTools; its result"
        self.last += 1
        own = self.last
        message = dict(id=own, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        os.write(self.write, json.dumps(message).encode()+b'\0')
        end = time.monotonic()+self.seconds
        while True:
            o = self._message(end, method)
            if o.get('id')==own:
                if 'error' in o: raise BrowserError(f"{method}: {o['error']['message']}")
                return o['result']
            if 'method' in o: self._event(o['method'], o['params'])

    def _message(self, end, what):
        while b'\0' not in self.rest:
            ready,*_ = select.select([self.read], [], [], max(0, end-time.monotonic()))
            part = os.read(self.read, 1<<20) if ready else b''
            if not part: raise BrowserError(f"{what}: the browser " + ('has ended' if ready else 'gave no answer'))
            self.rest += part
        text,self.rest = self.rest.split(b'\0', 1)
        return json.loads(text)

    def _event(self, name, o):
        if name=='Runtime.exceptionThrown':
            e = o['exceptionDetails']
            self.errors.append(e.get('exception', {}).get('description') or e['text'])
        elif name=='Log.entryAdded' and o['entry']['level']=='error': self.errors.append(o['entry']['text'])
        elif name=='Network.requestWillBeSent': self.requests.append(o['request']['url'])
        elif name=='Browser.downloadProgress' and o['state']=='completed': self.finished.append(o['guid'])
        elif name=='Page.javascriptDialogOpening':
            self.dialogs.append(o['message'])
            self.last += 1                       # its answer comes later and is not waited for
            os.write(self.write, json.dumps(dict(id=self.last, method='Page.handleJavaScriptDialog',
                                                 params=dict(accept=True), sessionId=self.session)).encode()+b'\0')

    # --- look ---------------------------------------------------------------------------------------------------------
    def eval(self, script):
        "Value of a JavaScript expression; promises are waited for"
        r = self.send('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in r: raise BrowserError(f"{script}: {r['exceptionDetails']['exception']['description']}")
        return r['result'].get('value')

    def wait(self, script, seconds=5):
        "Wait until an expression is true"
        end = time.monotonic()+seconds
        while not self.eval(f'Boolean({script})'):
            if time.monotonic()>end: raise BrowserError(f"not true after {seconds} s: {script}")
            time.sleep(.02)

    def text(self, selector): return self.eval(f'document.querySelector({json.dumps(selector)}).innerText')
    def count(self, selector): return self.eval(f'document.querySelectorAll({json.dumps(selector)}).length')

    @property
    def outside(self):
        "Addresses that the page has asked for, besides its own file and what is written in it"
        self.eval('0')                           # takes in the events up to now
        return [o for o in self.requests if not o.startswith(('file:','data:','blob:','about:'))]

    @property
    def ok(self): return not (self.outside or self.errors or self.dialogs)

    def screenshot(self, path, whole=False):
        "Write a PNG of what is in view, or of the whole page"
        o = self.send('Page.captureScreenshot', format='png', captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(o['data']))

    # --- act ----------------------------------------------------------------------------------------------------------
    def center(self, selector):
        "Middle of an element that is in view, in pixels"
        found = self.eval(f'''(() => {{ const o = document.querySelector({json.dumps(selector)})
            if (!o) return null
            o.scrollIntoView({{block:'nearest', inline:'nearest'}})
            const r = o.getBoundingClientRect()
            return r.width*r.height ? [r.x+r.width/2, r.y+r.height/2] : null }})()''')
        if found is None: raise BrowserError(f"nothing to be seen of {selector}")
        return found

    def _mouse(self, kind, at, **kwargs): self.send('Input.dispatchMouseEvent', type=kind, x=at[0], y=at[1], **kwargs)

    def hover(self, selector_or_xy):
        "Move the mouse over an element, or to a point"
        at = self.center(selector_or_xy) if isinstance(selector_or_xy, str) else selector_or_xy
        self._mouse('mouseMoved', at)
        return at

    def click(self, selector_or_xy, count=1):
        "Click an element, or a point, with the mouse"
        at = self.hover(selector_or_xy)
        for kind in ('mousePressed','mouseReleased'): self._mouse(kind, at, button='left', clickCount=count)

    def wheel(self, selector_or_xy, dy):
        "Turn the mouse's wheel over an element, or a point"
        self._mouse('mouseWheel', self.hover(selector_or_xy), deltaX=0, deltaY=dy)

    def drag(self, start, end):
        "Drag the mouse from a point to another"
        self.hover(start)
        self._mouse('mousePressed', start, button='left', clickCount=1)
        for i in range(1, 5): self._mouse('mouseMoved', [a+(b-a)*i/4 for a,b in zip(start, end)], button='left')
        self._mouse('mouseReleased', end, button='left', clickCount=1)

    def tap(self, selector):
        "Touch an element, as on a phone"
        x,y = self.center(selector)
        self.send('Input.dispatchTouchEvent', type='touchStart', touchPoints=[dict(x=x, y=y)])
        self.send('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])

    def key(self, key, modifiers=0):
        "Press a key: a character, or a name such as 'Enter'; modifiers: 1 alt, 2 ctrl, 4 meta, 8 shift"
        code = _codes.get(key, ord(key.upper()) if len(key)==1 else 0)
        text = '\r' if key=='Enter' else key if len(key)==1 and not modifiers & 7 else None
        o = dict(key=key, windowsVirtualKeyCode=code, modifiers=modifiers)
        typed = dict(type='keyDown', text=text) if text else dict(type='rawKeyDown')
        self.send('Input.dispatchKeyEvent', **typed, **o)
        self.send('Input.dispatchKeyEvent', type='keyUp', **o)

    def type(self, text):
        for o in text: self.key(o)

    def choose(self, selector, path):
        "Give a file to an `<input type=file>`"
        o = self.send('Runtime.evaluate', expression=f'document.querySelector({json.dumps(selector)})')
        self.send('DOM.setFileInputFiles', files=[str(path)], objectId=o['result']['objectId'])

    def download(self, selector, seconds=5):
        "Click, and wait for the file that comes: its path"
        before,n = set(self.downloads.iterdir()),len(self.finished)
        self.click(selector)
        end = time.monotonic()+seconds
        while len(self.finished)==n:
            if time.monotonic()>end: raise BrowserError(f"{selector} gave no file within {seconds} s")
            self.eval('0')
            time.sleep(.02)
        return next(o for o in self.downloads.iterdir() if o not in before)

    def goto(self, path):
        "Open another page, or the same one again, in the same browser; returns when it is loaded"
        url = path if isinstance(path, str) and ':' in path else Path(path).resolve().as_uri()
        self.eval('window.__old_page = true')
        self.send('Page.navigate', url=url)
        self.wait("!window.__old_page && document.readyState==='complete'", self.seconds)

    def reload(self): self.goto(self.eval('location.href'))

@contextmanager
def open_page(
    path, # File of the page
    width=1000, # Of the window, in pixels
    height=800,
    dark=False, # Does the user prefer dark colors?
    phone=False, # A touch screen?
    downloads=None, # Folder for downloads (default: a temporary one)
    seconds=20 # Longest wait for an answer
):
    "A `Page` in a browser of its own, with a profile of its own, which ends with the block"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        downloads = Path(tmp)/'downloads' if downloads is None else Path(downloads).resolve()
        downloads.mkdir(parents=True, exist_ok=True)
        pipes = [os.pipe(),os.pipe()]
        theirs = [fcntl.fcntl(o, fcntl.F_DUPFD, 20) for o in (pipes[0][0],pipes[1][1])]
        process = subprocess.Popen(
            [sys.executable, '-c', _launch, *map(str, theirs), program, *_options, f'--user-data-dir={tmp}/profile',
             f'--window-size={width},{height}', 'about:blank'], pass_fds=theirs, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for o in (*theirs, pipes[0][0], pipes[1][1]): os.close(o)
        page = Page(pipes[1][0], pipes[0][1], downloads, seconds)
        try:
            page.send('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(downloads), eventsEnabled=True)
            target = next(o['targetId'] for o in page.send('Target.getTargets')['targetInfos'] if o['type']=='page')
            page.session = page.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
            for o in ('Page','Runtime','Log','Network'): page.send(f'{o}.enable')
            page.send('Emulation.setDeviceMetricsOverride', width=width, height=height, mobile=phone,
                      deviceScaleFactor=2 if phone else 1)
            page.send('Emulation.setTouchEmulationEnabled', enabled=phone)
            page.send('Emulation.setEmulatedMedia', features=[
                dict(name='prefers-color-scheme', value='dark' if dark else 'light')])
            page.goto(path)
            yield page
        finally:
            for o in (pipes[1][0], pipes[0][1]): os.close(o)  # a browser without its pipe ends
            try: process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
