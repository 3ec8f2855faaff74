"""The parts of `make demo` that are no command of the package: digits as image files (`digits`), the answers of
somebody who looks at the selected images (`label`), and the accuracy on images that took no part in anything
(`score`)."""
import argparse, statistics, warnings
from pathlib import Path

warnings.filterwarnings('ignore', '.torch.jit', FutureWarning)  # fastai and kornia, when they are imported
import numpy as np, torch
from fastai.callback import schedule  # noqa: F401  it patches Learner
from fastai.torch_core import set_seed
from PIL import Image
from sklearn.datasets import load_digits

from self_supervised_swav.augment import get_batch_augs
from self_supervised_swav.checkpoints import create_from_settings, encoder_settings, load_encoder
from self_supervised_swav.data import random_split, tensor_dls
from self_supervised_swav.evaluate import (NoValidation, extract_features, few_label_learner, largest_share,
                                           linear_probe, normalized, spread_probe)
from self_supervised_swav.finetune import wilson_interval
from self_supervised_swav.images import read_image
from self_supervised_swav.select import read_csv, read_labels, write_labels

def write_digits(out):
    "1,258 images to pretrain on, without labels; 539 to measure with; the answers to all of them in one file"
    images,y = load_digits(return_X_y=True)
    answers = {}
    for part,idxs in zip(('photos','held_out'), random_split(len(y), .3, seed=42)):
        (out/part).mkdir(parents=True)
        for i in sorted(idxs):
            name = f'{part}/{i:04}.png'
            pixels = (images[i].reshape(8,8)*255/16).round().astype('uint8')
            Image.fromarray(pixels).resize((16,16), Image.Resampling.BILINEAR).save(out/name)
            answers[name] = str(y[i])
        print(f'{len(idxs):,} images in {out/part}')
    write_labels(out/'answers.csv', answers)

def label_selected(out):
    "Fill in the column `class` of selected.csv, as one would in a spreadsheet"
    answers = read_labels(out/'answers.csv')[0]
    names = [o['file'] for o in read_csv(out/'selected.csv')]
    write_labels(out/'labels.csv', {o: answers[f'photos/{o}'] for o in names})
    print(f"{len(names)} images labeled in {out/'labels.csv'}: {len({answers[f'photos/{o}'] for o in names})} digits")

def images_of(out, part):
    "(n,1,16,16) images and their digits"
    answers = {k: int(v) for k,v in read_labels(out/'answers.csv')[0].items() if k.startswith(f'{part}/')}
    x = torch.stack([torch.from_numpy(np.array(read_image(out/o, 'L'))) for o in answers])[:,None]
    return x,torch.tensor(list(answers.values()))

def trained(encoder, pretrained, few, test, epochs, stats):
    "Accuracy on `test` after training on `few`: all of the network from the start, or the new head first"
    parts = range(len(few[0])),range(len(few[0]), len(few[0])+len(test[0]))
    dls = tensor_dls(*map(torch.cat, zip(few, test)), vocab=list(range(10)), bs=min(64, len(few[0])), splits=parts,
                      device='cpu')
    aug = get_batch_augs(16, jitter=False, bw=False, blur=False, resize_scale=(.5,1.), flip_p=0., stats=None)
    dls.train.after_batch.add(aug[0])
    dls.train.after_batch.split_idx = 0
    learn = few_label_learner(encoder, dls, stats=stats, pretrained=pretrained, cbs=NoValidation())
    with learn.no_bar(), learn.no_logging():
        if pretrained: learn.fine_tune(epochs, base_lr=4e-3, freeze_epochs=max(1, epochs//4), lr_mult=4)
        else: learn.fit_one_cycle(epochs+epochs//4, 4e-3)
    learn.model.eval()
    with torch.no_grad(): right = [(learn.model(x).argmax(1)==y).float() for x,y in learn.dls.valid]
    return torch.cat(right).mean().item()

def score(out, draws, epochs):
    "The accuracy of predictions.csv, beside that of random labels with the same encoder, without one, and of chance"
    photos,test = images_of(out, 'photos'),images_of(out, 'held_out')
    answers = read_labels(out/'answers.csv')[0]
    right = [answers[f"held_out/{o['file']}"]==o['prediction'] for o in read_csv(out/'predictions.csv')]
    assert len(right)==len(test[1])
    n = len(read_labels(out/'labels.csv')[0])
    settings = encoder_settings(out/'run/encoder.safetensors')
    sides = range(len(photos[0])),range(len(photos[0]), len(photos[0])+len(test[0]))
    both = normalized(tensor_dls(torch.cat([photos[0],test[0]]), splits=sides, device='cpu'), settings.get('stats'))
    encoder = load_encoder(out/'run/encoder.safetensors')
    features,features_test = (extract_features(encoder, o, progress=False)[0] for o in both)
    pixels,near,scratch,tuned,spread = [],[],[],[],[]
    for seed in range(draws):
        idxs = torch.randperm(len(photos[1]), generator=torch.Generator().manual_seed(seed))[:n]
        few = [o[idxs] for o in photos]
        flat = [(o.flatten(1)/255,y) for o,y in (few,test)]
        pixels.append(linear_probe(*flat, C=.1).top1)
        known = torch.full_like(photos[1], -1)
        known[idxs] = photos[1][idxs]
        near.append(spread_probe((photos[0].flatten(1)/255,known), flat[1]).top1)
        spread.append(spread_probe((features,known), (features_test,test[1])).top1)
        set_seed(seed)
        scratch.append(trained(create_from_settings(settings), False, few, test, epochs, settings.get('stats')))
        set_seed(seed)
        tuned.append(trained(load_encoder(out/'run/encoder.safetensors'), True, few, test, epochs,
                             settings.get('stats')))
    def mean(values):
        return f'{statistics.mean(values):.1%}' + (f' ({min(values):.1%} to {max(values):.1%})' if draws>1 else '')
    lo,hi = wilson_interval(sum(right), len(right))
    rows = [(f'accuracy on {len(right)} held-out images', f'{n} labels'), ('---','---'),
            ('the commonest digit, always', f'{largest_share(test[1]):.1%}'),
            ('random labels, linear classifier on pixels', mean(pixels)),
            ('random labels, spread between alike pixels', mean(near)),
            ('random labels, trained from scratch', mean(scratch)),
            ('random labels, pretrained and fine-tuned', mean(tuned)),
            ('random labels, pretrained, spread between alike features', mean(spread)),
            ('**selected labels, pretrained, `swav finetune`**',
             f'**{sum(right)/len(right):.1%}** ({lo:.1%} to {hi:.1%})')]
    print('\n' + '\n'.join(f'| {a} | {b} |' for a,b in rows))
    print(f"\nRandom labels: mean of {draws} draws, and the least and most of them. Selected labels: one selection, "
          f"and the 95 % interval of {len(right)} images.")

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('part', choices=['digits','label','score'])
    p.add_argument('out', type=Path, help='folder of the demo')
    p.add_argument('--draws', type=int, default=3, help='of random labels')
    p.add_argument('--epochs', type=int, default=60, help='of training on random labels, as `swav finetune` makes')
    args = p.parse_args(argv)
    if args.part=='digits': write_digits(args.out)
    elif args.part=='label': label_selected(args.out)
    else: score(args.out, args.draws, args.epochs)

if __name__=='__main__': main()
