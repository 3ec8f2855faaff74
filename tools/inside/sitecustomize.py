"Every Python that tests and notebooks start finds this first: it has no network either"
import sys
from pathlib import Path

tools = str(Path(__file__).resolve().parent.parent)
sys.path.append(tools)
import sandbox
sys.path.remove(tools)
sandbox.close_network()
