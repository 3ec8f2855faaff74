"`python -m self_supervised_swav`, for example under torchrun, is the command `swav`"
from self_supervised_swav.cli import main

if __name__=='__main__': raise SystemExit(main())
