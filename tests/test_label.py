"The page of `swav label`: from the first click to the table and back, by mouse, keys and touch; nothing in it runs."
import csv, json, random, re, unicodedata
import pytest, torch
from PIL import Image
from browser import needs_browser, open_page
from helpers import small_encoder
from self_supervised_swav.args import LabelArgs
from self_supervised_swav.checkpoints import save_encoder
from self_supervised_swav.finetune import labeled_files
from self_supervised_swav.grouping import directions
from self_supervised_swav.images import csv_name, unescape_name
from self_supervised_swav.label import label_images, label_page
from self_supervised_swav.select import read_labels, write_labels

evil = ['<img src=x onerror=alert(1)>.png', '"\'><svg onload=alert(2)>.png', '</script><script>alert(3)<!--.png',
        '=1+1.png', '@a,"b".png', 'new\nline\u2028\u202e.png', 'l'*246+'.png', 'a\\u0041\\.png']
n_images,n_chosen = 40,12
here = dict(num_workers=0, device='cpu')

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "40 images in four clusters of ten; the first of each cluster and the evil ones are to be labeled"
    root = tmp_path_factory.mktemp('label')
    names = [*evil, *(f'{"ab"[i%2]}/{i:02}.png' for i in range(n_images-len(evil)))]
    for i,name in enumerate(names):
        (root/'photos'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', [(90,40),(40,90),(20,20)][i%3], (4*i,255-4*i,37*i%256)).save(root/'photos'/name)
    gen = torch.Generator().manual_seed(0)
    x = torch.eye(8)[torch.arange(n_images)%4]+5+.05*torch.randn(n_images, 8, generator=gen)
    page = label_page(x, [root/'photos'/o for o in names], range(n_chosen), root/'label.html', root/'photos',
                      n_neighbors=6, title='<b>Mine</b>')
    return root,names,x,page

def page_data(page): return json.loads(re.search('id="data">(.*?)</script>', page.read_text(), re.S)[1])
loaded = "performance.getEntriesByName('all-thumbnails').length && $('picture').complete"

def test_data_of_the_page(place):
    "Names as they are, neighbors as the definition gives them, large images no larger than their files"
    _,names,x,page = place
    d = page_data(page)
    assert d['names'][:n_chosen]==names[:n_chosen] and d['n']==n_chosen and len(d['large'])==n_chosen
    z = directions(x).double()
    cosines = (z@z.T).fill_diagonal_(-2)
    for i,(row,said) in enumerate(zip(d['near'], d['cosine'])):
        idxs = [names.index(d['names'][j]) for j in row]
        torch.testing.assert_close(cosines[i,idxs], cosines[i].topk(6).values, atol=1e-5, rtol=0)
        assert max(abs(a/100-b) for a,b in zip(said, cosines[i,idxs].tolist()))<=.005+1e-5  # two digits

@needs_browser
def test_text_is_escaped_as_in_python(place):
    rng = random.Random(0)
    special = '\udc80\udcff=+-@\\\'",;\n\r\t\u2028\u202e\u200d\xa0 '
    def char(): return rng.choice(special) if rng.random()<.5 else chr(rng.choice((rng.randrange(0x3000),
                                                                                  rng.randrange(0x110000))))
    texts = [re.sub('[\ud800-\udbff]', '', ''.join(char() for _ in range(rng.randint(1, 8)))) for _ in range(1500)]
    texts = [o for o in texts if o]                                        # no name has the first half of a pair alone
    # Unicode grows; what it had long ago is the same in both
    old = [all(unicodedata.ucd_3_2_0.category(c)!='Cn' for c in o) for o in texts]
    assert sum(old)>100
    with open_page(place[-1]) as page:
        sent = json.dumps(json.dumps(texts))                               # ASCII, half surrogates as their escapes
        cells = page.eval(f'JSON.parse({sent}).map(csvName)')
        assert [unescape_name(o) for o in cells]==texts and not any(o.startswith(tuple('=+-@')) for o in cells)
        assert [o for o,is_old in zip(cells, old) if is_old]==[csv_name(o) for o,is_old in zip(texts, old) if is_old]
        assert page.eval(f"""(() => {{
            const texts = JSON.parse({sent}), rows = parse(texts.map(csvCell).join(',') + '\\n')
            return rows.length === 1 && rows[0].map(unescapeName).every((o, i) => o === texts[i]) }})()""")

def word(page, text):
    page.type(text)
    page.key('Enter')

def now(page): return page.eval('at')
def shown(page): return page.eval('[...labels].map(([name, o]) => [name, o.c, o.g])')

@needs_browser
def test_from_the_first_click_to_the_file_and_back(place, tmp_path):
    "With the mouse alone but for the names of classes; the table is that of `write_labels`, and a classifier's"
    root,names,_,path = place
    with open_page(path, width=1200, height=800, downloads=tmp_path/'down') as page:
        page.wait(loaded)
        assert page.text('h1')=='<b>Mine</b>' and page.text('#count')=='0 of 12 labeled'
        assert page.text('#name')==evil[0] and page.count('#neighbors .thumb')==6
        assert page.eval('$("save").disabled && $("undo").disabled')
        page.click('#find')
        word(page, 'cat')
        assert now(page)==1 and page.text('#count')=='1 of 12 labeled'
        page.click('#find')
        page.type('dog')
        page.click('#form button')
        # the third with its whole group, but for one image
        page.click('#same')
        page.click('#neighbors .thumb:nth-child(2)')
        assert page.text('#with')=='5 images will get the same label.'
        third = page.eval('near(2).map(i => names[i])')
        page.click('#classes .chip:nth-child(1)')
        want = {names[0]: 'cat', names[1]: 'dog', names[2]: 'cat', **dict.fromkeys(third[:1]+third[2:], 'cat')}
        group = dict.fromkeys(third[:1]+third[2:], names[2])
        assert shown(page)==[[k,v,group.get(k, k)] for k,v in want.items()]
        assert page.text('#classes .chip:nth-child(1) .soft')=='7'
        # back to it: its group is marked; without two of them, they have no label
        page.click('#chosen .thumb:nth-child(3)')
        assert page.eval('marked.size')==5
        page.click('#neighbors .thumb:nth-child(1)')
        page.click('#classes .chip:nth-child(2)')
        del want[third[0]], group[third[0]]
        want |= dict.fromkeys([names[2],*third[2:]], 'dog')
        assert {a: b for a,b,_ in shown(page)}==want
        for _ in range(30):
            left = page.eval('names.slice(0, n).filter((_, i) => !own(i)).length')
            if not left: break
            want[names[now(page)]] = 'cat'
            page.click('#classes .chip:nth-child(1)')
        assert 'All images have a label' in page.text('#message')
        table = page.download('#save')
        assert table.name=='labels.csv' and page.text('#save')=='Download' and page.ok
    write_labels(tmp_path/'same.csv', {k: want[k] for k in read_labels(table)[0]}, group)
    assert table.read_bytes()==(tmp_path/'same.csv').read_bytes()
    assert read_labels(table)==(want, {k: group.get(k, k) for k in want})
    data = labeled_files(table, root/'photos')
    assert data.vocab==['cat','dog'] and len(data.files)==len(want)
    assert len(set(data.groups))==len(want)-len(group)
    # and in again, in a browser that knows nothing
    with open_page(path, downloads=tmp_path/'again') as page:
        page.wait(loaded)
        page.choose('#file', table)
        page.wait('labels.size')
        assert page.text('#message')==f'{len(want)} labels from labels.csv.'
        page.eval("document.querySelector('#save').scrollIntoView()")
        assert page.download('#save').read_bytes()==table.read_bytes()
        page.click('#undo')                                                # one step
        assert page.eval('labels.size')==0 and page.ok

@needs_browser
def test_keys_alone(place, tmp_path):
    _,names,_,path = place
    with open_page(path, downloads=tmp_path/'down') as page:
        page.wait(loaded)
        word(page, 'Cat')
        word(page, 'car')
        word(page, 'dog')
        page.key('1')
        assert [o[1] for o in shown(page)]==['Cat','car','dog','Cat'] and now(page)==4
        # a beginning is enough; one that fits several takes the first, arrows go on to the others and to a new one
        word(page, 'do')
        page.type('CA')
        assert page.eval("[...$('classes').children].map(o => o.title)")==['Cat','car','CA']
        page.key('ArrowDown'); page.key('Enter')
        page.type('ca')
        for _ in range(9): page.key('ArrowDown')
        page.key('Enter')
        assert [o[1] for o in shown(page)][4:]==['dog','car','ca'] and page.eval('classes')==['Cat','car','dog','ca']
        page.type('x')
        page.key('Escape')
        assert page.eval("$('find').value")=='' and page.eval('labels.size')==7
        # there is no class 9; a digit in a name is typed after a letter, or after a click on the field
        page.key('9')
        assert 'no class 9' in page.text('#message') and page.eval('labels.size')==7
        page.key('Backspace')
        page.key('z', modifiers=2)
        assert page.eval('labels.size')==5 and now(page)==5 and page.eval('classes')==['Cat','car','dog']
        page.key('ArrowRight'); page.key('ArrowRight'); page.key('ArrowLeft')
        assert now(page)==6
        page.key(' ')
        marked = page.eval('[...marked].map(i => names[i])')
        free = page.eval('near(6).filter(i => !own(i)).map(i => names[i])')
        assert marked==free and free
        page.key(' ')
        assert page.eval('marked.size')==0
        page.key(' ')
        page.key('2')
        assert page.eval('labels.size')==6+len(marked)
        page.key('Backspace')                                              # the whole group at once
        assert page.eval('labels.size')==5 and now(page)==6
        page.key('ArrowLeft'); page.key('ArrowLeft')
        page.key('Delete')
        assert page.eval('labels.size')==4 and now(page)==4
        # a key that the focused button means is the button's
        page.eval("document.querySelector('#neighbors .thumb').focus()")
        page.key(' ')
        page.wait('marked.size===1')
        page.key('?')
        page.wait("$('about').open")
        page.key('1')
        assert page.eval('labels.size')==4 and page.ok

@needs_browser
def test_reload_goes_on(place):
    _,names,_,path = place
    with open_page(path) as page:
        page.wait(loaded)
        word(page, 'cat')
        page.key(' ')
        word(page, 'dog')
        before = shown(page),page.eval('classes'),now(page),page.text('#count')
        page.reload()
        page.wait(loaded)
        assert (shown(page),page.eval('classes'),now(page),page.text('#count'))==before and len(before[0])>2
        assert page.text('#save')=='Download ●'
        page.key('Backspace')                                              # what was done before can be undone
        assert shown(page)==[[names[0],'cat',names[0]]]
        page.eval("localStorage.setItem(data.key, '{broken')")             # what cannot be read is not taken
        page.reload()
        page.wait(loaded)
        assert shown(page)==[] and page.ok

@needs_browser
def test_another_page_has_labels_of_its_own(place, tmp_path):
    "Of the same names: from an older table, with rows for images that are not on it"
    root,names,x,path = place
    files = [root/'photos'/o for o in names]
    old = {names[20]: 'cat', 'elsewhere.png': '=dog', names[1]: 'cat'}
    other = label_page(x, files, [0,2,3], tmp_path/'b.html', root/'photos', old, {names[20]: names[1]}, ['owl','cat'])
    with open_page(path, downloads=tmp_path/'down') as page:
        page.wait(loaded)
        word(page, 'x')
        page.goto(other)
        page.wait(loaded)
        assert page.eval('classes')==['owl','cat','=dog'] and page.text('#count')=='0 of 3 labeled, 3 more images'
        page.key('1')
        labels,groups = read_labels(page.download('#save'))
        assert labels==old | {names[0]: 'owl'} and {k: v for k,v in groups.items() if k!=v}=={names[20]: names[1]}
        assert page.ok

@needs_browser
def test_nothing_runs(place, tmp_path):
    "Names and classes that are code, formulas or endless, typed and loaded, in every view; and even as markup"
    root,names,_,path = place
    classes = ['<img src=x onerror=alert(5)>', '=HYPERLINK("x")', '+1', '-1', '@x', '"quoted", and;', 'l'*300,
               '__proto__', 'new\nline', '\\u0041']
    typed = [o for o in classes if '\n' not in o]
    with open_page(path, width=390, height=800, downloads=tmp_path/'down') as page:
        page.wait(loaded)
        for o in typed:
            page.eval("$('find').focus()")
            page.send('Input.insertText', text=o)
            page.key('Enter')
        assert page.eval('labels.size')==len(typed) and page.count('img')==1
        table = page.download('#save')
        assert read_labels(table)[0]==dict(zip(names, typed))
        with open(table, newline='', encoding='utf-8') as f: rows = list(csv.reader(f))
        assert not any(cell.startswith(tuple('=+-@\t\r')) for row in rows for cell in row)
        more = dict(zip(names, classes)) | {'<svg onload=alert(6)>': '<svg onload=alert(7)>'}
        write_labels(tmp_path/'more.csv', more)
        page.choose('#file', tmp_path/'more.csv')
        page.wait("$('message').textContent.includes('not on this page')")
        assert page.eval('document.documentElement.scrollWidth')==390      # long words are cut or broken
        for i in range(n_chosen): page.eval(f'show({i})')
        for o in ('a','<','='): page.type(o)
        page.wait('performance.now()>300')
        assert page.ok and page.count('img')==1
        page.eval("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(8)>')")
        page.wait('performance.now()>600')
        assert page.dialogs==[]

@needs_browser
@pytest.mark.parametrize('text,message', [
    ('name,class\na,b\n', 'It must have the columns file and class, it has name, class.'),
    ('file,class\na.png,\n', 'It has no labels: its column class is empty.'), ('', 'It must have the columns'),
    ('file,class\na,b\na,c\n', 'It gives a two classes: b and c.'),
    ('file,class\nä,b\n'.encode('latin1'), 'It is not in UTF-8')])
def test_files_that_are_no_labels(place, tmp_path, text, message):
    (tmp_path/'l.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    with open_page(place[-1]) as page:
        page.wait(loaded)
        page.choose('#file', tmp_path/'l.csv')
        page.wait("$('message').className==='bad'")
        assert page.text('#message').startswith('l.csv cannot be taken. '+message) and page.eval('labels.size')==0

@needs_browser
def test_file_of_a_spreadsheet(place, tmp_path):
    names = place[1]
    path = tmp_path/'l.csv'
    rows = f'{names[8]}; x ;',f'{names[9]};;1',f'"{names[10]}";"a;""b""\nc";'
    path.write_bytes('\r\n'.join(['\ufefffile;class;note', *rows]).encode())
    with open_page(place[-1]) as page:
        page.wait(loaded)
        page.choose('#file', path)
        page.wait('labels.size')
        assert shown(page)==[[names[8],'x',names[8]],[names[10],'a;"b"\nc',names[10]]] and page.ok

@needs_browser
@pytest.mark.parametrize('dark', [False,True])
def test_phone(place, tmp_path, dark):
    "By touch: the field, the classes, the group, the file; no sideways scrolling, targets as large as a finger"
    _,names,_,path = place
    with open_page(path, width=390, height=844, phone=True, dark=dark, downloads=tmp_path/'down') as page:
        page.wait(loaded)
        ink = page.eval("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)[0]")
        assert ink>200 if dark else ink<60
        page.tap('#find')
        word(page, 'cat')
        page.tap('#same')
        page.wait('marked.size===6')
        page.tap('#classes .chip')
        page.wait('labels.size===8')
        page.tap('#undo')
        page.wait('labels.size===1')
        page.tap('#neighbors .thumb:nth-child(3)')
        page.wait('marked.size===1')
        page.tap('#classes .chip')
        page.wait('labels.size===3')
        assert page.eval('innerWidth')==390==page.eval('document.documentElement.scrollWidth')
        small = page.eval("""[...document.querySelectorAll('button,input')].filter(o => o.offsetParent)
            .map(o => [o.id || o.className, o.offsetWidth, o.offsetHeight]).filter(o => Math.min(o[1], o[2]) < 40)""")
        assert small==[]
        assert len(read_labels(page.download('#save'))[0])==3 and page.ok

@needs_browser
def test_what_a_blind_reader_gets(place):
    with open_page(place[-1]) as page:
        page.wait(loaded)
        word(page, 'cat')
        page.send('Accessibility.enable')
        nodes = page.send('Accessibility.getFullAXTree')['nodes']
        said = [[o.get(key, {}).get('value', '') for key in ('role','name')] for o in nodes if not o.get('ignored')]
        assert all(name for role,name in said if role in ('button','textbox','image','progressbar'))
        assert ['button','cat, 1 image'] in said and ['image',page.eval('shown(names[1])')] in said
        assert page.eval("$('said').textContent").startswith('cat. Image 2 of 12, ')

def test_images_that_are_large_small_or_alone(place, tmp_path):
    root,names,x,_ = place
    files = [root/'photos'/o for o in names]
    d = page_data(label_page(x[:1], files[:1], [0], tmp_path/'a.html', root/'photos'))
    assert d['near']==[[]] and d['n']==1
    d = page_data(label_page(x, files, [5,4], tmp_path/'a.html', root/'photos', n_neighbors=99))
    assert len(d['near'][0])==n_images-1 and sorted(d['names'])==sorted(names)

@pytest.mark.parametrize('kwargs,error', [
    (dict(n=0), 'n must be a whole number, at least 1, got 0'), (dict(n=5001), 'n must be at most 5,000, got 5001'),
    (dict(neighbors=-1), 'neighbors must be'), (dict(out='a.csv'), 'out must be a file that ends in .html'),
    (dict(classes=['a',' ']), 'classes must be names that are not empty'), (dict(method='best'), 'method must be')])
def test_wrong_arguments(kwargs, error):
    with pytest.raises(ValueError, match=error): LabelArgs('run', 'photos', **kwargs)

def test_command(place, tmp_path, command):
    root,names,*_ = place
    torch.manual_seed(0)
    save_encoder(small_encoder(n_in=3), tmp_path/'run'/'encoder.safetensors', size=16)
    page = tmp_path/'label.html'
    args = 'label',tmp_path/'run',root/'photos','-o',page,'--num-workers','0','--device','cpu'
    code,out,err = command(*args, '-n', '7', '--classes', 'cat', ' dog ', 'cat')
    assert (code,err)==(0,'') and f'Wrote {page}: 7 images to label' in out
    assert f'swav finetune {tmp_path}/run labels.csv --folder {root}/photos' in out
    d = page_data(page)
    assert d['n']==7 and d['classes']==['cat','dog'] and '<title>photos</title>' in page.read_text()
    # more than there are: all; those with labels are not asked again
    write_labels(tmp_path/'labels.csv', {names[0]: 'cat'})
    code,*_ = command(*args, '--labels', tmp_path/'labels.csv')
    d = page_data(page)
    assert d['n']==n_images-1 and names[0] not in d['names'][:d['n']] and d['labels']==[[names[0],'cat',names[0]]]
    # in the order of a list
    write_labels(tmp_path/'list.csv', dict.fromkeys(names[:4]+names[1:2], ''))
    assert label_images(tmp_path/'run', root/'photos', page, n=2, files=tmp_path/'list.csv',
                        labels=tmp_path/'labels.csv', **here)==names[1:3]
    page.unlink()
    write_labels(tmp_path/'list.csv', {'elsewhere.png': ''})
    code,_,err = command(*args, '--files', tmp_path/'list.csv')
    assert code==2 and 'are not among the images, such as elsewhere.png' in err and not page.exists()
    code,_,err = command(*args[:4], tmp_path)
    assert code==2 and 'a file that ends in .html' in err
