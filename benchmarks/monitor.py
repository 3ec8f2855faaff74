"What CollapseMonitor costs, as a share of a training step: `python benchmarks/monitor.py`"
import time
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from self_supervised_swav.augment import get_swav_aug_pipelines
from self_supervised_swav.data import tensor_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.monitor import CollapseMonitor
from self_supervised_swav.swav import SWAV

class TimedMonitor(CollapseMonitor):
    "Adds up the time of the monitor's own events"
    spent = 0.
    def timed(self, event):
        start = time.perf_counter()
        getattr(super(), event)()
        self.spent += time.perf_counter()-start
    def after_loss(self): self.timed('after_loss')
    def after_batch(self): self.timed('after_batch')
    def after_train(self): self.timed('after_train')

class Clock(Callback):
    "Time of the training steps after the first"
    run_valid = False
    def before_fit(self): self.ends = []
    def after_batch(self): self.ends.append(time.perf_counter())

def share(size, bs, n_protos, n_steps, **encoder_kwargs):
    torch.manual_seed(0)
    dls = tensor_dls(torch.rand(bs*n_steps+2, 1, size, size), bs=bs, splits=[range(bs*n_steps),range(2)], device='cpu')
    encoder = create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, **encoder_kwargs)
    augs = get_swav_aug_pipelines((2,4), (size,size//2+4), (.3,.12), (1.,.4), stats=None)
    learn = Learner(dls, create_swav_model(encoder, n_protos=n_protos), cbs=[SWAV(augs), TimedMonitor(), Clock()])
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    learn.fit(1)
    n = len(learn.clock.ends)
    step = (learn.clock.ends[-1]-learn.clock.ends[0])/(n-1)
    own = learn.timed_monitor.spent/n
    print(f'{size} px, batch {bs}, {n_protos} prototypes: '
          f'step {1e3*step:.0f} ms, monitor {1e3*own:.2f} ms, {own/step:.2%}')

if __name__=='__main__':
    share(16, 64, 64, 20, layers=(1,1,1,1), channels=(8,16,32,64))
    share(28, 64, 128, 10, layers=(1,1,1,1), channels=(32,64,128,256))
    share(28, 256, 512, 5, layers=(1,1,1,1), channels=(32,64,128,256))
    share(28, 128, 3000, 4, layers=(1,1,1,1), channels=(32,64,128,256))
