"The parts of the package's metadata that pyproject.toml calls dynamic, read from settings.ini."
from ast import literal_eval
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser()
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
version_line = next(l for l in (here/cfg['lib_name']/'__init__.py').read_text().splitlines() if l.startswith('__version__'))

setup(name=cfg['lib_name'], version=literal_eval(version_line.split('=')[1].strip()),
      packages=[cfg['lib_name']], include_package_data=True,
      author=cfg['author'], license=cfg['license'], keywords=cfg['keywords'].split(),
      python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
      extras_require={'export': cfg['export_requirements'].split(), 'test': cfg['test_requirements'].split(),
                      'docs': cfg['docs_requirements'].split(), 'dev': (cfg['test_requirements']+' '+cfg['dev_requirements']).split()},
      entry_points={'console_scripts': cfg['console_scripts'].split()},
      long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      # the Pythons on which the tests have run
      classifiers=['Programming Language :: Python :: 3', *(f'Programming Language :: Python :: 3.{o}' for o in (10, 11, 13)), 'Framework :: Jupyter',
                   'Operating System :: POSIX :: Linux', 'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Typing :: Typed'])
