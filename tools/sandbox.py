"""What tests and notebooks run in: a process without a network and, where SWAV_PRETEND asks for it, on a processor that
lacks something. What Python processes it starts have no network either.

`SWAV_PRETEND` holds names of `lacks`, separated by commas. Nothing here can be undone: a process that has entered stays
inside."""
import os, socket, sys
from pathlib import Path

inside = Path(__file__).resolve().parent/'inside'

# --- no network -------------------------------------------------------------------------------------------------------
_host_at = {'socket.connect': 1, 'socket.sendto': 1, 'socket.sendmsg': 1, 'socket.getaddrinfo': 0,
            'socket.gethostbyname': 0}
attempts = []  # (event, host) of everything refused, because libraries catch the error and go on without the network

def is_local(address):
    "Whether `address`, a host or (host, port, ...), is this machine"
    host = address[0] if isinstance(address, tuple) else address
    if isinstance(host, bytes): host = host.decode(errors='replace')
    return host in (None, '', 'localhost', '::1', '0.0.0.0', socket.gethostname()) or host.startswith('127.')

def _refuse_network(event, args):
    if event not in _host_at: return
    address = args[_host_at[event]]
    is_unix_socket = getattr(args[0], 'family', None) not in (None, socket.AF_INET, socket.AF_INET6)
    if is_local(address) or is_unix_socket: return
    attempts.append((event, address))
    raise OSError(f'{event} to {address!r}: tests and notebooks have no network')

def python_path(*folders):
    "The PYTHONPATH of a process that is to have no network"
    return os.pathsep.join(dict.fromkeys(map(str, [inside, *folders])))

def close_network():
    "In this process; a second call changes nothing"
    if getattr(sys, '_swav_network_closed', False): return
    sys._swav_network_closed = True
    sys.addaudithook(_refuse_network)

# --- another processor ------------------------------------------------------------------------------------------------
def _refuse_caches(event, args):
    "As in a container that hides the description of the processor"
    if event in ('open', 'os.listdir', 'os.scandir') and str(args[0]).startswith('/sys/devices/system/cpu'):
        raise PermissionError(f'{args[0]}: pretended to be hidden')

def _hide_caches(): sys.addaudithook(_refuse_caches)

def _lack_bfloat16():
    import torch
    for name in ('_is_amx_tile_supported', '_is_avx512_bf16_supported', '_is_amx_fp16_supported'):
        setattr(torch.cpu, name, lambda: False)

lacks = dict(caches=_hide_caches, bfloat16=_lack_bfloat16)

def enter(
    pretend=None # Names of `lacks`; None: those in SWAV_PRETEND
):
    "Close the network, and hide what the processor is to lack; a second call changes nothing"
    if getattr(sys, '_swav_sandbox', False): return
    sys._swav_sandbox = True
    names = os.environ.get('SWAV_PRETEND', '').split(',') if pretend is None else pretend
    if unknown := set(filter(None, names))-set(lacks):
        raise ValueError(f"SWAV_PRETEND must name some of {', '.join(lacks)}, got {', '.join(sorted(unknown))}")
    close_network()
    os.environ['PYTHONPATH'] = python_path(*filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep)))
    for name in filter(None, names): lacks[name]()
