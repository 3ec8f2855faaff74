"Everything: `from self_supervised_swav.all import *`"
from .sinkhorn import *
from .losses import *
from .knn import *
from .recipes import *
from .encoders import *
from .models import *
from .queue import *
from .augment import *
from .multiview import *
from .swav import *
from .optimizer import *
from .resume import *
from .distributed import *
from .precision import *
from .data import *
from .learner import *
