"Packaging. Everything is read from settings.ini, so that each fact is written down once."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(ROOT / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

LICENSES = {'apache2': 'Apache-2.0'}
STATUSES = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
minimum = tuple(map(int, cfg['min_python'].split('.')))
readme = ROOT / 'README.md'

extras = {name: cfg[f'{name}_requirements'].split() for name in ('cluster', 'eval', 'gguf', 'hf', 'widgets')}

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'],
    license=LICENSES[cfg['license']],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    classifiers=[
        f"Development Status :: {STATUSES[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(minimum[1], 14)),
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg['lib_name'], f"{cfg['lib_name']}.*"]),
    include_package_data=True,
    install_requires=cfg['requirements'].split(),
    extras_require=extras | {'dev': [*cfg['dev_requirements'].split(), *(r for rs in extras.values() for r in rs)]},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],  # lets nbdev link names in the docs to their source
    },
    zip_safe=False,
)
