"Drawings say what the tensors say, and text stands in them as it is."
import re
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from self_supervised_swav.drawings import (
    draw_codes, draw_image, draw_prototypes, drawable, printable, shortened, text_width)

pytestmark = pytest.mark.usefixtures('closed_figures')

bad = b'caf\xe9'.decode(errors='surrogateescape')  # a file name that is not UTF-8, as Python has it

def texts(ax): return [t.get_text() for t in ax.texts]

def test_prototypes_by_hand():
    "Prototype 0 is used by images 0, 1, 2, prototype 2 by image 3, prototype 1 by none"
    scores = torch.tensor([[.9,.1,.03],[.8,.2,.02],[.7,.3,.01],[0,.35,.6]])
    images = torch.arange(4).view(4,1,1,1).expand(4,1,2,2)/4
    axes = draw_prototypes(images, scores, n=3, k=2)
    drawn = [float(ax.images[0].get_array()[0,0])*4 for ax in axes]
    assert drawn==[0,1, 3,0, 3,2]  # nearest to 0, to 2, to 1
    assert [re.sub('cosine.*', '', texts(ax)[0]).split() for ax in axes[::2]]==[
        'most used 75.0% of images prototype 0'.split(), '25.0% of images prototype 2'.split(),
        'least used 0.0% of images prototype 1'.split()]
    assert 'cosine 0.90 to 0.80' in texts(axes[0])[0] and '2 of 3 prototypes' in axes[0].figure.get_suptitle()

@pytest.mark.parametrize('n,k,said',
                         [(4,1,'n must be a whole number from 1 to 3, the prototypes, got 4'), (0,1,'n must be'),
                          (True,1,'n must be'), (1,5,'k must be a whole number from 1 to 4, the images, got 5')])
def test_prototypes_asked_for(n, k, said):
    with pytest.raises(ValueError, match=said): draw_prototypes(torch.rand(4,1,2,2), torch.rand(4,3), n, k)

@pytest.mark.parametrize('n_in,shown', [(1,1), (2,1), (3,3), (5,3)])
def test_any_channels(n_in, shown):
    x = torch.rand(4, n_in, 6, 6)
    assert drawable(x).shape==(4,shown,6,6)
    draw_prototypes(x, torch.rand(4, 3), 2, 2)[0].figure.canvas.draw()
    with pytest.raises(ValueError, match='shape'): drawable(x[0])

def test_codes_by_hand():
    codes,preds = torch.tensor([[.5,.5,0.],[1,0,0]]),torch.tensor([[.2,.2,.6],[.25,.25,.5],[.5,.25,.25]])
    axes = draw_codes([torch.rand(1,4,4)]*3, codes, preds, [0,1], n_top=2)
    assert [t.get_text() for t in axes[-1].get_xticklabels()]==['0','1'] and len(axes)==6
    assert [[round(b.get_height(), 3) for b in ax.patches] for ax in axes[1::2]]==[[.5,.5,.2,.2],[1,0,.25,.25],[.5,.25]]
    loss = [-np.log(.2), -(np.log(.25)+np.log(.25))/2, (-np.log(.5)-(np.log(.5)+np.log(.25))/2)/2]
    assert [float(texts(ax)[0].split()[-1]) for ax in axes[1::2]]==[round(o, 2) for o in loss]

# --- text ---
@pytest.mark.parametrize('text,shown', [
    ('$x_1$ & <b>', '$x_1$ & <b>'), ('two\nlines\t', r'two\nlines\t'), (bad, r'caf\xe9'),
    ('a\u202egnp.exe', r'a\u202egnp.exe'), ('\x00', r'\x00'),
    ('\ud800', r'\ud800'), ('日本語 é', '日本語 é'),
    ('a\u3000b\u00a0c', 'a\u3000b\u00a0c'), ('👩\u200d🚀', '👩\u200d🚀'),
    (3, '3'), ('', '')])
def test_printable(text, shown):
    assert printable(text)==shown
    shown.encode('utf-8')  # what is shown can be written to a file

@pytest.mark.parametrize('text', ['i'*40, 'W'*40, '日本語'*9, '$x^2$'*9, 'short', bad*9, ''])
@pytest.mark.parametrize('middle', [False, True])
def test_shortened_fits(text, middle):
    short,size = shortened(text, 50, 8, middle),8
    assert text_width(short, size)<=50
    whole = printable(text)
    if short!=whole:
        head,tail = short.split('…')
        assert whole.startswith(head) and whole.endswith(tail) and bool(tail)==middle
        assert text_width(whole[:len(head)+len(tail)+1],
                          size)>40  # no shorter than it must be, up to two letters of the widest
    assert shortened('W'*9, 0, 8)=='…'

def test_names_stand_below_images_as_they_are():
    for name in ('$x_1$', '$$', '$', bad, 'two\nlines', '日本語', '_a', '{', '\\frac{'):
        ax = plt.figure().add_subplot()
        draw_image(torch.rand(1, 4, 4), ax, title=printable(name), file=f'folder/{name}.png')
        ax.figure.canvas.draw()
        assert ax.get_label()==f'folder/{printable(name)}.png' and ax.get_title()==printable(name)
        assert not ax.title.get_parse_math() and not ax.texts[0].get_parse_math()
        assert ax.texts[0].get_text() in (f'{printable(name)}.png', shortened(f'{name}.png', 50, 6, middle=True))

def test_files_below_prototypes():
    axes = draw_prototypes(torch.rand(4,1,4,4), torch.eye(4), n=2, k=1, files=[f'{o}.png' for o in 'abcd'])
    assert [ax.get_label() for ax in axes]==['a.png','d.png']
