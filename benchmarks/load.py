"""Many images, and large ones: an epoch of small images from a folder and from shards, with the memory at its beginning
and its end; nearest neighbors among many features; `swav embed`; photographs of 12 megapixels from a folder and from
the shards that `swav prepare` makes of them; an hour of `swav pretrain`, and four processes of it. Every piece
that is done stays in `runs/load` and is not done again.
`--images 20000` for less, `--quick` in a minute, `--write` keeps the table in README.md. The images are synthetic."""
import argparse, contextlib, ctypes, io, math, os, re, shutil, subprocess, sys, time, warnings
from functools import partial
from pathlib import Path

import numpy as np, psutil, torch
from PIL import Image
from sklearn.datasets import load_sample_images

import harness
from harness import line, made_on, write_between
from quality import piece, version
from self_supervised_swav import feed as _feed, images as _images, prepare as _prepare, shards as _shards
from self_supervised_swav.checkpoints import save_encoder
from self_supervised_swav.data import swav_dls
from self_supervised_swav.embed import embed_images
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.knn import nearest_neighbors
from self_supervised_swav.prepare import prepare_shards

here = Path(__file__).resolve().parent
full = dict(images=200_000, features=1_000_000, queries=1_000, photos=24, embed_minutes=10., hours=1., steps=500)
quick = dict(images=300, features=2_000, queries=100, photos=3, embed_minutes=.1, hours=.02, steps=8)

# --- images -----------------------------------------------------------------------------------------------------------
def small_image(i, size=64):
    "JPEG bytes of a smooth random picture"
    a = np.random.default_rng(i).integers(0, 255, (6,6,3), dtype=np.uint8)
    f = io.BytesIO()
    Image.fromarray(a).resize((size,size), Image.Resampling.BICUBIC).save(f, 'jpeg', quality=90)
    return f.getvalue()

def write_small(folder, n, part=1000):
    "`n` files, so many in a folder; a folder that is whole is not written again"
    for start in range(0, n, part):
        sub,names = folder/f'{start//part:05}',range(start, min(n, start+part))
        if sub.exists() and len(list(sub.iterdir()))==len(names): continue
        sub.mkdir(parents=True, exist_ok=True)
        for i in names: (sub/f'{i:07}.jpg').write_bytes(small_image(i))

def write_photos(folder, n):
    "Photographs of 4000x3000 pixels: parts of scikit-learn's two, enlarged, with the noise of a sensor"
    folder.mkdir(parents=True, exist_ok=True)
    rng,sources = np.random.default_rng(0),[Image.fromarray(o) for o in load_sample_images().images]
    for i in range(n):
        path = folder/f'{i:04}.jpg'
        noise = rng.normal(0, 4, (750,1000,3))
        x,y = rng.integers(0, 60, 2)
        if path.exists(): continue
        im = sources[i%2].crop((x,y,x+560,y+360)).resize((4000,3000), Image.Resampling.BICUBIC)
        a = np.asarray(im)+np.tile(noise, (4,4,1))
        Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(path, 'jpeg', quality=92)

def in_silence(f, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()): return f(*args, **kwargs)

# --- measures ---------------------------------------------------------------------------------------------------------
def memory_of(process):
    """Bytes of a process and all that it started, shared pages by their share; without those of files, such as
    libraries, whose share grows whenever another process that uses them ends"""
    n = 0
    for o in [process,*process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):  # it may have ended since it was listed
            text = Path(f'/proc/{o.pid}/smaps_rollup').read_text()
            n += sum(1024*int(kb) for kb in re.findall(r'^Pss_(?:Anon|Shmem):\s*(\d+) kB', text, re.M))
    return n

def epoch(source, size, bs, workers):
    "A whole epoch: images, seconds, and the memory at its tenths"
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    start = time.perf_counter()
    dls = swav_dls(source, size=size, bs=bs, valid_pct=0, check=None, num_workers=workers, device='cpu')
    opened = time.perf_counter()-start
    n,memory,tenth = 0,[],max(1, len(dls.train)//10)
    start,cpu = time.perf_counter(),sum(os.times()[:4])
    for i,(x,) in enumerate(dls.train, 1):
        n += len(x)
        if i%tenth==0: memory.append(memory_of(psutil.Process()))
    return dict(images=n, all=len(dls.train_ds), secs=time.perf_counter()-start, cpu=sum(os.times()[:4])-cpu,
                opened=opened, memory=memory)

def giving_back(f, *args):
    """`f(*args)`, where the C library gives blocks of 4 MiB and more back to the system when they are freed

    glibc keeps those of less than 32 MiB, and one as torch wants it, aligned, often does not fit where another of the
    same size was: freed memory piles up."""
    with contextlib.suppress(AttributeError, OSError): ctypes.CDLL(None).mallopt(-3, 1<<22)  # -3: M_MMAP_THRESHOLD
    return f(*args)

def search(n, width, queries):
    "Nearest neighbors of some features among many"
    torch.set_num_threads(1)
    before = harness.peak_rss()
    gen = torch.Generator().manual_seed(0)
    bank = torch.randn(n, width, generator=gen)
    start,cpu = time.perf_counter(),sum(os.times()[:4])
    sims,_ = nearest_neighbors(bank[:queries], bank, k=20)
    assert (sims[:,0]-1).abs().max()<1e-4  # each finds itself
    return dict(secs=time.perf_counter()-start, cpu=sum(os.times()[:4])-cpu, peak=harness.peak_rss(), before=before)

def embed(source, folder, minutes):
    "`swav embed` of as many images as the time allows, by a trial of some"
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    encoder = create_encoder('resnet18', n_in=3, pretrained=False, small_images=True, layers=(1,1,1,1),
                             channels=(16,32,64,128))
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(encoder, folder/'encoder.safetensors', size=64)
    def go(source):
        start,cpu = time.perf_counter(),sum(os.times()[:4])
        n,_ = in_silence(embed_images, folder/'encoder.safetensors', source, folder/'x.npy', num_workers=1,
                         device='cpu')
        return n,time.perf_counter()-start,sum(os.times()[:4])-cpu
    shards = sorted(Path(source).glob('*.tar'))
    if not shards: raise FileNotFoundError(f"no shards in {source}: the piece 'prepare small' makes them")
    n,secs,cpu = go(str(shards[0]))
    k = max(1, min(len(shards), int(60*minutes/secs)))
    before = harness.peak_rss()
    n,secs,cpu = go(source if k==len(shards) else str(source/f'shard-{{000000..{k-1:06}}}.tar'))
    return dict(images=n, secs=secs, cpu=cpu, peak=harness.peak_rss(), before=before)

def train(source, out, bs, *options):
    "`swav pretrain` with a small network: its epochs, seconds, and the memory until the last of them has ended"
    shutil.rmtree(out, ignore_errors=True)
    cmd = [sys.executable,'-W','ignore','-m','self_supervised_swav','pretrain',source,'--out',out,'--size',64,'--bs',bs,
           '--valid-pct',0,'--num-workers',1,'--device','cpu',*options,'--set','encoder.layers=(1,1,1,1)',
           'encoder.channels=(8,16,32,64)','crop_sizes=(32,16)']
    start,cpu,memory,history = time.time(),sum(os.times()[:4]),[],out/'history.jsonl'
    env = os.environ | dict(OMP_NUM_THREADS='1')
    with subprocess.Popen(list(map(str, cmd)), stdout=subprocess.DEVNULL, env=env) as p:
        while p.poll() is None:
            memory.append((time.time(),memory_of(psutil.Process(p.pid))))
            time.sleep(2)
    if p.returncode: raise RuntimeError(f'{cmd} ended with {p.returncode}')
    trained = history.stat().st_mtime  # its report comes after the last epoch, and draws
    return dict(epochs=len(history.read_text().splitlines()), secs=time.time()-start, cpu=sum(os.times()[:4])-cpu,
                memory=[m for t,m in memory if t<trained])

apart = partial(harness.apart, start='fork')

# --- pieces -----------------------------------------------------------------------------------------------------------
def prepared(source, out, size, threads):
    "`swav prepare`: seconds, and bytes before and after"
    torch.set_num_threads(1)
    shutil.rmtree(out, ignore_errors=True)
    start,cpu = time.perf_counter(),sum(os.times()[:4])
    about = in_silence(prepare_shards, source, out, size=size, num_workers=threads)
    return dict(images=about['images'], secs=time.perf_counter()-start, cpu=sum(os.times()[:4])-cpu,
                bytes=about['bytes'], before=sum(o.stat().st_size for o in Path(source).rglob('*.jpg')))

def pieces(out, s, todo=('',)):
    "Name and result of each piece, in order; those that are not there are done if a word of `todo` is in their name"
    key = dict(torch=torch.__version__, version=version(epoch, search, embed, prepared,
                                                        _shards.Shards, _prepare.pack_image, _feed.ResumableFeed,
                                                        _images.read_image, nearest_neighbors))
    small,photos = out/'small',out/'photos'
    def run(name, more, f):
        return name,piece(out, name, key|more, f if any(o in name for o in todo) else None)
    n,m = s['images'],s['photos']
    def pack():
        write_small(small/f'{n}', n)
        return apart(prepared, small/f'{n}', out/f'shards-{n}', 64, 1)
    yield run('prepare small', dict(images=n), pack)
    measured = dict(images=n, workers=1, memory=version(memory_of, giving_back))
    for kind,source in (('folder',small/f'{n}'), ('shards',out/f'shards-{n}')):
        yield run(f'epoch {kind}', measured, lambda: apart(giving_back, epoch, source, 64, 256, 1))
    yield run('search', dict(n=s['features'], queries=s['queries']),
              lambda: apart(search, s['features'], 128, s['queries']))
    yield run('embed', dict(images=n, minutes=s['embed_minutes']),
              lambda: apart(embed, out/f'shards-{n}', out/'run', s['embed_minutes']))
    def pack_photos():
        write_photos(photos, m)
        return apart(prepared, photos, out/'photo-shards', 256, 1)
    yield run('prepare photos', dict(photos=m), pack_photos)
    for kind,source in (('folder',photos), ('shards',out/'photo-shards')):
        yield run(f'photos {kind}', dict(photos=m), lambda: apart(epoch, source, 224, min(8, m//3), 0))
    k,n_ranks = min(n, 4000),4
    own = dict(images=k, trained=version(train, memory_of))
    yield run('train, one process', own|dict(hours=s['hours'], bs=64),
              lambda: train(small/f'{n}', out/'trained', 64, '--n-images', k, '--hours', s['hours']))
    epochs = math.ceil(s['steps']/(k//32))
    more = '--n-images',k,'--epochs',epochs,'--gpus',n_ranks
    yield run(f'train, {n_ranks} processes', own|dict(epochs=epochs, bs=32),
              lambda: train(small/f'{n}', out/'trained-ranks', 32, *more))

def mb(n): return f'{n/2**20:,.0f} MiB'

tick = 1/os.sysconf('SC_CLK_TCK')  # seconds of processor time are counted in

def rows(found):
    "The table, of the pieces that there are"
    def speed(n, r): return f"{n/max(r['cpu'], tick):,.0f} / {n/r['secs']:,.0f}"
    for name,r in found:
        if r is None: continue
        if name.startswith('prepare'):
            what = f"{r['before']/1e6:,.1f} MB of JPEG become {r['bytes']/1e6:,.1f} MB of shards"
            yield name,f"{r['images']:,} images",speed(r['images'], r),what,r
        elif name=='search':
            k = r['key']
            yield (name,f"{k['queries']:,} queries, {k['n']:,} x 128",speed(k['queries'], r),
                   f"peak {mb(r['peak'])}, of which {mb(r['before'])} were there before",r)
        elif name=='embed':
            yield (name,f"{r['images']:,} images",speed(r['images'], r),
                   f"peak {mb(r['peak'])}, {mb(r['before'])} after a first shard",r)
        else:
            half = len(r['memory'])//2
            first,second = (max(o, default=0) for o in (r['memory'][:half],r['memory'][half:]))
            what = f'at most {mb(first)} in its first half, {mb(second)} in its second' if 'photos' not in name else ''
            if name.startswith('train'):
                k,steps = r['key']['images'],r['epochs']*(r['key']['images']//r['key']['bs'])
                yield name,f'{steps:,} steps of {r["key"]["bs"]} images',speed(r['epochs']*k, r),what,r
            else: yield name,f"{r['images']:,} of {r['all']:,} images",speed(r['images'], r),what,r

def report(found):
    head = ['piece','size','a second of processor time / of the clock','memory, and what else','load','date']
    lines = [line([*o[:4],f"{o[4]['load']:.1f}",o[4]['date']]) for o in rows(found)]
    return '\n'.join([line(head), line(['---']*len(head)), *lines])

begin,end = '<!-- load: written by `benchmarks/load.py --write` -->','<!-- load: end -->'

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    for name,value in full.items(): p.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    p.add_argument('--minutes', type=float, default=math.inf, help='start no new piece after so many')
    p.add_argument('--out', type=Path, default=here.parent/'runs'/'load')
    p.add_argument('--quick', action='store_true', help='tiny sizes: does it run?')
    p.add_argument('--only', nargs='+', default=[''], metavar='WORD', help='do pieces whose name has one of these')
    p.add_argument('--table', action='store_true', help='only print what is done')
    p.add_argument('--write', action='store_true', help='keep the table in benchmarks/README.md')
    args = p.parse_args(argv)
    if args.write and args.quick: p.error('--write keeps full runs alone')
    s = (quick if args.quick else full) | {k: v for k,v in vars(args).items() if k in full and v is not None}
    out,start,found = args.out/'quick' if args.quick else args.out,time.time(),[]
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for o in pieces(out, s, [] if args.table else args.only):
        found.append(o)
        if time.time()-start>60*args.minutes: break
    text = report(found)
    print(text)
    if args.write: write_between(here/'README.md', begin, end, f'{made_on()}\n\n{text}')
    return text

if __name__=='__main__': main()
