"What every benchmark needs: alternating runs, medians, peak memory, a table, and the machine's name for it"
import argparse, math, multiprocessing, re, statistics, time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from self_supervised_swav.machine import machine_info

class Row(NamedTuple):
    "One line of the table: a figure of this package, its peer's, and how many times better ours is"
    what:str; size:str; ours:str; peer:str; theirs:str; ratio:str=''; target:str=''

    @classmethod
    def of_times(cls, what, size, times, peer, target='', ours='this package'):
        "`times` are seconds: the ratio says how many times as long the peer takes"
        a,b = times[ours],times[peer]
        return cls(what, size, fmt_time(a), peer, fmt_time(b), f'{b/a:.1f}x' if b/a<100 else f'{b/a:.0f}x', target)

def fmt_time(s):
    "Seconds, in the unit that suits them"
    for unit,n in (('s',1),('ms',1e3)):
        if s*n>=1: return f'{s*n:.3g} {unit}' if s*n<1000 else f'{s*n:.0f} {unit}'
    return f'{s*1e6:.0f} us'

def _clock(f, device, number):
    "Seconds a call of `f` takes"
    if device=='cpu':
        start = time.perf_counter()
        for _ in range(number): f()
        return (time.perf_counter()-start)/number
    start,end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(number): f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)/1e3/number

def _number(f, device, least):
    "Calls that take `least` seconds; warms `f` up"
    first = _clock(f, device, 1)
    return 1 if first>10*least else max(1, math.ceil(least/min(_clock(f, device, 1) for _ in range(3))))

def race(
    fs:dict, # Name to a function of no arguments
    rounds:int=5, # Rounds; in each, every function runs once
    device:str='cpu', # 'cuda': timed by events on the device
    least:float=.01 # A function is called as often in a round as makes this many seconds
)->dict: # Name to the median seconds of one call
    "Time functions in alternating runs, so that what slows the machine down for a while slows all of them"
    number = {k: _number(f, device, least) for k,f in fs.items()}
    times = {k:[] for k in fs}
    for _ in range(rounds):
        for k,f in fs.items(): times[k].append(_clock(f, device, number[k]))
    return {k: statistics.median(v) for k,v in times.items()}

def exponent(sizes, times):
    "The `p` of times ~ sizes**p, fitted by least squares"
    x,y = ([math.log(o) for o in v] for v in (sizes,times))
    mx,my = statistics.mean(x),statistics.mean(y)
    return sum((a-mx)*(b-my) for a,b in zip(x,y))/sum((a-mx)**2 for a in x)

# --- memory -----------------------------------------------------------------------------------------------------------
def peak_rss(): return int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1])*1024

def _send(f, args, send): send.send(f(*args))

def apart(f, *args, start='spawn'):
    "`f(*args)` in a process of its own; with `start='fork'` its peak of memory begins at what is there already"
    receive,send = multiprocessing.Pipe(duplex=False)
    p = multiprocessing.get_context(start).Process(target=_send, args=(f, args, send))
    p.start()
    send.close()
    try: return receive.recv()
    finally: p.join()

def _measure_peak(make, args):
    torch.set_num_threads(1)
    make(*args, small=True)()  # code and buffers of the libraries are there before the measurement
    f = make(*args)
    before = peak_rss()
    f()
    return peak_rss()-before

def peak_memory(
    make, # A function that builds the inputs and gives a function to measure; `small=True`: on tiny inputs
    *args, # Passed to `make`
    device:str='cpu' # 'cuda': by the allocator's own peak
)->int: # Bytes beyond the inputs
    "Peak memory of one call in a process of its own: its high-water mark of resident memory"
    if device!='cpu':
        make(*args, small=True)()
        f = make(*args)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated()-before
    return apart(_measure_peak, make, args)

# --- pieces that are done once ----------------------------------------------------------------------------------------
def parser_of_pieces(doc, name):
    "The arguments of a benchmark whose pieces are kept in `runs/name`: it can be stopped and goes on where it was"
    p = argparse.ArgumentParser(description=doc)
    p.add_argument('--minutes', type=float, default=math.inf, help='start no new piece after so many')
    p.add_argument('--out', type=Path, default=Path(__file__).resolve().parent.parent/'runs'/name)
    p.add_argument('--quick', action='store_true', help='little data and a tiny network: does it run?')
    p.add_argument('--table', action='store_true', help='only print what is done')
    p.add_argument('--write', action='store_true', help='keep what is printed in benchmarks/README.md')
    return p

def parse_pieces(p, argv):
    args = p.parse_args(argv)
    if args.write and args.quick: p.error('--write keeps full runs alone')
    return args

def do_pieces(todo, minutes):
    "Call the functions `todo`; start none after so many minutes"
    end = time.time()+60*minutes
    for f in todo:
        if time.time()>end: break
        f()

# --- the table --------------------------------------------------------------------------------------------------------
def machine(device):
    "Processor, threads and versions, in one line each"
    info = machine_info(('torch','torchvision','kornia','timm','fastai','lightly'))
    gpu = info.pop('GPU', None)
    yield f"{info.pop('processor')}; torch uses {info.pop('torch uses')}"
    if gpu and device!='cpu': yield gpu
    yield info.pop('system') + ', ' + ', '.join(f'{k} {v}' for k,v in info.items())

columns = ('what','size','this package','peer','its figure','ratio','target (aim)')

def line(cells): return '| ' + ' | '.join(cells) + ' |'
def table(rows):
    "The rows in Markdown"
    widths = [max(len(r[i]) for r in [columns,*rows]) for i in range(len(columns))]
    return '\n'.join(line(c.ljust(w) for c,w in zip(r, widths)) for r in [columns, ['-'*w for w in widths], *rows])

marker = '<!-- everything below is written by `make bench` -->'
gpu_markers = '<!-- gpu: written by `make bench` where there is a GPU -->','<!-- gpu: end -->'

def write(path, rows, device, seconds):
    "Replace what stands below the marker in the file, or for a GPU what is between its own"
    run = made_on(device, f', {seconds/60:.0f} minutes.')
    if device!='cpu': return write_between(path, *gpu_markers, f'{run}\n\n{table(rows)}')
    head = path.read_text().split(marker)[0]
    path.write_text(f'{head}{marker}\n\n## The last full run\n\n{run}\n\n{table(rows)}\n')

def made_on(device='cpu', more=''):
    "When and where figures were made: the date and what else there is to say, then a list of the machine"
    return f'{date.today()}{more}\n\n' + '\n'.join(f'- {o}' for o in machine(device))

def split_at(path, begin, end):
    "The text of the file before, between and after two markers"
    head,rest = path.read_text().split(begin, 1)
    return head,*rest.split(end, 1)

def write_between(path, begin, end, text):
    "Put `text` between two markers of the file"
    head,_,rest = split_at(path, begin, end)
    path.write_text(f'{head}{begin}\n\n{text}\n\n{end}{rest}')
