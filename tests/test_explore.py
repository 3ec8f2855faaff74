"The page of `swav explore`: its numbers are those of the features, and a reader can click, type, touch and be blind."
import base64, io, json, re
from urllib.parse import unquote_to_bytes, urlsplit
import numpy as np, pytest, torch
from PIL import Image
from browser import needs_browser, open_page
from helpers import small_encoder
from self_supervised_swav.checkpoints import save_encoder
from self_supervised_swav.explore import explore_images, explore_page, sheet_px, thumbnail_sheets
from self_supervised_swav.grouping import directions, group_images
from self_supervised_swav.knn import nearest_neighbors
from self_supervised_swav.label import label_images

evil = ['<img src=x onerror=alert(1)>.png', '"\'><svg onload=alert(2)>.png', '<!--<script>alert(3).png',
        'javascript:alert(4).png', '#a?b%41 c.png', 'new\nline.png', '=1+1.png']
n_images = 60

def color(i): return 4*i, 255-4*i, 37*i%256

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "60 images, each with its own color, wide, high or square; some names are code; features in three groups"
    root = tmp_path_factory.mktemp('explore')
    names = [f'{"ab"[i%2]}/{i:02}.png' for i in range(n_images-len(evil))]+evil
    for i,name in enumerate(names):
        (root/'photos'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', [(40,20),(20,40),(30,30)][i%3], color(i)).save(root/'photos'/name)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(3, 12, generator=gen).repeat_interleave(n_images//3, 0)
    x += 5+.2*torch.randn(n_images, 12, generator=gen)
    x[7] = x[3]                                                            # a pair of equal images
    files = [root/'photos'/o for o in names]
    groups = group_images(x, k=3)
    page = explore_page(x, files, root/'map.html', groups, root/'photos', title='<b>Mine</b>', projection='pca')
    return root,names,x,groups,page

def page_data(page): return json.loads(re.search('id="data">(.*?)</script>', page.read_text(), re.S)[1])
def numbers(text, dtype): return np.frombuffer(base64.b64decode(text), dtype).astype(int)

def test_numbers_of_the_page(place):
    _,names,x,groups,page = place
    d = page_data(page)
    at = [names.index(o.replace('\\n', '\n')) for o in d['names']]
    assert sorted(at)==list(range(n_images)) and d['groups']==['Group 00','Group 01','Group 02'] and d['none']==-1
    assert numbers(d['group'], '<u2').tolist()==groups.groups[at].tolist()
    np.testing.assert_allclose(numbers(d['distance'], '<u2')/32767, groups.distances[at], atol=.5/32767+1e-6)
    for g in range(3):                                                     # in a group the typical ones come first
        assert [i for i in at if groups.groups[i]==g]==groups.members(g).tolist()
    cells = {names[at[int(i)]]: cell for i,cell in d['cells'].items()}       # what goes into a table, where it differs
    assert cells=={'new\nline.png': 'new\\u000aline.png', '=1+1.png': '\\u003d1+1.png'}
    z = directions(x)[at]
    sims,idxs = nearest_neighbors(z, z, 12, own=torch.arange(n_images))
    assert numbers(d['near'], '<u2').tolist()==idxs.flatten().tolist()
    np.testing.assert_allclose(numbers(d['cosine'], 'i1')/100, sims.flatten(), atol=.005+1e-6)
    first = numbers(d['twins'], '<u2')[:2].tolist()
    assert sorted(at[i] for i in first)==[3,7] and numbers(d['twinCosine'], '<u2')[0]==10_000
    xy = numbers(d['xy'], '<u2').reshape(-1, 2)
    assert np.ptp(xy, 0).max()==65535 and np.ptp(xy, 0).min()>0

def test_thumbnails(place):
    "Each on its place, in its shape and color"
    root,names,*_ = place
    files = [root/'photos'/o for o in names]
    sheets,sizes = thumbnail_sheets(files, 128)
    cols = sheet_px//128
    assert len(sheets)==1 and sizes[:3].tolist()==[[128,64],[64,128],[128,128]]
    sheet = np.array(Image.open(io.BytesIO(base64.b64decode(sheets[0].split(',')[1]))).convert('RGB')).astype(int)
    for i,(w,h) in enumerate(sizes.tolist()):
        part = sheet[i//cols*128:,i%cols*128:][:h,:w]
        # lossy coding: the middle of a plain area is within a few of 255 levels
        assert np.abs(part[h//2-8:h//2+8,w//2-8:w//2+8].mean((0,1))-color(i)).max()<12
    sheets,_ = thumbnail_sheets(files, 255)
    assert len(sheets)==1 and thumbnail_sheets(files[:1], 8)[1].tolist()==[[8,4]]
    sheets,_ = thumbnail_sheets(files*2, 200)                              # ten in a row, a hundred on a sheet
    assert len(sheets)==2

@pytest.mark.parametrize('n_in,window', [(1,[0.,4.]), (5,None)])
def test_pages_read_images_as_their_run_does(n_in, window, tmp_path, recwarn):
    "Floats by its window, files of many channels by their mean: neither is gray"
    run,photos = tmp_path/'run',tmp_path/'photos'
    for o in (run,photos): o.mkdir()
    for i in range(4):
        if n_in==1: Image.fromarray(np.full((20,20), i, np.float32)).save(photos/f'{i}.tif')
        else: np.save(photos/f'{i}.npy', np.full((n_in,20,20), round(i*255/4), np.uint8))
    save_encoder(small_encoder(n_in), run/'encoder.safetensors', size=16, window=window)
    here = dict(num_workers=0, device='cpu')
    explore_images(run, photos, tmp_path/'map.html', groups=2, projection='pca', **here)
    label_images(run, photos, tmp_path/'label.html', n=4, neighbors=0, **here)
    assert not [o for o in recwarn if 'gray on the page' in str(o.message)]
    for name in ('map.html','label.html'):
        [sheet] = re.findall('class="sheet".*? src="data:.*?,(.*?)"', (tmp_path/name).read_text())
        row = np.array(Image.open(io.BytesIO(base64.b64decode(sheet))).convert('L')).astype(int)
        np.testing.assert_allclose(sorted(row[64,64::128]), [0,64,128,191], atol=8)  # lossy, and of 219 levels

def test_image_that_is_gone(place, tmp_path):
    "Features took long to compute: the page comes, with a gray image and a warning that names it"
    root,names,x,*_ = place
    files = [root/'photos'/o for o in names[:3]]+[tmp_path/'gone.png']
    with pytest.warns(UserWarning, match='gray on the page: .*gone.png is not a readable image'):
        page = explore_page(x[:4], files, tmp_path/'map.html', projection='pca')
    assert any(o.endswith('gone.png') for o in page_data(page)['names'])

@pytest.mark.parametrize('kwargs,error', [
    (dict(n=3), 'files must be one for each of the 2 features, got 3'), (dict(px=7), 'px must be from 8 to 255, got 7'),
    (dict(projection='map'), "method must be 'auto', 'pca' or 'umap', got 'map'")])
def test_wrong_arguments(place, tmp_path, kwargs, error):
    root,names,x,*_ = place
    n = kwargs.pop('n', 2)
    with pytest.raises(ValueError, match=error):
        explore_page(x[:2], [root/'photos'/o for o in names[:n]], tmp_path/'map.html', **kwargs)
    assert not list(tmp_path.iterdir())

def test_one_image_and_a_folder_as_file(place, tmp_path):
    root,names,x,*_ = place
    with pytest.raises(ValueError, match='files must be 2 to 65,535 images, got 1'):
        explore_page(x[:1], [root/'photos'/names[0]], tmp_path/'map.html')
    with pytest.raises(IsADirectoryError, match='out must be a file'):
        explore_page(x, [root/'photos'/o for o in names], tmp_path)

def test_no_group_and_few_images(place, tmp_path):
    "Images without a group, two images, equal images"
    root,names,x,*_ = place
    files = [root/'photos'/o for o in names]
    far = torch.cat([x, 5+torch.randn(8, 12, generator=torch.Generator().manual_seed(1))*2])
    groups = group_images(far, method='hdbscan', min_size=10)
    assert (groups.groups<0).any()
    d = page_data(explore_page(far, files+files[:8], tmp_path/'a.html', groups, root/'photos', projection='pca'))
    assert d['groups'][-1]=='No group' and d['none']==len(groups.centers)==numbers(d['group'], '<u2').max()
    d = page_data(explore_page(torch.ones(2, 4), files[:2], tmp_path/'b.html', projection='pca'))
    assert len(d['names'])==2 and d['k']==1

def test_command(place, tmp_path, command):
    root,names,*_ = place
    torch.manual_seed(0)
    save_encoder(small_encoder(n_in=3), tmp_path/'run'/'encoder.safetensors', size=16)
    args = 'explore',tmp_path/'run',root/'photos','-o',tmp_path/'map.html','--num-workers','0','--device','cpu'
    code,out,err = command(*args, '--projection', 'pca')
    assert (code,err)==(0,'') and f'{n_images} images in 5 groups; open it in a browser' in out
    assert sorted(page_data(tmp_path/'map.html')['names'])==sorted(o.replace('\n', '\\n') for o in names)
    assert '<title>photos</title>' in (tmp_path/'map.html').read_text()
    groups = explore_images(tmp_path/'run', root/'photos', tmp_path/'few.html', max_images=20, projection='pca',
                            num_workers=0, device='cpu')
    assert len(groups.groups)==20 and f'chosen at random from {n_images}' in (tmp_path/'few.html').read_text()
    code,_,err = command(*args[:4], tmp_path/'map.txt')
    assert code==2 and 'a file that ends in .html' in err

drawn = "performance.getEntriesByName('all-thumbnails').length && !frame"

def spot(page, i): return page.eval(f'[px({i}), py({i}) + map.getBoundingClientRect().top]')

@needs_browser
def test_page_with_mouse_and_keys(place, tmp_path):
    _,names,x,groups,path = place
    with open_page(path, width=1100, height=800, downloads=tmp_path/'down') as page:
        page.wait(drawn)
        assert page.text('h1')=='<b>Mine</b>' and page.count('img')==0
        assert page.eval('ctx.getImageData(0, 0, map.width, map.height).data.some(o => o)')  # something is drawn
        # a click on the most typical image of the largest group
        page.click(spot(page, 0))
        page.wait('selected===0')
        assert page.text('#image figcaption')==page.eval('names[0]') and page.count('#image .thumb')==12
        near = page.eval('[...near.slice(0, 12)].map(i => names[i])')
        assert page.eval("[...document.querySelectorAll('#image .thumb')].map(o => o.title)")==near
        assert near[0] in page.text('#said') and page.text('#image .thumb span').startswith('0.')
        page.click('#image .thumb')                                        # on to its nearest image
        page.wait(f'names[selected]==={json.dumps(near[0])}')
        # the wheel zooms about the pointer, dragging moves
        before = page.eval('({...view})')
        page.wheel([300,300], -100)
        page.wait(f"view.s>{before['s']}*1.2")
        x0 = page.eval('view.x')
        page.drag([300,300], [400,300])
        page.wait(f'Math.abs({x0}-view.x-100/view.s)<1e-6')
        chosen = page.eval('selected')
        # keys: all of it without a mouse
        page.eval('map.focus()')
        page.key('0')
        page.wait('Math.abs(view.s/fitScale-1)<1e-6')
        page.key('ArrowRight')
        page.wait(f'selected!=={chosen} && xy[2*selected]>xy[2*{chosen}]')
        page.key('Enter')
        assert page.eval("document.activeElement.className")=='thumb'
        page.eval('map.focus()')
        page.key('Escape')
        page.wait('selected===-1')
        # groups: listed, opened, let go
        page.click('#tab-groups')
        assert page.count('#groups .card')==3 and '3 groups' in page.text('#groups h2')
        page.click('#groups .card button')
        page.wait("shown && $('filter').textContent.startsWith('Group 00')")
        assert page.eval('shown.reduce((a, b) => a + b)')==int(groups.sizes[0])==page.count('#groups .thumb')
        page.click('#filter')
        page.wait('!shown')
        # search
        page.click('#find')
        page.type('onerror')
        page.wait("$('filter').textContent.startsWith('1 match')")
        page.key('Enter')
        page.wait('names[selected].includes("onerror")')
        assert page.text('#image figcaption')==evil[0] and page.count('img')==0
        page.click('#filter')
        # near-duplicates: the pair, and the table
        page.click('#tab-twins')
        page.eval("(() => { const o = $('least'); o.value = .999; o.oninput() })()")
        assert page.text('#twins h2')=='1 set of near-duplicates'
        table = page.download('#twins p button').read_text()
        assert table=='set,file\n'+''.join(f'0,"{names[i]}"\n' for i in (7,3)) or \
            table=='set,file\n'+''.join(f'0,"{names[i]}"\n' for i in (3,7))
        page.click('#help')
        page.wait("$('about').open")
        assert page.ok, (page.outside, page.errors, page.dialogs)

@needs_browser
def test_no_name_runs(place):
    "Every view of every image, and where its link leads"
    root,names,*_,path = place
    with open_page(path) as page:
        page.wait(drawn)
        links = page.eval("all.map(i => { select(i); hover(i, 9); return $('image').querySelector('a').href })")
        for o in ('groups','twins'): page.click(f'#tab-{o}')
        page.eval("data.groups.forEach((_, g) => openGroup(g))")
        page.wait('performance.now()>300')
        lead_to = [unquote_to_bytes(urlsplit(o).path).decode() for o in links]
        assert sorted(lead_to)==sorted(str(root/'photos'/o) for o in names)
        assert all(o.startswith('file:') for o in links) and page.ok
        # and even if a name became markup, the page's policy would not let it run
        page.eval("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(5)>')")
        page.wait('performance.now()>600')
        assert page.dialogs==[]

@needs_browser
@pytest.mark.parametrize('dark', [False,True])
def test_page_on_a_phone(place, dark):
    with open_page(place[-1], width=390, height=800, phone=True, dark=dark) as page:
        page.wait(drawn)
        assert page.eval('innerWidth')==390==page.eval('document.documentElement.scrollWidth')
        ink = page.eval("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)[0]")
        assert ink>200 if dark else ink<60
        i = page.eval('''all.filter(i => isThumb(i, 0)).sort((a, b) => Math.hypot(px(a)-width/2, py(a)-height/2) -
            Math.hypot(px(b)-width/2, py(b)-height/2))[0]''')              # one in the middle, with room for fingers
        x,y = spot(page, i)
        points = lambda d: [dict(x=x-d, y=y, id=0),dict(x=x+d, y=y, id=1)]
        s,at = page.eval('view.s'),page.eval(f'[px({i}), py({i})]')
        page.send('Input.dispatchTouchEvent', type='touchStart', touchPoints=points(30))
        for d in (40,50,60): page.send('Input.dispatchTouchEvent', type='touchMove', touchPoints=points(d))
        page.send('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])
        # twice as far apart is twice the zoom, about the middle of the two fingers
        assert abs(page.eval('view.s')/s-2)<.02 and selected(page)==-1
        assert max(abs(a-b) for a,b in zip(page.eval(f'[px({i}), py({i})]'), at))<2
        page.send('Input.dispatchTouchEvent', type='touchStart', touchPoints=points(0)[:1])
        page.send('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])
        page.wait(f'selected==={i}')
        page.tap('#tab-groups')
        page.wait("!$('groups').hidden")
        assert page.ok

def selected(page): return page.eval('selected')

@needs_browser
def test_what_a_blind_reader_gets(place):
    "Names and roles as the browser gives them to a screen reader; the text is there without the map"
    with open_page(place[-1]) as page:
        page.wait(drawn)
        page.click('#tab-groups')
        page.send('Accessibility.enable')
        nodes = page.send('Accessibility.getFullAXTree')['nodes']
        said = [[o.get(key, {}).get('value', '') for key in ('role','name')] for o in nodes if not o.get('ignored')]
        assert ['application',f'Map of {n_images} images in 3 groups'] in said
        assert all(name for role,name in said if role in ('button','tab','link','searchbox','slider','combobox'))
        heads = [name for role,name in said if role=='heading']
        assert heads[0]=='<b>Mine</b>' and sum(o.startswith('Group 0') for o in heads)==3
        assert sum(role=='button' and '.png' in name for role,name in said)==3*9
        page.eval('map.focus()')
        page.key('ArrowDown')
        page.wait("/^.*png. Group 0\\d, \\d+ of \\d+. Most similar: .*png.$/.test($('said').textContent)")

def synthetic(fn, px):
    "Something as hard to encode as a photograph"
    rng = np.random.default_rng(int(fn.stem))
    x = Image.fromarray(rng.integers(0, 256, (6,6,3), dtype=np.uint8)).resize((px,px), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(x)+rng.integers(-12, 12, (px,px,3))).clip(0, 255).astype(np.uint8))

@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize('n,most', [(300,3e6), (20_000,60e6)])
def test_first_picture_within_three_seconds(tmp_path, monkeypatch, n, most):
    from self_supervised_swav import explore
    monkeypatch.setattr(explore, 'thumbnail', synthetic)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=gen)[torch.arange(n)%40]+.7*torch.randn(n, 64, generator=gen)
    path = explore_page(x, [tmp_path/f'{i}.jpg' for i in range(n)], tmp_path/'map.html', projection='pca')
    with open_page(path, seconds=60) as page:
        page.wait("performance.getEntriesByName('all-thumbnails').length", 60)
        times = {o: page.eval(f"performance.getEntriesByName('{o}')[0].startTime/1e3")
                 for o in ('map','thumbnails','all-thumbnails')}
        start = page.eval('performance.now()')
        page.eval('''new Promise(done => { let i = 0; const step = () => {
            zoom(i < 20 ? 1.1 : .9); draw(); ++i < 40 ? requestAnimationFrame(step) : done() }; step() })''')
        frame = (page.eval('performance.now()')-start)/40
        print(f'\n{n} images: {path.stat().st_size/1e6:.1f} MB; {times} s; {frame:.0f} ms a frame while zooming')
        assert times['thumbnails']<3 and page.ok and path.stat().st_size<most
