"Run the tests that need a GPU, where there is one: `python tools/gpu.py [arguments of pytest]`"
import os, sys
from runner import close, tests
import torch

if __name__ == '__main__':
    if not torch.cuda.is_available(): sys.exit(print('There is no GPU here: nothing was tested.'))
    print(torch.cuda.get_device_name(), f'torch {torch.__version__}', sep=', ', flush=True)
    os.environ['SWAV_DEVICE'] = 'cuda'
    sys.exit(close(tests('-n1', *(sys.argv[1:] or ['tests']), marked='gpu')))
