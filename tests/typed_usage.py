"""How a user calls the package, for mypy to read (`make test`): never run.

The functions are those of the README; `reveal` in a comment is what an editor shows."""
from pathlib import Path
import torch
from fastai.learner import Learner
from torch import Tensor, nn
from self_supervised_swav.augment import get_swav_aug_pipelines
from self_supervised_swav.data import swav_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.evaluate import extract_features, few_label_learner, knn_accuracy, linear_probe
from self_supervised_swav.learner import swav_learner
from self_supervised_swav.losses import swapped_loss
from self_supervised_swav.machine import machine_info
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.sinkhorn import sinkhorn
from self_supervised_swav.swav import SWAV

def mathematics(scores:Tensor) -> Tensor:
    codes:Tensor = sinkhorn(scores, eps=.05, n_iters=3)
    return swapped_loss(torch.stack([scores, scores]), codes[None], [0], temp=.1)

def parts() -> Learner:
    encoder:nn.Module = create_encoder('resnet18', n_in=3, pretrained=False, pool_type=None)
    model:nn.Module = create_swav_model(encoder, hidden_size=2048, projection_size=128, n_protos=3000)
    augs = get_swav_aug_pipelines(num_crops=(2,6), crop_sizes=(224,96), min_scales=(.25,.05), max_scales=(1.,.14))
    dls = swav_dls(Path('images'), size=96, bs=64, n_in=3, num_workers=None, device=None)
    return Learner(dls, model, cbs=[SWAV(aug_pipelines=augs, crop_assgn_ids=[0,1], K=None, queue_start_pct=.25, temp=.1,
                                         eps=.05, n_sinkh_iter=3)])

def short_way(folder:str) -> dict:
    dls = swav_dls(folder)
    learn = swav_learner(dls, 'resnet18', encoder=None, bf16=None)
    learn.fit(1)
    train, valid = (extract_features(learn, dl) for dl in dls)
    accuracy:float = knn_accuracy(train, valid)
    few_label_learner(learn, dls)
    return machine_info() | dict(knn=f'{accuracy:.1%}', probe=str(linear_probe(train, valid).top1))
