"What one writes in a notebook: `from self_supervised_swav.all import *`"
# ruff: noqa: F405
import importlib, warnings
from fastai.learner import Learner
from .sinkhorn import *
from .losses import *
from .contrastive import *
from .stats import *
from .whitening import *
from .knn import *
from .spread import *
from .recipes import *
from .machine import *
from .encoders import *
from .models import *
from .grid import *
from .queue import *
from .shards import *
from .fused import *
from .augment import *
from .checkpoints import *
from .multiview import *
from .swav import *
from .simclr import *
from .moco import *
from .deepcluster import *
from .optimizer import *
from .monitor import *
from .resume import *
from .distributed import *
from .precision import *
from .data import *
from .learner import *
from .evaluate import *
from .visualize import *
from .report import *
from .sources import *
from .records import *
from .runs import *
from .replay import *
from .compare import *
from .published import *
from .export import *
from .card import *
from .embed import *
from .grouping import *
from .explore import *
from .select import *
from .label import *
from .finetune import *
from .prepare import *

# The modules hold more names, for those who build on them: `from self_supervised_swav.drawings import draw_image`
__all__ = [
    # images
    'swav_dls', 'tensor_dls', 'digits_dls', 'fashion_mnist_dls', 'UnlabeledImageBlock', 'no_targets', 'TensorImages',
    'check_images',
    # models
    'PoolingType', 'create_encoder', 'create_timm_encoder', 'create_fastai_encoder',
    'create_swav_model', 'SwAVModel', 'Prototypes',
    # crops
    'get_batch_augs', 'get_multi_aug_pipelines', 'get_swav_aug_pipelines', 'MultiCrop',
    # methods and their settings
    'MultiView', 'method_of', 'SWAV', 'pretrain_learner', 'swav_learner', 'Recipe', 'swav_recipe', 'paper_recipe',
    'SimCLR', 'create_simclr_model', 'get_simclr_aug_pipelines', 'MoCo', 'create_moco_model', 'get_moco_aug_pipelines',
    'simclr_recipe', 'moco_recipe', 'deepcluster_recipe', 'simclr_learner', 'moco_learner', 'deepcluster_learner',
    'DeepClusterV2', 'create_deepcluster_model', 'get_deepcluster_aug_pipelines',
    # training
    'lars', 'CollapseMonitor', 'CollapseWarning', 'KNNMetric', 'ResumeTraining', 'TrainingStopped',
    'EpochHistory', 'SaveEncoder', 'PretrainRun',
    # formulas
    'sinkhorn', 'swapped_loss', 'nt_xent', 'info_nce', 'code_entropy', 'mean_code_entropy', 'prototype_usage',
    'code_overlap',
    'feature_spread', 'effective_rank',
    # the encoder and what it knows
    'load_swav_checkpoint', 'load_official', 'encoder_arch', 'export_encoder', 'model_card', 'push_to_hub',
    'save_encoder', 'load_encoder', 'load_weights', 'load_whitening', 'encoder_settings', 'create_from_settings',
    'extract_features', 'grid_features', 'stage_features', 'Whitening', 'nearest_neighbors', 'near_duplicates',
    'weighted_knn', 'knn_accuracy', 'linear_probe', 'project_features',
    'few_label_idxs', 'few_label_splits', 'spread_probe', 'few_label_learner', 'NoValidation', 'evaluate_run', 'compare_encoders',
    'folder_features', 'embed_images', 'group_images', 'sort_images', 'explore_page',
    'explore_images', 'select_to_label', 'select_images', 'finetune_labels', 'predict_images']

# learn.simclr_report() as learn.simclr.show(): the report is the same for every method
for _method in methods.values():
    setattr(Learner, f'{_method.callback.__name__.lower()}_report', Learner.pretrain_report)

def __getattr__(name):
    "A name that was here in 0.1.0, from the module that has it now"
    if not name.startswith('_'):
        for mod in ('drawings','visualize','samples','files','fused','models'):
            found = importlib.import_module(f'.{mod}', __package__)
            if hasattr(found, name):
                warnings.warn(f"{name} is no longer in all: from self_supervised_swav.{mod} import {name}",
                              DeprecationWarning, stacklevel=2)
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
