"""One table: this package beside its peers, in one run on one machine. `--quick` in under three minutes, `--write`
keeps it in README.md."""
import argparse, sys, time
from functools import partial
from pathlib import Path

import torch
from fastai.callback.channelslast import ChannelsLast

from harness import Row, line, machine, table, write
from kernels import contrastive_rows, growth_row, growth_rows, loss_rows, momentum_rows, sinkhorn_rows
from multicrop import contestants, images_per_second, sizes
from steps import epoch_rows, gpu_rows, settings, share_rows, step_rows, variant_rows

small = dict(sizes, num_crops=(2,4), crop_sizes=(96,48))

def crop_rows(bs, sizes, rounds, device='cpu'):
    fs = contestants(bs, sizes, device=device)
    rates = images_per_second(fs, bs, rounds, device=device)
    (n,m),(s,t) = sizes['num_crops'],sizes['crop_sizes']
    targets = dict(zip(fs, ('','5x (7x)','2x (3x)',''))) if bs==32 and s==224 else {}
    for k in list(fs)[1:]:
        yield Row('multi-crop, images/s', f'batch {bs} of 3x256x320, {n}x{s} + {m}x{t}', f"{rates['this package']:.0f}",
                  k, f'{rates[k]:.0f}',
                  f"{rates['this package']/rates[k]:.1f}x", targets.get(k, ''))

def crop_growth(rounds, sizes=small, bs=8):
    "The cost of crops at 1, 2, 4, 8 times the batch"
    def seconds(n):
        fs = contestants(n*bs, sizes)
        fs = {k: fs[k] for k in ('this package','kornia chain')}
        return {k: n*bs/v for k,v in images_per_second(fs, n*bs, rounds, 2).items()}
    (n,m),(s,t) = sizes['num_crops'],sizes['crop_sizes']
    yield growth_row('multi-crop', f'batch {bs}..{8*bs}, {n}x{s} + {m}x{t}', [seconds(n) for n in (1,2,4,8)],
                     'kornia chain')

def sections(quick, device):
    "Name to a function that measures, and gives rows"
    rounds,d = (3 if quick else 9),dict(device=device)
    s = {'crops': partial(crop_rows, 32, sizes, 2 if quick else 5, **d),
         'sinkhorn': partial(sinkhorn_rows, ((8,30),(512,3000),(4096,3000)), rounds, **d) if quick
         else partial(sinkhorn_rows, rounds=rounds, **d),
         'loss': partial(loss_rows, rounds=rounds, memory=not quick, **d),
         'step': partial(step_rows, rounds=2 if quick else 3, **d, **settings['resnet18'])}
    if quick: return s
    if device!='cpu': s['GPU step'] = partial(gpu_rows, **d, **settings['gpu'])
    return s|{'small crops': partial(crop_rows, 32, small, 5, **d),
              'large batch': partial(crop_rows, 256, sizes, 2, **d),
              'contrastive': partial(contrastive_rows, rounds=rounds, **d), 'momentum': partial(momentum_rows, **d),
              'SimCLR step': partial(share_rows, 'simclr', **d), 'MoCo step': partial(share_rows, 'mocov2', **d),
              'bfloat16': partial(epoch_rows, **d),
              'large step': partial(step_rows, n=1, **d, **settings['resnet50']),
              'layouts': partial(variant_rows, {'channels_last': dict(cbs=[ChannelsLast]),
                                                'encoder compiled': dict(compiled=True)}, **d, **settings['resnet18']),
              'growth': partial(growth_rows, **d), 'crop growth': partial(crop_growth, 3)}

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='fewer rows, fewer rounds')
    p.add_argument('--only', nargs='+', metavar='SECTION', help='some of: ' + ', '.join(sections(False, 'cpu')))
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--write', action='store_true', help='keep the table in benchmarks/README.md')
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    chosen = {k:f for k,f in sections(args.quick, args.device).items() if not args.only or k in args.only}
    if args.write and (args.quick or args.only): p.error('--write keeps full runs alone')
    if unknown := set(args.only or ())-set(chosen): p.error(f'unknown sections: {", ".join(sorted(unknown))}')
    rows,start = [],time.time()
    for name,f in chosen.items():
        new = list(f())
        rows += new
        print(f'{name}: {time.time()-start:.0f} s', *map(line, new), sep='\n', file=sys.stderr, flush=True)
    seconds = time.time()-start
    print(*machine(args.device), f'{seconds:.0f} s', table(rows), sep='\n')
    if args.write: write(Path(__file__).with_name('README.md'), rows, args.device, seconds)

if __name__=='__main__': main()
