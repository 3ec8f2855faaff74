"Pretrain a small ResNet on handwritten digits without their labels, and measure what it learnt: `python tools/demo.py [--epochs 40] [--seed 0]`"
import argparse, math, os, time, warnings
os.environ.setdefault('MPLBACKEND', 'agg')
warnings.filterwarnings('ignore', category=FutureWarning)
from pathlib import Path

root = Path(__file__).resolve().parent.parent
n_protos = 128

def measure(dls, encoder=None):
    "Accuracy of a weighted vote of 20 neighbours in pixels or features: with all labels, and with 10 of each digit (mean of 10 draws)"
    import torch
    from self_supervised_swav.knn import weighted_knn
    def features(x):
        if encoder is None: return x.flatten(1)
        with torch.no_grad(): return torch.cat([encoder.eval()(o) for o in x.split(256)])
    train, valid = dls.train_ds, dls.valid_ds
    bank, queries = features(train.x), features(valid.x)
    accuracy = lambda idxs, k: (weighted_knn(queries, bank[idxs], train.y[idxs], k).argmax(1) == valid.y).float().mean().item()
    gen = torch.Generator().manual_seed(0)
    few = []
    for _ in range(10):
        shuffled = torch.randperm(len(train), generator=gen)
        few.append(torch.cat([shuffled[train.y[shuffled] == c][:10] for c in range(dls.c)]))
    return accuracy(torch.arange(len(train)), 20), sum(accuracy(o, 20) for o in few)/len(few)

def save_figures(learn, out):
    import matplotlib.pyplot as plt
    import torch
    learn.swav.show(n=4)
    plt.savefig(out/'crops.png', dpi=100, bbox_inches='tight')
    fig, ax = plt.subplots(figsize=(6, 3.5))
    ax.plot(torch.stack(learn.recorder.losses), label='training loss, smoothed')
    ax.axhline(math.log(n_protos), color='gray', ls='--', label=f'ln {n_protos}: predicts nothing')
    ax.set(xlabel='step', ylabel='loss', title='SwAV on handwritten digits')
    ax.legend()
    fig.savefig(out/'loss.png', dpi=100, bbox_inches='tight')
    plt.close('all')

def main(epochs, seed, out):
    import torch
    from fastai.callback import progress, schedule  # noqa: F401  they patch Learner
    from fastai.learner import Learner
    from fastai.torch_core import set_seed
    from safetensors.torch import save_file
    from self_supervised_swav.all import SWAV, create_encoder, create_swav_model, digits_dls, get_swav_aug_pipelines
    out.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    dls = digits_dls(size=16, bs=64, valid_pct=.3, seed=seed, device='cpu')
    encoder = create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, layers=(1,1,1,1), channels=(16,32,64,128), zero_init_last=False)
    model = create_swav_model(encoder, hidden_size=256, projection_size=64, n_protos=n_protos)
    # no flips: digits have a handedness
    augs = get_swav_aug_pipelines(num_crops=(2,2), crop_sizes=(16,10), min_scales=(.6,.35), max_scales=(1.,.7), flip_p=0.,
                                  rotate=True, rotate_deg=15, rotate_p=.5, bw=False, blur=False, stats=None)
    learn = Learner(dls, model, cbs=[SWAV(augs, crop_assgn_ids=[0,1], eps=0.03)])
    rows = {'raw pixels': measure(dls), 'untrained encoder': measure(dls, encoder)}
    print(f'{len(dls.train_ds)} digits to learn from, without their labels; {len(dls.valid_ds)} held out. '
          f'{sum(p.numel() for p in encoder.parameters()):,} parameters, {torch.get_num_threads()} threads', flush=True)
    start = time.time()
    learn.fit_one_cycle(epochs, 4e-3)
    secs = time.time()-start
    rows['pretrained encoder'] = measure(dls, encoder)
    save_figures(learn, out)
    save_file(encoder.state_dict(), out/'encoder.safetensors')
    print(f'\nWeighted 20-NN accuracy on {len(dls.valid_ds)} held-out digits, after {epochs} epochs in {secs:.0f} s\n')
    print('| features | all labels | 10 labels a digit |\n|---|---|---|')
    for nm, accs in rows.items(): print(f'| {nm} | ' + ' | '.join(f'{a:.1%}' for a in accs) + ' |')
    print('\nSaved ' + ', '.join(os.path.relpath(p) for p in sorted(out.iterdir()) if p.is_file()))
    return rows

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--epochs', type=int, default=40)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=root/'runs'/'demo')
    main(**vars(p.parse_args()))
