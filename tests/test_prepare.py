"swav prepare: what is in the shards, and that a stop loses at most one"
import io, json, os, signal, subprocess, sys, time
import numpy as np, pytest
from PIL import Image

from self_supervised_swav.data import swav_dls
from self_supervised_swav.images import StoredImage, read_channels, read_image
from self_supervised_swav.prepare import pack_image, prepare_shards, shard_keys
from self_supervised_swav.shards import Shards
from self_supervised_swav.sources import ImageSource


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))

def photo(seed, size=(60,40), mode='RGB'):
    "A smooth random picture"
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 255, (5,6,3), dtype=np.uint8)
    return Image.fromarray(a).resize(size, Image.Resampling.BICUBIC).convert(mode)

def stored(im, name='x.png', **kwargs):
    f = io.BytesIO()
    im.save(f, {'jpg': 'jpeg', 'tif': 'tiff'}.get(name[-3:], name[-3:]), **kwargs)
    return StoredImage(name, f.getvalue())

def image_of(packed): return StoredImage(f'x.{packed.ext}', packed.data)

def folder_of(path, n=9, size=(60,40)):
    for i in range(n):
        (path/f'{"ab"[i%2]}').mkdir(parents=True, exist_ok=True)
        photo(i, size).save(path/f'{"ab"[i%2]}'/f'{i}.jpg')
    return path

@pytest.mark.parametrize('w,h,size,to', [(60,40,20,(30,20)), (40,60,20,(20,30)), (60,40,40,(60,40)),
                                         (60,40,256,(60,40)), (1000,10,5,(500,5)), (7,1000,3,(3,429)),
                                         (1,300,1,(1,300))])
def test_sizes(w, h, size, to):
    o = pack_image(stored(photo(0, (w,h))), size)
    assert (o.width,o.height) == to == read_image(image_of(o)).size

def test_bytes_that_need_no_change():
    for name in ('x.png','x.jpg'):
        o = stored(photo(0), name)
        assert pack_image(o, 40).data == o.data
        assert pack_image(o, 39).data != o.data
    o = stored(photo(0), 'x.jpg')
    assert pack_image(StoredImage('called.png', o.data), 40)[:2] == ('jpg',o.data)  # by its content, not its name

@pytest.mark.parametrize('turn', range(2, 9))
def test_turned_upright(turn):
    im = photo(1)
    exif = im.getexif()
    exif[274] = turn
    o = stored(im, 'x.jpg', exif=exif, quality=95)
    packed = pack_image(o, 256)
    a,b = (np.asarray(read_image(x)).astype(float) for x in (o,image_of(packed)))
    # two roundings of JPEG, at 95 and 90: some levels on a smooth picture, while a wrong turn moves tens
    assert a.shape == b.shape and np.abs(a-b).mean() < 4
    assert Image.open(io.BytesIO(packed.data)).getexif().get(274, 1) == 1

def test_other_formats_become_jpeg():
    for name in ('x.bmp','x.gif','x.tif'):
        o = pack_image(stored(photo(2), name), 256)
        assert o.ext == 'jpg' and o.channels == 3
    gray = pack_image(stored(photo(2, mode='L'), 'x.bmp'), 20)
    assert gray.ext == 'jpg' and gray.channels == 1 and Image.open(io.BytesIO(gray.data)).mode == 'L'

def test_transparency_is_kept():
    im = photo(3, mode='RGBA')
    im.putalpha(Image.new('L', im.size, 0))
    o = pack_image(stored(im), 20)
    assert o.ext == 'png' and read_image(image_of(o), background='red').getpixel((5,5)) == (255,0,0)
    im.putalpha(255)
    assert pack_image(stored(im), 20).ext == 'jpg'  # nothing is transparent

def test_sixteen_bits_are_kept():
    a = (np.random.default_rng(0).random((40,60))*65535).astype(np.uint16)
    o = pack_image(stored(Image.fromarray(a)), 20)
    b = np.asarray(Image.open(io.BytesIO(o.data)))
    assert o.ext == 'png' and b.shape == (20,30) and b.dtype.itemsize > 1
    assert abs(b.mean()-a.mean()) < .02*65535  # 1,200 pixels of deviation .29/2 have a mean within .012 (3 sigma)
    assert b.max() > 256

def test_arrays_are_packed_as_they_are(tmp_path):
    a = np.random.default_rng(0).integers(0, 4000, (30,20,5)).astype(np.uint16)
    np.save(tmp_path/'a.npy', a)
    o = pack_image(tmp_path/'a.npy', 8)
    assert o.data == (tmp_path/'a.npy').read_bytes() and o.channels == 5 and o.sums is None
    assert read_channels(image_of(o), 5).shape == (5,30,20)
    np.save(tmp_path/'b.npy', a.astype(np.float32)*np.nan)
    with pytest.raises(ValueError, match='not finite'): pack_image(tmp_path/'b.npy', 8)

def test_statistics(tmp_path, capsys):
    "Mean and deviation of all colors, of pixels that PNG keeps as they are, to the 4 digits that are written"
    for i in range(9): (tmp_path/'photos').mkdir(exist_ok=True) or photo(i, (30,20)).save(tmp_path/'photos'/f'{i}.png')
    about = prepare_shards(tmp_path/'photos', tmp_path/'out', size=20, per_shard=4)
    assert about == json.loads((tmp_path/'out'/'shards.json').read_text())
    x = np.concatenate([np.asarray(read_image(o)).reshape(-1, 3) for o in Shards(tmp_path/'out')])/255
    assert np.abs(x.mean(0)-about['mean']).max() < 6e-5 and np.abs(x.std(0)-about['std']).max() < 6e-5
    assert (about['images'],about['bad'],about['copies'],about['formats']) == (9,0,0,{'png': 9})
    assert about['shorter_side'] == dict(least=20, median=20, most=20) and about['bytes'] == sum(
        o.stat().st_size for o in (tmp_path/'out').glob('*.tar'))
    assert 'shard-000002.tar: 1 image, ' in capsys.readouterr().out

def test_labels_keys_and_order(tmp_path):
    source = folder_of(tmp_path/'photos', 40)
    prepare_shards(source, tmp_path/'out', size=20, per_shard=30, labels_from_folders=True)
    s = Shards(tmp_path/'out')
    assert s.vocab == ['a','b'] and all(s.class_of(o.i) == o.key[0] for o in s)
    assert sorted(o.key for o in s) == sorted(f'{"ab"[i%2]}/{i}' for i in range(40))
    assert [o.key for o in s] != sorted(o.key for o in s)
    rows = (tmp_path/'out'/'keys.csv').read_text().split()
    assert rows[0] == 'key,file,shard' and rows[1] == f'{s[0].key},{s[0].key}.jpg,shard-000000.tar' and len(rows) == 41
    images = ImageSource(tmp_path/'out')
    assert images.vocab == ['a','b'] and (images.size,images.n_in) == (20,3) and len(images.splits[1]) == 8

def test_keys():
    from pathlib import Path
    root = Path('r')
    names = ['a.jpg','a.png','b.c.jpg','b_c.jpg','d.e/f.jpg','x-jpg.jpg','x.jpg','x.png']
    keys = shard_keys([root/o for o in names], root)
    assert keys == ['a-jpg','a-png','b_c-jpg','b_c-jpg-2','d.e/f','x-jpg','x-jpg-2','x-png'] or len(set(keys)) == 8
    assert len(set(keys)) == 8 and not any('.' in o.rsplit('/')[-1] for o in keys)

def test_bad_files(tmp_path):
    source = folder_of(tmp_path/'photos')
    (source/'a'/'bad.jpg').write_bytes(b'no image')
    (source/'a'/'cut.jpg').write_bytes((source/'a'/'0.jpg').read_bytes()[:400])
    with pytest.raises(ValueError, match=r'2 files of this shard cannot be read as images: .*Pass skip_bad=True'):
        prepare_shards(source, tmp_path/'out')
    assert not list((tmp_path/'out').glob('*.tar*'))
    with pytest.raises(ValueError, match='is not finished: repeat its swav prepare'): Shards(tmp_path/'out')
    about = prepare_shards(source, tmp_path/'out', skip_bad=True)
    assert (about['images'],about['bad']) == (9,2)
    assert sorted(o.split('\t')[0] for o in (tmp_path/'out'/'bad_files.txt').read_text().splitlines()) == [
        str(source/'a'/'bad.jpg'),str(source/'a'/'cut.jpg')]

def test_refused(tmp_path):
    source = folder_of(tmp_path/'photos')
    for kwargs,said in ((dict(quality=101),'quality must be at most 100'), (dict(size=0),'size must be a whole number'),
                        (dict(per_shard=0),'per_shard'), (dict(num_workers=0),'num_workers')):
        with pytest.raises(ValueError, match=said): prepare_shards(source, tmp_path/'out', **kwargs)
    with pytest.raises(ValueError, match='must be another folder'): prepare_shards(source, source)
    with pytest.raises(ValueError, match='is none'): prepare_shards(tmp_path/'nothing', tmp_path/'out')
    (tmp_path/'full').mkdir()
    (tmp_path/'full'/'mine.tar').write_bytes(b'')
    with pytest.raises(FileExistsError, match='holds mine.tar and no shards.json'):
        prepare_shards(source, tmp_path/'full')
    photo(0).save(source/'top.jpg')
    with pytest.raises(ValueError, match='top.jpg is in none'):
        prepare_shards(source, tmp_path/'out', labels_from_folders=True)
    assert not (tmp_path/'out').exists()

def test_other_settings_or_files_are_refused(tmp_path):
    source = folder_of(tmp_path/'photos')
    prepare_shards(source, tmp_path/'out', size=20)
    with pytest.raises(ValueError, match='size is 20 there, 30 here'): prepare_shards(source, tmp_path/'out', size=30)
    photo(0).save(source/'a'/'new.jpg')
    with pytest.raises(ValueError, match='holds other files now'): prepare_shards(source, tmp_path/'out', size=20)

def contents(folder): return {o.name: o.read_bytes() for o in sorted(folder.glob('*.tar'))}

def test_a_lost_shard_is_written_again(tmp_path):
    source,out = folder_of(tmp_path/'photos'),tmp_path/'out'
    prepare_shards(source, out, size=20, per_shard=3)
    whole = contents(out)
    (out/'shard-000001.tar').unlink()
    (out/'shard-000002.tar').write_bytes(whole['shard-000002.tar'][:-600])
    prepare_shards(source, out, size=20, per_shard=3)
    assert contents(out) == whole

@pytest.mark.parametrize('signum', [signal.SIGKILL, signal.SIGINT])
@pytest.mark.slow
def test_a_stop_loses_at_most_a_shard(tmp_path, signum):
    "Killed as soon as the second shard is there; the same command then gives the same bytes as without"
    source,out = folder_of(tmp_path/'photos', 300, (300,200)),tmp_path/'out'
    args = [sys.executable, '-m', 'self_supervised_swav', 'prepare', source, '--size', '64', '--per-shard', '10',
            '--num-workers', '1', '-o']
    p = subprocess.Popen([*args, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out/'shard-000001.tar').exists() and p.poll() is None: time.sleep(.005)
    p.send_signal(signum)
    said = p.communicate()
    there = contents(out)
    assert 2 <= len(there) < 30
    if signum==signal.SIGINT:
        assert p.returncode == 130 and 'prepare: stopped; the same command goes on' in said[1]
        assert not list(out.glob('*.tmp'))
    assert all(len(Shards(out/o)) == 10 for o in there)
    prepare_shards(source, out, size=64, per_shard=10)
    prepare_shards(source, tmp_path/'other', size=64, per_shard=10, num_workers=3)
    assert contents(out) == contents(tmp_path/'other') and contents(out).items() >= there.items()
    assert not list(out.glob('*.tmp'))

def test_command(tmp_path, command):
    source = folder_of(tmp_path/'photos')
    code,out,err = command('prepare', source, '-o', tmp_path/'out', '--size', '20', '--labels-from-folders')
    assert code==0 and '9 images in 1 shard, ' in out and f'swav pretrain {tmp_path/"out"}' in out, err
    assert command('prepare', source, '-o', tmp_path/'out', '--size', '20', '--labels-from-folders')[0] == 0
    code,out,err = command('prepare', source, '-o', tmp_path/'out', '--quality', '0')
    assert code==2 and '--quality must be a whole number, at least 1' in err

def test_prepared_images_are_not_checked_again(tmp_path, monkeypatch):
    from self_supervised_swav import data
    prepare_shards(folder_of(tmp_path/'photos'), tmp_path/'out', size=20)
    monkeypatch.setattr(data, 'look_at_images', lambda *a, **k: pytest.fail('looked at'))
    assert len(swav_dls(tmp_path/'out', size=16, bs=4, valid_pct=0, num_workers=0).train_ds) == 9
    path = tmp_path/'out'/'shard-000000.tar'
    path.write_bytes(path.read_bytes()+bytes(512))  # no longer what shards.json says
    with pytest.raises(pytest.fail.Exception, match='looked at'): swav_dls(path, size=16, num_workers=0)

def test_copies_stay_on_one_side(tmp_path):
    source = folder_of(tmp_path/'photos', 10)
    for i in range(10): os.link(source/'ab'[i%2]/f'{i}.jpg', source/f'copy{i}.jpg')
    about = prepare_shards(source, tmp_path/'out', size=20)
    assert about['copies'] == 10
    with pytest.warns(UserWarning, match='10 of 20 files are copies'):
        images = ImageSource(tmp_path/'out', valid_pct=.5)
    sides = [{images.files[i].digest for i in part} for part in images.splits]
    assert sides[1] and not sides[0] & sides[1]
