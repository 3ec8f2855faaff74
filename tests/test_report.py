"A report is a page that says what the run was, opens anywhere, runs nothing, and is written whole or not at all."
import os, re, shutil, subprocess
from html import escape
from html.parser import HTMLParser
import matplotlib, matplotlib.pyplot as plt, pytest, torch, torch.nn.functional as F
from fastai.learner import Learner
from matplotlib.figure import Figure
from PIL import Image
from helpers import digits, small_augs, small_encoder, small_learner
from self_supervised_swav.data import swav_dls
from self_supervised_swav.monitor import CollapseMonitor
from self_supervised_swav.multiview import MultiView, Picture
from self_supervised_swav.recipes import Recipe
from self_supervised_swav.report import _figure_source, _label_agreement, _next_steps
from self_supervised_swav.samples import ImageSample

sections = ['Summary', 'Alarms', 'Training', 'Epochs', 'Crops', 'Codes', 'Prototypes', 'Map', 'Neighbors', 'Settings',
            'Recipe', 'Versions', 'What now']

pytestmark = pytest.mark.usefixtures('closed_figures')

class Page(HTMLParser):
    "Tags that close in order, headings, pictures, addresses, attributes"
    void = {'meta','img','br','hr','link'}
    def __init__(self, text):
        super().__init__()
        self.open,self.heads,self.pictures,self.addresses,self.ids,self.words = [],[],[],[],[],[]
        self.tags,self.attributes,self.commands = set(),set(),[]
        self.feed(text.replace('<wbr>', ''))  # where a long word may break
        self.close()
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(attrs)
        if tag not in self.void: self.open.append(tag)
        if tag=='img': self.pictures.append(attrs)
        self.addresses += [v for k,v in attrs.items() if k in ('src','href','srcset','action','data')]
        if 'id' in attrs: self.ids.append(attrs['id'])
        if tag=='h2': self.heads.append('')
        if tag=='pre': self.commands.append('')
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data):
        if 'h2' in self.open: self.heads[-1] += data
        if 'pre' in self.open: self.commands[-1] += data
        self.words.append(data)
    @property
    def text(self): return ' '.join(' '.join(self.words).split())

def check_page(path, n_pictures=6, heads=sections):
    "A page that needs nothing but itself, and runs nothing"
    text = path.read_text(encoding='utf-8')
    page = Page(text)
    assert text.lower().startswith('<!doctype html>')
    assert all(o in text for o in ('<html lang="en">', 'name="viewport"', 'prefers-color-scheme:dark'))
    assert not re.search(r'https?://', text) and 'url(' not in text and '@import' not in text
    assert not page.tags & {'script','link','iframe','object','embed','svg','form'}
    assert not any(o.startswith('on') for o in page.attributes)
    assert all(o.startswith(('data:image/','#')) for o in page.addresses)
    assert {o[1:] for o in page.addresses if o[0]=='#'}<=set(page.ids)
    assert page.heads==heads and len(set(page.ids))==len(page.ids)
    assert len(page.pictures)==n_pictures and all(len(o['alt'])>20 for o in page.pictures), page.text
    assert len(text)<2_000_000
    return page

def test_photographs_become_jpeg():
    fig = Figure(figsize=(6,6))
    fig.subplots().imshow(torch.rand(600, 600, 3))
    assert _figure_source(fig)[0].startswith('data:image/jpeg')
    assert _figure_source(fig, most=1e9)[0].startswith('data:image/png')

def test_report(trained, tmp_path):
    plt.figure()
    before,rc,backend,shown = plt.get_fignums(),dict(matplotlib.rcParams),matplotlib.get_backend(),trained.swav.n_shown
    trained.model.train()
    modes = [m.training for m in trained.model.modules()]
    path = trained.pretrain_report(tmp_path/'new'/'report.html', title='Ten <digits> & more',
                                   notes={'time of the fit': '3 s'})
    assert path==tmp_path/'new'/'report.html' and [o.name for o in path.parent.iterdir()]==['report.html']
    page = check_page(path)
    assert plt.get_fignums()==before and dict(matplotlib.rcParams)==rc and matplotlib.get_backend()==backend
    assert [m.training for m in trained.model.modules()]==modes and trained.swav.n_shown==shown
    said = ('Ten <digits> & more', 'time of the fit', '64 for training, 16 for validation', 'eps', '0.05',
            'n_sinkh_iter', 'torch', torch.__version__,
            'without a recipe', 'valid_loss', 'nearest image has the same label',
            'predicting nothing gives ln 20 = 2.996')
    for o in said: assert o in page.text, o
    assert 'Not drawn' not in page.text
    # 8 steps: neither well nor ill
    assert 'Too short to judge: 8 steps, and 20 are needed.' in page.text and 'amiss' not in page.text

def test_old_name(trained): assert Learner.swav_report is Learner.pretrain_report

@pytest.mark.slow
def test_report_of_a_bare_learner(tmp_path):
    "No monitor, no labels, no validation set, no training"
    learn = small_learner(dls=digits(40, valid_pct=0.))
    page = check_page(learn.pretrain_report(tmp_path/'r.html'), 5)
    for o in ('No CollapseMonitor took part', 'Not drawn: learn has no curves',
              'The Recorder has not seen an epoch end', 'no labels to color it by'): assert o in page.text, o
    learn.fit(1)
    check_page(learn.pretrain_report(tmp_path/'r.html'), 6)

def test_report_tells_alarms_and_reasons(tmp_path):
    learn = small_learner(n=40, cbs=[CollapseMonitor()])
    learn.recipe = Recipe(dict(swav=dict(eps=.05, K=None), fit=dict(lr=1e-3)), {'swav.eps': 'small & sharp'})
    learn.fit(1)
    learn.collapse_monitor.alarms.append((17, 'This run does not learn: eps<0.05'))
    page = check_page(learn.pretrain_report(tmp_path/'r.html', max_images=10))
    said = ('Step 17.', 'This run does not learn: eps<0.05', 'swav.eps', 'small & sharp', 'fit.lr',
            '10 of 32 images, at random',
            'Change one setting as Alarms says, and train again.')
    for o in said: assert o in page.text, o

def test_report_of_a_broken_model(tmp_path):
    learn = small_learner(n=40)
    next(learn.model.encoder.parameters()).data.fill_(torch.nan)
    heads = [o for o in sections if o not in ('Codes','Prototypes','Neighbors')]
    page = check_page(learn.pretrain_report(tmp_path/'r.html'), 1, heads)
    assert page.text.count('features not finite')==1

def test_report_of_few_images(tmp_path):
    learn = small_learner(dls=digits(4, bs=2, valid_pct=0.), n_protos=3)
    page = check_page(learn.pretrain_report(tmp_path/'r.html'), 5)
    assert 'Not drawn: learn has no curves' in page.text and page.text.count('Not drawn')==1

class Agree(MultiView):
    "A method that the package does not know"
    title = 'Agree <to> differ'
    def __init__(self, aug_pipelines, strength=3):
        super().__init__(aug_pipelines)
        self.strength = strength
    def view_loss(self, pred): return pred.var()
    def model_settings(self): return super().model_settings() | {'agreement': 'full'}
    def pictures(self, sample):
        def draw(fig): fig.subplots().bar(range(3), [1,2,3])
        return [Picture('Own bars', draw, 'Three bars that a new method has drawn', f'Of {sample.note}.'),
                Picture('Broken', lambda fig: 1/0, 'Nothing that can be seen', 'x')]

def test_report_of_a_new_method(tmp_path):
    "Settings, model and pictures come from the method: the report knows none"
    class OnList(torch.nn.Module):
        def __init__(self): super().__init__(); self.encoder = small_encoder()
        def forward(self, x): return torch.cat([self.encoder(o) for o in (x if isinstance(x, list) else [x])])
    learn = Learner(digits(40), OnList(), cbs=[Agree(small_augs()), CollapseMonitor()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    heads = [*sections[:5], 'Own bars', 'Broken', *sections[7:]]
    page = check_page(learn.pretrain_report(tmp_path/'r.html'), 5, heads)
    for o in ('Agree <to> differ: resnet18', 'strength 3', 'agreement full', 'Of all 32 images.',
              'Not drawn: division by zero'): assert o in page.text, o
    assert not re.search('SwAV|swav(?!$)|prototype', page.text.replace('self_supervised_swav', ''))

def test_a_report_is_written_whole_or_not(trained, tmp_path, monkeypatch):
    (tmp_path/'old.html').write_text('old')
    monkeypatch.setattr('self_supervised_swav.report._page', lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): trained.pretrain_report(tmp_path/'old.html', max_images=8)
    assert (tmp_path/'old.html').read_text()=='old' and len(list(tmp_path.iterdir()))==1
    def never(*a, **k): raise AssertionError('computed before the path was tried')
    monkeypatch.setattr(Learner, 'sample_images', never)
    with pytest.raises(IsADirectoryError, match='path must be a file to write'): trained.pretrain_report(tmp_path)
    with pytest.raises(OSError): trained.pretrain_report(tmp_path/'old.html'/'report.html')
    with pytest.raises(OSError): trained.pretrain_report('/proc/no/report.html')

def test_a_learner_without_a_method(trained):
    plain = Learner(digits(40, labeled=True), trained.model, loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match='learn must have a method such as SWAV among its callbacks'):
        plain.pretrain_report()

def test_agreement_of_labels_by_hand():
    "Two pairs of neighbors, one pair of one class; of 12 ordered pairs, 2*1 in class 0 (labels 0 0 1 2) are alike"
    x = torch.tensor([[1.,0],[.99,.1],[0,1],[.1,.99]])
    sample = ImageSample(x, None, torch.tensor([0,0,1,2]), None, None, 4, None)
    assert _label_agreement(sample)==(.5,pytest.approx(2/12))

# --- what now ---
def test_next_steps_run(trained, tmp_path, monkeypatch):
    "The lines of Python at the end of the page work as they stand"
    monkeypatch.chdir(tmp_path)
    names = {}
    exec('from self_supervised_swav.all import *', names)
    learn = small_learner(dls=digits(200, labeled=True, bs=16))
    names |= dict(learn=learn, labeled=learn.dls)
    for text,command in _next_steps(learn):
        assert text.endswith(':') and command, text
        if 'fine_tune' in command:
            command = command.replace(').fine_tune(5)', ', cbs=[]).fine_tune')  # made, not trained
        exec(command, names)
    assert (tmp_path/'encoder.safetensors').is_file() and names['features'].shape==(40,16)

def test_next_steps_follow_from_the_run(trained):
    "8 steps have not brought the loss below ln 20; then an alarm says more"
    assert float(trained.recorder.losses[-1])>=trained.swav.chance_loss[0]
    assert _next_steps(trained)[0][0].startswith('Train longer')
    trained.collapse_monitor.alarms.append((8, 'It does not learn.'))
    try: assert _next_steps(trained)[0][0].startswith('Change one setting')
    finally: trained.collapse_monitor.alarms.clear()

def test_steps_are_given(trained, tmp_path):
    page = check_page(trained.pretrain_report(tmp_path/'r.html', max_images=8,
                                              next_steps=[('Use <it>:', 'swav embed "a & b" x'), ('Or rest.', None)]))
    assert page.commands==['swav embed "a & b" x'] and page.heads[-1]=='What now'
    assert page.text.index('Use <it>:')<page.text.index('Or rest.')

# --- names from anywhere ---
attack = '<img src=x onerror=document.title="run">'
odd = [attack, '$x_1$ & $$', 'two\nlines', os.fsdecode(b'caf\xe9'), '_hidden', "<b>'bold\"", '日本語']

@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    "The report of images whose labels, file names, title and notes try to break it"
    folder = tmp_path_factory.mktemp('planted')
    for i in range(21):
        name = folder/'images'/odd[i%7].replace('/', '')/f'{odd[(i//3)%7]}{i}.png'
        name.parent.mkdir(exist_ok=True, parents=True)
        Image.new('RGB', (16,16), (12*i, 255-12*i, 40*(i%5))).save(name)
    learn = small_learner(dls=swav_dls(folder/'images', size=16, bs=4, valid_pct=0., num_workers=0, device='cpu'),
                          n_in=3, cbs=[CollapseMonitor()])
    learn.fit(1)
    labels = [o.parent.name for o in learn.dls.train_ds.items]
    return learn.pretrain_report(folder/'report.html', labels=labels, title=attack,
                                 notes={attack: attack, odd[3]: odd[2]}, next_steps=[(attack, attack)])

def test_names_are_shown_as_they_are(planted):
    page = check_page(planted)
    assert 'Not drawn' not in page.text
    for o in (attack, r'caf\xe9', r'two\nlines', '$x_1$ & $$', '_hidden', "<b>'bold\"", '日本語'):
        assert o in page.text, o
    assert r'Names of these 25 files, row by row' in page.text  # 5 rows of an image and 4 neighbors

chromium = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)
in_browser = pytest.mark.skipif(chromium is None, reason='chromium is not installed')

def opened(path, folder, measure, width=1000):
    "What the script `measure` makes the title of a window around a frame of `width` pixels that holds the page"
    # a frame, since a window may not be as narrow as a phone
    frame = f'<iframe id="f" style="border:0;width:{width}px" srcdoc="{escape(path.read_text())}"'
    (folder/'probe.html').write_text(f'{frame} onload="{escape(measure)}"></iframe>')
    flags = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
             '--disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom').split()
    command = [chromium, *flags, f'--user-data-dir={folder}/profile', f'file://{folder}/probe.html']
    out = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return re.search(r'<title>(.*?)</title>', out)[1].split('|')

@in_browser
@pytest.mark.parametrize('width', [390, 1200])
def test_report_in_a_browser(trained, tmp_path, width):
    "Pictures load, the page is no wider than the window; a wider table scrolls, visibly and by keyboard"
    measure = ("const d=f.contentDocument,w=f.contentWindow.innerWidth,t=d.querySelector('[aria-label=Epochs]');"
               "document.title=[w,d.documentElement.scrollWidth,"
               "[...d.images].filter(o=>o.naturalWidth>0&&o.getBoundingClientRect().right<=w).length,"
               "t.scrollWidth>t.clientWidth,getComputedStyle(t).overflowX,t.tabIndex,"
               "getComputedStyle(t).backgroundImage.split('linear-gradient').length-1].join('|')")
    path = trained.pretrain_report(tmp_path/'report.html')
    window,page,n_pictures,wider,overflow,tab,shadows = opened(path, tmp_path, measure, width)
    assert int(window)==width and int(page)<=width and n_pictures=='6'
    assert (wider,overflow,tab,shadows)==('true' if width==390 else wider, 'auto', '0', '4')

@in_browser
def test_nothing_in_a_name_runs(planted, tmp_path):
    "Neither element nor script comes of the markup in labels, file names, title, notes or commands"
    measure = ("const d=f.contentDocument,h=d.querySelector('h1');"
               "document.title=[d.images.length,[...d.images].every(o=>o.src.startsWith('data:')),"
               "d.querySelectorAll('script,[onerror],main b').length,"
               "d.title==h.textContent&&d.title!='run',h.children.length].join('|')")
    assert opened(planted, tmp_path, measure)==['6','true','0','true','0']
