"A report is a page that says what the run was, opens anywhere, and is written whole or not at all."
import re, shutil, subprocess
from html import escape
from html.parser import HTMLParser
import matplotlib, matplotlib.pyplot as plt, pytest, torch, torch.nn.functional as F
from fastai.learner import Learner
from matplotlib.figure import Figure
from helpers import digits, small_learner
from self_supervised_swav.monitor import CollapseMonitor
from self_supervised_swav.recipes import Recipe
from self_supervised_swav.report import _data_uri

sections = 'Summary Alarms Training Epochs Crops Codes Prototypes Map Neighbours Settings Recipe Versions'.split()

pytestmark = pytest.mark.usefixtures('closed_figures')

class Page(HTMLParser):
    "Tags that close in order, headings, pictures, addresses"
    void = {'meta','img','br','hr','link'}
    def __init__(self, text):
        super().__init__()
        self.open,self.heads,self.pictures,self.addresses,self.ids,self.seen,self.words = [],[],[],[],[],set(),[]
        self.feed(text)
        self.close()
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.seen.add(tag)
        if tag not in self.void: self.open.append(tag)
        if tag=='img': self.pictures.append(attrs)
        self.addresses += [v for k,v in attrs.items() if k in ('src','href','srcset','action','data')]
        if 'id' in attrs: self.ids.append(attrs['id'])
        if tag=='h2': self.heads.append('')
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data):
        if self.open and self.open[-1]=='h2': self.heads[-1] += data
        self.words.append(data)
    @property
    def text(self): return ' '.join(self.words)

def test_photographs_become_jpeg():
    fig = Figure(figsize=(6,6))
    fig.subplots().imshow(torch.rand(600, 600, 3))
    assert _data_uri(fig).startswith('data:image/jpeg') and _data_uri(fig, most=1e9).startswith('data:image/png')

def check_page(path, n_pictures=6):
    "A page that needs nothing but itself"
    text = path.read_text(encoding='utf-8')
    page = Page(text)
    assert text.startswith('<!DOCTYPE html>') and '<html lang="en">' in text and 'name="viewport"' in text and 'prefers-color-scheme:dark' in text
    assert not re.search(r'https?://', text) and 'url(' not in text and '@import' not in text and not page.seen & {'script','link','iframe','object'}
    assert all(o.startswith(('data:image/','#')) for o in page.addresses) and {o[1:] for o in page.addresses if o[0]=='#'}<=set(page.ids)
    assert page.heads==sections and len(set(page.ids))==len(page.ids)
    assert len(page.pictures)==n_pictures and all(len(o['alt'])>20 for o in page.pictures), page.text
    assert len(text)<2_000_000
    return page

def test_report(trained, tmp_path):
    plt.figure()
    before,rc,backend,shown = plt.get_fignums(),dict(matplotlib.rcParams),matplotlib.get_backend(),trained.swav.n_shown
    trained.model.train()
    modes = [m.training for m in trained.model.modules()]
    path = trained.swav_report(tmp_path/'new'/'report.html', title='Ten <digits> & more', notes={'time of the fit': '3 s'})
    assert path==tmp_path/'new'/'report.html' and [o.name for o in path.parent.iterdir()]==['report.html']
    page = check_page(path)
    assert plt.get_fignums()==before and dict(matplotlib.rcParams)==rc and matplotlib.get_backend()==backend
    assert [m.training for m in trained.model.modules()]==modes and trained.swav.n_shown==shown
    for o in ('Ten <digits> & more', 'time of the fit', '64 for training, 16 for validation', 'eps', '0.05', 'n_sinkh_iter', 'torch', torch.__version__,
              'CollapseMonitor found nothing amiss in 8 steps', 'without a recipe', 'valid_loss', 'nearest image has the same label'): assert o in page.text, o
    assert 'Not drawn' not in page.text

def test_report_of_a_bare_learner(tmp_path):
    "No monitor, no labels, no validation set, no training"
    learn = small_learner(dls=digits(40, valid_pct=0.))
    page = check_page(learn.swav_report(tmp_path/'r.html'), 5)
    for o in ('No CollapseMonitor took part', 'Not drawn: learn has no curves', 'The Recorder has not seen an epoch end', 'no labels to colour it by'): assert o in page.text, o
    learn.fit(1)
    check_page(learn.swav_report(tmp_path/'r.html'), 6)

def test_report_tells_alarms_and_reasons(tmp_path):
    learn = small_learner(n=40, cbs=[CollapseMonitor()])
    learn.recipe = Recipe(dict(swav=dict(eps=.05, K=None), fit=dict(lr=1e-3)), {'swav.eps': 'small & sharp'})
    learn.fit(1)
    learn.collapse_monitor.alarms.append((17, 'This run does not learn: eps<0.05'))
    page = check_page(learn.swav_report(tmp_path/'r.html', max_images=10))
    for o in ('Step 17.', 'This run does not learn: eps<0.05', 'swav.eps', 'small & sharp', 'fit.lr', '10 of 32 images, at random'): assert o in page.text, o

def test_report_of_a_broken_model(tmp_path):
    learn = small_learner(n=40)
    next(learn.model.encoder.parameters()).data.fill_(torch.nan)
    page = check_page(learn.swav_report(tmp_path/'r.html'), 1)
    assert page.text.count('features not finite')==3 and 'scores must be finite' in page.text

def test_report_of_few_images(tmp_path):
    page = check_page(small_learner(dls=digits(4, bs=2, valid_pct=0.), n_protos=3).swav_report(tmp_path/'r.html'), 5)
    assert 'Not drawn: learn has no curves' in page.text and page.text.count('Not drawn')==1

def test_a_report_is_written_whole_or_not(trained, tmp_path, monkeypatch):
    (tmp_path/'old.html').write_text('old')
    monkeypatch.setattr('self_supervised_swav.report._page', lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): trained.swav_report(tmp_path/'old.html', max_images=8)
    assert (tmp_path/'old.html').read_text()=='old' and len(list(tmp_path.iterdir()))==1
    def never(*a, **k): raise AssertionError('computed before the path was tried')
    monkeypatch.setattr(Learner, 'sample_images', never)
    with pytest.raises(IsADirectoryError, match='path must be a file to write'): trained.swav_report(tmp_path)
    with pytest.raises(OSError): trained.swav_report(tmp_path/'old.html'/'report.html')
    with pytest.raises(OSError): trained.swav_report('/proc/no/report.html')

def test_a_learner_without_swav(trained):
    plain = Learner(digits(40, labelled=True), trained.model, loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match='learn must have SWAV among its callbacks'): plain.swav_report()

chromium = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)

@pytest.mark.skipif(chromium is None, reason='chromium is not installed')
@pytest.mark.parametrize('width', [390, 1200])
def test_report_in_a_browser(trained, tmp_path, width):
    "Pictures load, and the page is no wider than the window: tables scroll by themselves"
    path = trained.swav_report(tmp_path/'report.html')
    measure = ("const d=f.contentDocument,w=f.contentWindow.innerWidth;document.title=[w,d.documentElement.scrollWidth,"
               "[...d.images].filter(o=>o.naturalWidth>0&&o.getBoundingClientRect().right<=w).length].join()")
    (tmp_path/'probe.html').write_text(f'<iframe id="f" style="border:0;width:{width}px" srcdoc="{escape(path.read_text())}" onload="{measure}"></iframe>')  # a window may not be as narrow as a phone
    flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --dump-dom'.split()
    out = subprocess.run([chromium, *flags, f'--user-data-dir={tmp_path}/profile', f'file://{tmp_path}/probe.html'], capture_output=True, text=True, timeout=120).stdout
    window,page,n_pictures = map(int, re.search(r'<title>(\d+),(\d+),(\d+)</title>', out).groups())
    assert window==width and page<=width and n_pictures==6
