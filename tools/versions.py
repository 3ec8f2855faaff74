"""Run the tests with other versions of Python and of what the package needs: `python tools/versions.py oldest|newest
[arguments of pytest]`

`oldest` installs exactly the versions that settings.ini gives as the lowest, on the lowest Python; `newest` the newest
of everything, on the newest Python. Each has an environment of its own, `.venv-oldest` and `.venv-newest`, which is
made again when settings.ini changes (`newest`: when it is deleted)."""
import os, re, shutil, subprocess, sys, time
from configparser import ConfigParser
from pathlib import Path
from runner import root

newest_python = '3.13'
# they need the tools of development, and no version of anything else
say_versions = """import sys
from importlib.metadata import version
print('Python', sys.version.split()[0], *(f'{o} {version(o)}' for o in sys.argv[1:]), sep='  ')"""
not_here = ('test_tools.py', 'test_benchmarks.py')

def read_settings():
    ini = ConfigParser()
    ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def lowest(requirements):
    "Exact versions of requirements written as `name>=version`"
    unbounded = [o for o in requirements if not re.fullmatch(r'[\w-]+>=[\w.]+', o)]
    if unbounded:
        raise ValueError(f"requirements in settings.ini must be written name>=version, got {', '.join(unbounded)}")
    return [o.replace('>=', '==') for o in requirements]

def find_python(version):
    "A Python of this version: from the path, or pyenv's"
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home()/'.pyenv'))/'versions'
    for exe in [shutil.which(f'python{version}'), *sorted(map(str, pyenv.glob(f'{version}.*/bin/python')))]:
        # pyenv puts commands on the path that do not run
        if exe and subprocess.run([exe, '-c', ''], capture_output=True).returncode == 0: return exe
    sys.exit(f'there is no Python {version} here: nothing was tested')

def environment(which):
    "Python in an environment with the `oldest` or `newest` versions, installed if they are not there yet"
    cfg = read_settings()
    needed, for_tests = cfg['requirements'].split(), cfg['test_requirements'].split()
    version = cfg['min_python'] if which == 'oldest' else newest_python
    want = [*(lowest(needed) if which == 'oldest' else needed), *for_tests]
    folder = root/f'.venv-{which}'
    done, text = folder/'.installed', ' '.join([version, *want])
    if done.exists() and done.read_text() == text: return folder/'bin'/'python'
    print(f"Installing into {folder.name}: Python {text} (a few minutes)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([find_python(version), '-m', 'venv', folder], check=True)
    python = folder/'bin'/'python'
    for args in (['-U', 'pip'], ['-U', *want], ['--no-deps', '-e', str(root)]):
        subprocess.run([python, '-m', 'pip', 'install', '-q', *args], check=True)
    done.write_text(text)
    return python

def main(which, *args):
    start, python = time.time(), environment(which)
    names = re.findall(r'[\w-]+', re.sub(r'>=[\w.]+', '', read_settings()['requirements']))
    subprocess.run([python, '-c', say_versions, *names], check=True)
    tests = args or ['tests', *(f'--ignore=tests/{o}' for o in not_here)]
    res = subprocess.run([python, 'tools/runner.py', *tests], cwd=root)
    print(f'{which}: {time.time()-start:.0f} s')
    return res.returncode

if __name__ == '__main__':
    if sys.argv[1:2] not in (['oldest'], ['newest']): sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
