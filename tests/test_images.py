"Files that real folders hold: each test fails where such a file is read silently wrong, twice, or not at all"
import csv, os, struct, sys, warnings, zlib
import numpy as np, pytest, torch
from pathlib import Path
from PIL import Image, ImageOps
from helpers import words_for
from self_supervised_swav import report
from self_supervised_swav.data import check_images, find_images, image_stats, swav_dls, write_bad_files
from self_supervised_swav.images import (check_color_name, csv_name, duplicate_groups, escape_name, image_files,
                                         image_info, read_channels, read_image, unescape_name)
from self_supervised_swav.sources import ImageSource

rng = np.random.default_rng(0)
ramp = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
in_8_bits = (ramp/257).round().astype(np.uint8)  # 65535 = 257*255

def save_noise(fn, size=(16, 12)):
    fn.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(fn)
    return fn

def write_tiff(fn, a, **kw):
    tifffile = pytest.importorskip('tifffile')
    tifffile.imwrite(fn, a, **kw)
    return fn

# 16 bits, floats, channels
@pytest.mark.parametrize('ext', ['png', 'tif', 'pgm', 'jp2'])
def test_16_bits_are_scaled_by_their_range(tmp_path, ext):
    fn = tmp_path/f'a.{ext}'
    Image.fromarray(ramp).save(fn)
    got = np.asarray(read_image(fn, 'L')).astype(int)
    if ext=='jp2': assert abs(got-in_8_bits).max() <= 8  # a lossy format
    else: assert (got == in_8_bits).all()
    assert (np.asarray(read_image(fn))[..., 1] == got).all(), 'color from gray'

@pytest.mark.parametrize('kw,want', [(dict(byteorder='>'), in_8_bits), (dict(photometric='miniswhite'), 255-in_8_bits)])
def test_16_bit_tiff_of_other_kinds(tmp_path, kw, want):
    assert (np.asarray(read_image(write_tiff(tmp_path/'a.tif', ramp, **kw), 'L')) == want).all()

@pytest.mark.parametrize('kind', ['II*\0','MM\0*'])
@pytest.mark.parametrize('entries,back', [(4096,False), (0,True)])
def test_tiff_directories_without_an_end(tmp_path, kind, entries, back):
    "More entries than bytes, or a directory that follows itself: readers would take minutes for 26 bytes"
    order = '<' if kind[0]=='I' else '>'
    data = kind.encode()+struct.pack(order+'IHI', 8, entries, 8 if back else 0)+bytes(12)
    (tmp_path/'a.tif').write_bytes(data)
    for read in (image_info,read_image):
        with pytest.raises(ValueError, match='more entries than it has bytes'): read(tmp_path/'a.tif')

def test_images_without_pixels(tmp_path):
    np.save(tmp_path/'a.npy', np.zeros((0,10**9), np.uint8))
    for read in (image_info,read_image):
        with pytest.raises(ValueError, match='an image has pixels'): read(tmp_path/'a.npy')

def test_12_bit_tiff(tmp_path):
    "Two pixels in three bytes: 0 and 4095"
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    ifd = struct.pack('<H', len(entries))+b''.join(struct.pack('<HHII', t, 4, 1, v) for t, v in entries)+bytes(4)
    (tmp_path/'a.tif').write_bytes(b'II*\0'+struct.pack('<I', 12)+bytes([0x00, 0x0f, 0xff, 0])+ifd)
    assert np.asarray(read_image(tmp_path/'a.tif', 'L')).tolist() == [[0, 255]]

def test_window(tmp_path):
    Image.fromarray(ramp).save(tmp_path/'a.png')
    got = np.asarray(read_image(tmp_path/'a.png', 'L', window=(10_000, 20_000)))
    want = (np.clip((ramp.astype(float)-10_000)/10_000, 0, 1)*255)
    assert abs(got-want).max() <= .51  # rounded to 8 bits

def test_dark_16_bits_are_told(tmp_path):
    for i in range(4): Image.fromarray(ramp//16+np.uint16(i)).save(tmp_path/f'{i}.png')
    with pytest.warns(UserWarning, match=r'4 images of 16 bits use 6% of their range .*window=\(low, high\)'):
        swav_dls(tmp_path, size=8, bs=2, n_in=1, num_workers=0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        x = swav_dls(tmp_path, size=6, bs=2, n_in=1, window=(0, 4098), num_workers=0).one_batch()[0]
    assert x.max() > .9

def test_floats_need_a_window(tmp_path):
    a = np.linspace(-3, 5, 48, dtype=np.float32).reshape(6, 8)
    for i in range(3): Image.fromarray(a+i/100).save(tmp_path/f'{i}.tif')
    with pytest.raises(ValueError, match=r'0.tif \(its float32 values from -3 to 5 have no fixed range.*window='):
        swav_dls(tmp_path, size=8, bs=2)
    x = swav_dls(tmp_path, size=(6, 8), bs=2, n_in=1, valid_pct=0, window=(-3, 5.02), num_workers=0).one_batch()[0]
    assert x.min() == 0 and x.max() >= .99
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path/'0.tif')
    with pytest.raises(ValueError, match='some of its values are not finite'): swav_dls(tmp_path, window=(0, 1))

@pytest.mark.parametrize('n_in', [2, 5])
@pytest.mark.parametrize('kind', ['npy', 'npy first', 'tif'])
def test_any_number_of_channels(tmp_path, n_in, kind):
    for i in range(6):
        a = rng.integers(0, 65536, (n_in, 20, 30)).astype(np.uint16)
        a[0] = 65535
        if kind=='tif': write_tiff(tmp_path/f'{i}.tif', a, photometric='minisblack')
        else: np.save(tmp_path/f'{i}.npy', a if kind=='npy first' else a.transpose(1, 2, 0))
    assert image_info(next(tmp_path.iterdir()))[:3] == (30, 20, n_in)
    dls = swav_dls(tmp_path, size=(16, 24), bs=2, n_in=n_in, num_workers=0)
    x = dls.one_batch()[0]
    assert x.shape == (2, n_in, 16, 24) and (x[:, 0]-1).abs().max() < 1e-5 and .3 < x[:, 1].mean() < .7
    dls.show_batch()
    with pytest.raises(ValueError, match=f'it has {n_in} channels, n_in is 3'): swav_dls(tmp_path)

def test_channels_are_the_values(tmp_path):
    a = rng.integers(0, 65536, (5, 8, 6)).astype(np.uint16)
    np.save(tmp_path/'a.npy', a)
    torch.testing.assert_close(read_channels(tmp_path/'a.npy', 5), torch.tensor(a/65535, dtype=torch.float32),
                               atol=2**-23, rtol=0)  # one rounding of a quotient below 1

def test_a_stack_of_color_pages_is_refused(tmp_path):
    ims = [Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)) for _ in range(3)]
    ims[0].save(tmp_path/'a.tif', save_all=True, append_images=ims[1:])
    pytest.importorskip('tifffile')
    assert 'it holds an array of shape (3, 8, 9, 3)' in check_images([tmp_path/'a.tif'])[tmp_path/'a.tif']

def test_stats_are_those_of_the_images(tmp_path):
    for i in range(5): np.save(tmp_path/f'{i}.npy', np.stack([np.full((8, 8), 100*i), rng.integers(0, 256, (8, 8))],
                                                             -1).astype(np.uint8))
    dls = swav_dls(tmp_path, size=8, bs=2, valid_pct=0, n_in=2, num_workers=0)
    x = torch.stack([dls.train_ds[i][0].as_subclass(torch.Tensor) for i in range(5)]).double()
    for got, want in zip(image_stats(dls.train), (x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0))):
        torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, atol=1e-9, rtol=0)

# links and copies
def test_links(tmp_path):
    "A link to the folder's own parent, links within it and out of it: each file once, nothing from outside"
    root, out = tmp_path/'in', tmp_path/'out'
    for i in range(5): save_noise(root/'deep'/f'{i}.png')
    for i in range(3): save_noise(out/f'{i}.png')
    (root/'deep'/'up').symlink_to(root)
    (root/'again').symlink_to(root/'deep')
    (root/'one.png').symlink_to(root/'deep'/'0.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert image_files(root) == [root/'deep'/f'{i}.png' for i in range(5)]
    (root/'outside').symlink_to(out)
    (root/'z.png').symlink_to(out/'0.png')
    with pytest.warns(UserWarning, match='2 symbolic links out of .*follow_links=True'):
        assert len(image_files(root)) == 5
    files = image_files(root, follow_links=True)
    assert len(files) == 8 and len({os.path.realpath(o) for o in files}) == 8
    link = tmp_path/'link'
    link.symlink_to(root)
    with pytest.warns(UserWarning): assert len(image_files(link)) == 5

def test_copies_stay_on_one_side(tmp_path):
    for i in range(30): save_noise(tmp_path/f'{i:02}.png')
    for i in range(0, 30, 3): (tmp_path/f'copy{i}.png').write_bytes((tmp_path/f'{i:02}.png').read_bytes())
    (tmp_path/'gone.png').symlink_to(tmp_path/'nothing.png')
    groups = duplicate_groups(sorted(tmp_path.iterdir()))
    assert sorted(sorted(o.name for o in g) for g in groups) == [
        [f'{i:02}.png', f'copy{i}.png'] for i in range(0, 30, 3)]
    (tmp_path/'gone.png').unlink()
    with pytest.warns(UserWarning, match='10 of 40 files are copies of another: .* and 7 more'):
        dls = swav_dls(tmp_path, size=8, bs=2, valid_pct=.4, num_workers=0)
    sides = [{o.read_bytes() for o in dl.items} for dl in dls]
    assert not sides[0] & sides[1] and sum(len(dl.items) for dl in dls) == 40
    with pytest.warns(UserWarning, match='are copies'): source = ImageSource(tmp_path, .4)
    sides = [{source.files[i].read_bytes() for i in part} for part in source.splits]
    assert not sides[0] & sides[1] and all(sides)

def test_large_files_that_begin_alike(tmp_path):
    for i, end in enumerate(b'aab'): (tmp_path/f'{i}.bin').write_bytes(bytes(20_000)+bytes([end]))
    assert [[o.name for o in g] for g in duplicate_groups(sorted(tmp_path.iterdir()))] == [['0.bin', '1.bin']]

# names
@pytest.mark.parametrize('name', ['a.png', 'new\nline.png', 'r\r\t.png', 'b\\n.png', os.fsdecode(b'\xe9\xff.png'),
                                  '=1+1.png', '-x.png', '@x.png', '+x.png', 'ü 🙂\u2028.png', '"a", b.png', '\\=a'])
def test_names_come_back(name):
    for f in (escape_name, csv_name):
        text = f(name)
        assert unescape_name(text) == name and text.isprintable() and text.encode()
    assert not csv_name(name).startswith(tuple('=+-@\t\r'))

def test_bad_files(tmp_path):
    "All of them in a list, a line each, and named in one line"
    save_noise(tmp_path/'good.png'), save_noise(tmp_path/'good2.png')
    bad = [tmp_path/nm for nm in ('a\nb.png', os.fsdecode(b'\xe9.png'), *(f'{i}.jpg' for i in range(6)))]
    for o in bad: o.write_text('text')
    with pytest.raises(ValueError, match=r'8 of 10 files are not readable images: .* and 3 more') as e:
        find_images(tmp_path)
    assert '\n' not in str(e.value) and str(e.value).encode()
    write_bad_files(check_images(sorted(tmp_path.iterdir())), tmp_path/'bad_files.txt')
    lines = (tmp_path/'bad_files.txt').read_text(encoding='utf-8').splitlines()
    assert {unescape_name(o.split('\t')[0]) for o in lines} == set(map(str, bad))
    with pytest.warns(UserWarning, match='skipped: 8 of 10'): source = ImageSource(tmp_path, 0., skip_bad=True)
    assert set(source.bad) == set(bad) and len(source.files) == 2

def test_only_what_is_used_is_looked_at(tmp_path):
    for i in range(20): save_noise(tmp_path/f'{i:02}.png')
    used = {*ImageSource(tmp_path, 0., n_images=5).files}
    assert len(used) == 5
    for o in tmp_path.iterdir():
        if o not in used: o.write_text('broken')
    assert {*ImageSource(tmp_path, 0., n_images=5).files} == used

# orientation, transparency, bombs
@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('ext', ['jpg', 'png', 'webp', 'tif'])
def test_orientation(tmp_path, orientation, ext):
    a = np.zeros((32, 64, 3), np.uint8)
    a[:16, :16], a[:16, 48:] = (255, 0, 0), (0, 255, 0)
    im, exif = Image.fromarray(a), Image.Exif()
    exif[274] = orientation
    im.save(tmp_path/f'a.{ext}', exif=exif, **dict(quality=95) if ext in ('jpg', 'webp') else {})
    with Image.open(tmp_path/f'a.{ext}') as o: want = ImageOps.exif_transpose(o).convert('RGB')
    got = read_image(tmp_path/f'a.{ext}')
    assert got.size == want.size == image_info(tmp_path/f'a.{ext}')[:2] and np.array_equal(got, want)

def test_a_turned_jpeg_is_decoded_no_smaller_than_needed(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (800, 400)).save(tmp_path/'a.jpg', exif=exif)
    assert read_image(tmp_path/'a.jpg', min_size=(100, 200)).size == (100, 200)
    assert read_image(tmp_path/'a.jpg', min_size=(101, 200)).size == (200, 400)

@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'L', 'RGB'])
def test_transparency(tmp_path, mode):
    "Half is transparent, half is opaque"
    if mode in ('RGBA', 'LA'):
        a = np.zeros((4, 4, len(mode)), np.uint8)
        a[:, 2:, -1] = 255
        Image.fromarray(a, mode).save(tmp_path/'a.png')
    else:
        im = Image.new(mode, (4, 4), 1 if mode != 'RGB' else (1, 1, 1))
        if mode == 'P': im.putpalette([9, 9, 9, 0, 0, 0])
        im.paste(0 if mode != 'RGB' else (0, 0, 0), (0, 0, 2, 4))
        if mode == 'P': im.putpalette([9, 9, 9, 0, 0, 0]*1)
        im.save(tmp_path/'a.png', transparency=(0, 0, 0) if mode == 'RGB' else 0)
    for background, want in (('white', 255), ('#808080', 128)):
        got = np.asarray(read_image(tmp_path/'a.png', background=background))
        assert (got[:, :2] == want).all() and (got[:, 2:] <= 1).all()

def test_half_transparent(tmp_path):
    Image.new('RGBA', (2, 2), (0, 0, 0, 128)).save(tmp_path/'a.png')
    assert abs(read_image(tmp_path/'a.png', 'L').getpixel((0, 0))-127) <= 1  # 255*(1-128/255)

@pytest.mark.parametrize('color', ['nocolor', (1, 2), (1, 2, 300), 5])
def test_background_errors(tmp_path, color):
    with pytest.raises(ValueError, match='background must be a color such as'): check_color_name(color)

def png_that_claims(w, h):
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    return (b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 0, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(100)))+chunk(b'IEND', b''))

def test_bombs_are_bad_files(tmp_path):
    (tmp_path/'bomb.png').write_bytes(png_that_claims(60_000, 60_000))
    np.lib.format.open_memmap(tmp_path/'bomb.npy', 'w+', np.uint8, (60_000, 10_000))  # a sparse file
    said = check_images([tmp_path/'bomb.png', tmp_path/'bomb.npy'])
    assert len(said) == 2 and all('Bomb' in o and 'exceed' in o for o in said.values())

def test_pickles_are_not_read(tmp_path):
    np.save(tmp_path/'a.npy', np.array([{}, []], dtype=object), allow_pickle=True)
    assert tmp_path/'a.npy' in check_images([tmp_path/'a.npy'])

@pytest.mark.filterwarnings('ignore')
def test_from_five_channels_to_features(tmp_path, monkeypatch):
    "Pretrain, load and embed know channels, window and statistics; names of every kind come out as a table"
    from self_supervised_swav.checkpoints import load_encoder
    from self_supervised_swav.embed import embed_images
    from self_supervised_swav.runs import PretrainRun
    monkeypatch.setattr(report, '_figure', words_for)
    images = tmp_path/'images'
    images.mkdir()
    names = [*(f'{i}.npy' for i in range(10)), '=1+1.npy', 'two\nlines.npy', os.fsdecode(b'\xe9.npy')]
    for nm in names:
        np.save(images/nm, rng.normal(100, 30, (24, 24, 5)).astype(np.float32)*np.arange(1, 6, dtype=np.float32))
    run = PretrainRun(images, tmp_path/'run', epochs=1, size=24, bs=4, window=(0, 1000), num_workers=0, device='cpu',
                      valid_pct=.1, settings=['n_protos=8', 'crop_sizes=(16,8)', 'num_crops=(2,1)']).fit()
    assert (tmp_path/'run'/'report.html').exists()
    run.learn.swav.show()
    settings = load_encoder(tmp_path/'run'/'encoder.safetensors').settings
    mean = torch.tensor(settings['stats'][0])
    assert settings['args']['n_in'] == 5 and settings['window'] == [0, 1000]
    # means of 100 to 500 in a window of 1000, from 12 images of 576 pixels with a standard deviation up to 0.15
    torch.testing.assert_close(mean, torch.arange(1, 6)/10, atol=6*.15/(12*576)**.5, rtol=0)
    n, d = embed_images(tmp_path/'run', images, tmp_path/'features.npy', num_workers=0, device='cpu')
    with open(tmp_path/'features.csv', newline='', encoding='utf-8') as f: rows = list(csv.reader(f))
    assert rows[0] == ['file', 'row'] and n == 13 == len(np.load(tmp_path/'features.npy'))
    assert sorted(unescape_name(o) for o, _ in rows[1:]) == sorted(names)
    assert [int(o) for _, o in rows[1:]] == list(range(13)) and not any(o.startswith('=') for o, _ in rows)
    # all in one table: the numbers read back as the same float32
    embed_images(tmp_path/'run', images, tmp_path/'table.csv', num_workers=0, device='cpu')
    with open(tmp_path/'table.csv', newline='', encoding='utf-8') as f: table = list(csv.reader(f))
    assert table[0] == ['file', *(f'feature_{i}' for i in range(d))]
    assert [o for o, *_ in table[1:]] == [o for o, _ in rows[1:]]
    assert np.array_equal(np.array([r[1:] for r in table[1:]], dtype=np.float32), np.load(tmp_path/'features.npy'))

# --- kinds of files ---------------------------------------------------------------------------------------------------
def blocks():
    colors = np.uint8([[[250,0,0],[0,250,0],[0,0,250]]]*2)
    return Image.fromarray(np.kron(colors, np.ones((16,16,1), np.uint8)))

@pytest.mark.parametrize('name', ['a.heic','a.HEIF','a.jpg'])
def test_photographs_of_iphones(tmp_path, name):
    "By what they hold, whatever they are called"
    heif = pytest.importorskip('pillow_heif')
    heif.from_pillow(blocks()).save(tmp_path/'x.heic', quality=90)
    (tmp_path/'x.heic').rename(tmp_path/name)
    assert image_info(tmp_path/name)[:3]==(48,32,3)
    got = np.asarray(read_image(tmp_path/name), int)[4:28,[8,24,40]]
    # centers of even blocks, after YCbCr of half the size and a quantization of quality 90: 250 stays above 200
    assert (got.argmax(-1)==[0,1,2]).all() and (got.max(-1)>200).all() and (np.sort(got, -1)[...,:2]<50).all()

def test_heif_without_its_package(tmp_path, monkeypatch):
    (tmp_path/'a.heic').write_bytes(b'\0\0\0\x1cftypheic'+bytes(40))
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    monkeypatch.delitem(Image.OPEN, 'HEIF', raising=False)
    [why] = check_images([tmp_path/'a.heic']).values()
    assert why=='it is a HEIF photograph: pip install pillow-heif to read it'

def test_names_do_not_depend_on_the_machine(tmp_path, monkeypatch):
    "`mimetypes` knows other names on other systems; WebP was none of them before Python 3.13"
    import mimetypes
    monkeypatch.setattr(mimetypes, 'types_map', {})
    for o in ('a.webp','b.JPEG','c.tiff','d.npy','e.heic','f.svg','g.txt','h','i.hdr'): (tmp_path/o).touch()
    assert [o.name for o in image_files(tmp_path)]==['a.webp','b.JPEG','c.tiff','e.heic','f.svg']

def test_every_kind_that_pillow_reads(tmp_path):
    "What is written under a usual name is found and read"
    n = 0
    for ext in 'png jpg webp gif bmp tif avif jp2 ppm tga pcx ico dds qoi sgi xbm jfif'.split():
        im = blocks() if ext!='xbm' else blocks().convert('1')
        try: im.save(tmp_path/f'a.{ext}')
        except (KeyError,OSError,ValueError): continue  # this Pillow cannot write it
        assert read_image(tmp_path/f'a.{ext}').size==Image.open(tmp_path/f'a.{ext}').size, ext
        n += 1
    assert n>10 and len(image_files(tmp_path))==n and not check_images(image_files(tmp_path))

@pytest.mark.parametrize('name', ['a.png','a.eps'])
def test_no_program_is_started_for_an_image(tmp_path, monkeypatch, name):
    "Pillow hands PostScript to Ghostscript"
    import subprocess
    def started(*args, **kwargs): raise AssertionError('a program was started')
    for o in ('Popen','run','check_call','check_output','call'): monkeypatch.setattr(subprocess, o, started)
    (tmp_path/name).write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
    why = check_images([tmp_path/name])[tmp_path/name]
    assert why==('its content is not that of an image' if name=='a.png' else 'it is a vector drawing: save it as PNG')

real = Path('/usr/share/openclipart/png')
@pytest.mark.skipif(not real.exists(), reason="needs Debian's package openclipart-png")
def test_real_drawings():
    files = image_files(real)[::200]
    assert not check_images(files)
    assert all(read_image(o).mode == 'RGB' for o in files[:10])
