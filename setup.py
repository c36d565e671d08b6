"The package's metadata, read from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser()
ini.read(here/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    # pyproject.toml, which nbdev writes, calls all of these dynamic: each one left out here ends the installation.
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0", keywords=cfg["keywords"].split(),
    classifiers=["Development Status :: 3 - Alpha", f"Natural Language :: {cfg['language']}", "Programming Language :: Python :: 3"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["okadfa", "okadfa.*"]),
    install_requires=cfg["requirements"].split(), extras_require={"dev": cfg["dev_requirements"].split(), "bench": cfg["bench_requirements"].split(),
                    "adopt": cfg["adopt_requirements"].split(), "pages": cfg["pages_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
