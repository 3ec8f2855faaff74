"The parts of the package's metadata that pyproject.toml calls dynamic, read from settings.ini."
from ast import literal_eval
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser()
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lines = (here/cfg['lib_name']/'__init__.py').read_text().splitlines()
version = literal_eval(next(o for o in lines if o.startswith('__version__')).split('=')[1].strip())
pythons = 10, 11, 13  # on which the tests have run

setup(name=cfg['lib_name'], version=version,
      packages=[cfg['lib_name']], include_package_data=True,
      author=cfg['author'], license=cfg['license'], keywords=cfg['keywords'].split(),
      python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
      extras_require={'export': cfg['export_requirements'].split(), 'test': cfg['test_requirements'].split(),
                      'docs': cfg['docs_requirements'].split(),
                      'dev': (cfg['test_requirements']+' '+cfg['dev_requirements']).split()},
      entry_points={'console_scripts': cfg['console_scripts'].split()},
      long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      classifiers=['Programming Language :: Python :: 3',
                   *(f'Programming Language :: Python :: 3.{o}' for o in pythons),
                   'Framework :: Jupyter', 'Operating System :: POSIX :: Linux',
                   'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Typing :: Typed'])
