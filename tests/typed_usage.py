"""How a user calls the package, for mypy to read (`make test`): never run.

Every name of `self_supervised_swav.all` is used here as its docstring says, with the types of what comes out."""
from pathlib import Path
from typing import Any
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import Tensor, nn
from self_supervised_swav.all import (
    CollapseMonitor, CollapseWarning, DeepClusterV2, EpochHistory, KNNMetric, MoCo, MultiCrop, MultiView, NoValidation,
    PoolingType, PretrainRun, Prototypes, Recipe, ResumeTraining, SaveEncoder, SimCLR, SwAVModel, TensorImages,
    TrainingStopped, UnlabeledImageBlock, Whitening, check_images, code_entropy, code_overlap, compare_encoders,
    create_deepcluster_model, create_fastai_encoder, create_from_settings, create_moco_model, create_simclr_model,
    create_timm_encoder, deepcluster_learner, deepcluster_recipe, digits_dls, effective_rank, embed_images,
    encoder_arch, encoder_settings, evaluate_run, explore_images, explore_page, export_encoder, fashion_mnist_dls,
    feature_spread, few_label_idxs, few_label_splits, finetune_labels, folder_features, get_batch_augs,
    get_deepcluster_aug_pipelines, get_moco_aug_pipelines, get_multi_aug_pipelines, get_simclr_aug_pipelines,
    grid_features, group_images, info_nce, lars, load_encoder, load_official, load_swav_checkpoint, load_weights,
    load_whitening, mean_code_entropy, method_of, moco_learner, moco_recipe, model_card, near_duplicates,
    nearest_neighbors, no_targets, nt_xent, paper_recipe, predict_images, pretrain_learner, project_features,
    prototype_usage, push_to_hub, save_encoder, select_images, select_to_label, simclr_learner, simclr_recipe,
    sort_images, stage_features, swav_recipe, tensor_dls, weighted_knn)
from self_supervised_swav.augment import get_swav_aug_pipelines
from self_supervised_swav.data import swav_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.evaluate import extract_features, few_label_learner, knn_accuracy, linear_probe, spread_probe
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
    unlabeled:float = spread_probe(train, valid, k=10).top1
    assert unlabeled<=1
    return machine_info() | dict(knn=f'{accuracy:.1%}', probe=str(linear_probe(train, valid).top1))

def images() -> list[DataLoaders]:
    data = TensorImages(torch.rand(10, 3, 32, 32), torch.arange(10), [str(i) for i in range(10)])
    UnlabeledImageBlock(background='black')
    bad:dict = check_images(['a.png'])
    assert not bad and no_targets is not None
    return [tensor_dls(data.x, bs=8, valid_pct=.1), digits_dls(size=16, labeled=False), fashion_mnist_dls(n_train=1000)]

def models(encoder:nn.Module) -> list[nn.Module]:
    timm:nn.Module = create_timm_encoder('resnet18', pretrained=False, pool_type=PoolingType.Avg)
    fastai:nn.Module = create_fastai_encoder('xresnet18', n_in=1, pretrained=False, small_images=True)
    swav = SwAVModel(encoder, nn.Linear(512, 128), Prototypes(128, 3000), n_in=3)
    others = [create_simclr_model(timm), create_moco_model(fastai, bn_splits=2),
              create_deepcluster_model(encoder, n_protos=[300,300])]
    return [swav,*others]

def crops(x:Tensor) -> list[Tensor]:
    pipes = [*get_multi_aug_pipelines(2, 224), *get_simclr_aug_pipelines(96), *get_moco_aug_pipelines(96, version=1),
             *get_deepcluster_aug_pipelines(num_crops=(2,4))]
    get_batch_augs(64, jitter_s=.5)
    views:list[Tensor] = MultiCrop(pipes).cut(x)
    return views

def methods(dls:DataLoaders, learn:Learner) -> MultiView:
    recipe:Recipe = swav_recipe(10_000, 64, 96)
    for r in (simclr_recipe(1000, 64, 96), moco_recipe(1000, 64, 96, version=1), deepcluster_recipe(1000, 64, 96)):
        values:dict[Any,Any] = dict(r)
        assert values
    paper:dict = paper_recipe('mocov2', 256, 200)
    learners:list[Learner] = [pretrain_learner(dls, 'resnet18', method='simclr', recipe=recipe),
                              simclr_learner(dls, 'resnet18'), moco_learner(dls, 'resnet18', version=2),
                              deepcluster_learner(dls, 'resnet18', n_protos=[100])]
    augs = get_swav_aug_pipelines()
    for cb in (SimCLR(augs, temp=.1), MoCo(augs, K=4096), DeepClusterV2(augs)): learners[0].add_cb(cb)
    assert paper
    return method_of(learn)

def training(dls:DataLoaders, model:nn.Module) -> None:
    cbs = [CollapseMonitor(stop=True), KNNMetric(dls, k=20), ResumeTraining('last.pth', every=100),
           EpochHistory(Path('history.jsonl')), SaveEncoder('encoder.safetensors'), NoValidation()]
    opt = lars(model.parameters(), lr=.6, wd=1e-6)
    try: Learner(dls, model, cbs=cbs, opt_func=lambda *_, **__: opt).fit(1)
    except TrainingStopped: pass
    assert issubclass(CollapseWarning, Warning)
    PretrainRun('photos', out='runs/photos', epochs=10).fit()

def formulas(z:Tensor, keys:Tensor, codes:Tensor) -> list[Tensor]:
    return [nt_xent(z, temp=.1, large_ids=(0,1)), info_nce(z, keys, keys, temp=.2), code_entropy(codes),
            mean_code_entropy(codes), prototype_usage(codes), code_overlap(codes[0], codes[1]), feature_spread(keys),
            effective_rank(keys)]

def encoders(learn:Learner, x:Tensor) -> Path:
    encoder:nn.Module = load_encoder(save_encoder(learn, 'encoder.safetensors', size=96))
    whitening:Whitening|None = load_whitening('encoder.safetensors')
    settings:dict = encoder_settings('encoder.safetensors')
    others:list[nn.Module] = [create_from_settings(settings), load_swav_checkpoint('swav.pth', encoder_only=True),
                              load_official('swav_800ep')]
    load_weights(others[0], 'weights.pth')
    encoder_arch('encoder.safetensors')
    with grid_features(encoder, 2), stage_features(encoder, 2): assert whitening is not None and encoder(x).ndim==2
    text:str = model_card('encoder.safetensors', license='mit')+str(push_to_hub('encoder.safetensors', 'me/encoder'))
    assert text
    return export_encoder(learn, 'encoder.onnx', format='onnx', normalize=True)

def measures(dls:DataLoaders, x:Tensor, y:Tensor, encoder:nn.Module) -> str:
    idxs:Tensor = few_label_idxs(y, n_per_class=10)
    few:DataLoaders = few_label_splits(dls, fraction=.01)
    nearest_neighbors(x, x, k=5), near_duplicates(x, threshold=.99), weighted_knn(x, x, y), project_features(x)
    table = compare_encoders({'mine': encoder}, few, labels=(10,))
    return f"{evaluate_run('runs/photos', 'labeled')}{table}{len(idxs)}"

def folders() -> dict:
    features,files = folder_features('runs/photos', 'photos', bs=64)
    groups = group_images(features, k=10)
    page:Path = explore_page(features, files, 'map.html', groups)
    chosen:Tensor = select_to_label(features, 50, method='coverage')
    names:list = select_images('runs/photos', 'photos', 'selected.csv', number=50)
    embed_images('runs/photos', 'photos', 'x.npy'), sort_images('runs/photos', 'photos', 'sorted')
    explore_images('runs/photos', 'photos', 'map.html')
    accuracy:float = finetune_labels('runs/photos', 'labels.csv', 'classifier').accuracy
    assert page and len(chosen)==len(names) and accuracy
    return predict_images('classifier', 'photos', 'predictions.csv')
