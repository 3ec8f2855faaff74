"Fail, naming the files, where the committed package, notebooks or README are not what the notebooks give."
import filecmp, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'models', 'runs', '*.egg-info')

def run(cmd, cwd): subprocess.run([sys.executable, *cmd], cwd=cwd, check=True, stdout=subprocess.DEVNULL)

def main():
    with tempfile.TemporaryDirectory() as tmp:
        for name in ('nbs', 'self_supervised_swav', 'tools'): shutil.copytree(root/name, Path(tmp)/name, ignore=skip)
        for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md'): shutil.copy(root/name, tmp)
        run(['-c', 'from nbdev.export import nb_export_cli; nb_export_cli()'], tmp)
        run(['-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()'], tmp)
        run(['tools/readme.py'], tmp)
        made = [p.relative_to(tmp) for p in Path(tmp).rglob('*') if p.is_file() and '__pycache__' not in p.parts]
        kept = [p.relative_to(root) for d in ('nbs', 'self_supervised_swav') for p in (root/d).rglob('*')
                if p.suffix in ('.py', '.ipynb') and '.ipynb_checkpoints' not in p.parts]
        drifted = sorted({str(p) for p in {*made, *kept} if p.suffix in ('.py', '.ipynb', '.md')
                          and not ((root/p).exists() and (Path(tmp)/p).exists() and filecmp.cmp(root/p, Path(tmp)/p, shallow=False))})
    for p in drifted: print(f'{p} is not what the notebooks give: run `make readme` and commit')
    return len(drifted)

if __name__ == '__main__': sys.exit(bool(main()))
