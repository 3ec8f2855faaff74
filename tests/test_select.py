"Selected images: as the papers define them, beside the labels that exist; files that read back as they were."
import csv
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from self_supervised_swav.images import csv_name, unescape_name
from self_supervised_swav import select
from self_supervised_swav.select import read_csv, read_labels, select_to_label, write_labels

def clouds(sizes=(100,60,40), d=8, seed=0):
    "Points around well separated directions: one standard deviation is .15 of the length"
    gen = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.eye(d)[i]+.05*torch.randn(n, d, generator=gen) for i,n in enumerate(sizes)])
    return x,torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))

def test_typical_is_the_definition():
    x,y = clouds()
    idxs = select_to_label(x, 3, 'typical')
    assert y[idxs].tolist()==[0,1,2]                       # one of each, the largest group first
    u = F.normalize(x, dim=1).double()
    for i in idxs.tolist():
        own = (y==y[i]).nonzero()[:,0]
        d = torch.cdist(u[own], u[own]).sort(1).values[:,1:21].mean(1)  # without itself
        # similarities are rounded in float32, so that distances of .1 are right to 1e-5
        assert d[own.tolist().index(i)]<=d.min()+1e-5

def test_typical_goes_where_labels_are_missing():
    x,y = clouds()
    labeled = (y==0).nonzero()[:5,0].tolist()+(y==2).nonzero()[:2,0].tolist()
    idxs = select_to_label(x, 1, 'typical', labeled)
    assert y[idxs].tolist()==[1] and not set(idxs.tolist()) & set(labeled)

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('labeled', [[],[3,150,42]])
def test_coverage_is_the_plain_search(seed, labeled):
    "Every image tried in every round, in float64: none would add more than the chosen one"
    x,y = clouds(seed=seed)
    u = F.normalize(x.double(), dim=1)
    squared = torch.cdist(u, u)**2
    scale = 2*select._width**2*squared.median()
    near,chosen = torch.exp(-squared/scale),list(labeled)
    # cosines are rounded in float32: 8 products, then doubled and divided by `scale`, summed over the images
    rounding = 2*8*torch.finfo(torch.float32).eps/scale*len(x)
    assert rounding<.01
    for i in select_to_label(x, 20, 'coverage', labeled).tolist():
        best = near[chosen].amax(0) if chosen else torch.zeros(len(x))
        gain = (near-best).clamp(min=0).sum(1)
        assert i not in chosen and gain[i]>=gain.max()-2*rounding
        chosen.append(i)

def test_coverage_goes_where_labels_are_missing():
    x,y = clouds()
    idxs = select_to_label(x, 3, 'coverage')
    assert sorted(y[idxs].tolist())==[0,1,2] and y[idxs[0]]==0  # the fullest cloud first
    assert y[select_to_label(x, 1, 'coverage', labeled=idxs[:2])]==y[idxs[2]]

@pytest.mark.parametrize('method', ['typical','coverage','random'])
def test_any_number_once_each(method):
    x = torch.cat([clouds((9,4,2))[0], torch.ones(6,8)])   # copies among them
    for labeled in ([],[3,20]):
        idxs = select_to_label(x, len(x)-len(labeled), method, labeled)
        assert sorted([*idxs.tolist(),*labeled])==list(range(len(x)))
    assert select_to_label(x, 5, method, seed=1).equal(select_to_label(x, 5, method, seed=1))

def test_errors():
    x = clouds()[0]
    for kwargs,text in ((dict(n=0),'n must be'), (dict(n=1, method='best'),"method must be one of"),
                        (dict(n=1, labeled=[200]),'labeled must be indices from 0 to 199')):
        with pytest.raises(ValueError, match=text): select_to_label(x, **kwargs)
    with pytest.raises(ValueError, match='finite'): select_to_label(x*torch.nan, 1)

@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=('Cs',)) | st.sampled_from('\udc80\udcff=+-@\\\'",;\n\r\t'),
               max_size=8))
def test_text_reads_back_and_is_no_formula(text):
    cell = csv_name(text)
    cell.encode()
    assert unescape_name(cell)==text and not cell.startswith(('=','+','-','@')) and len(cell.splitlines())<2

def test_file_of_a_spreadsheet(tmp_path):
    path = tmp_path/'l.csv'
    path.write_bytes('\ufefffile;class;note\r\nä.png; x ;\r\nb.png;;\r\n'.encode())  # a BOM, semicolons, an empty class
    assert read_labels(path)==({'ä.png': 'x'},{})
    path.write_bytes('file,class\nä,x\n'.encode('latin1'))
    with pytest.raises(ValueError, match='not in UTF-8'): read_csv(path)
    path.write_text('name,class\n')
    with pytest.raises(ValueError, match='must have the columns file, class, got name, class'): read_labels(path)
    write_labels(path, {'=a,"\n.png': '-x'})
    assert list(csv.reader(open(path)))==[['file','class'],['\\u003da,"\\u000a.png','\\u002dx']]
    assert read_labels(path)[0]=={'=a,"\n.png': '-x'}

def test_command_refuses_before_it_reads(tmp_path, command):
    for args,text in ((['-n','0'],'--number must be'), (['-o','x.txt'],'.csv'), (['--method','best'],'typical')):
        code,_,err = command('select', 'run', tmp_path, *args)
        assert code==2 and text in err and len(err.splitlines())==1
