"""Packaging: everything that can vary stands in settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="MIT",
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    # The job notebooks and their configs travel in the wheel as pytc/tutorials.
    packages=[*find_packages(include=["pytc", "pytc.*"]), "pytc.tutorials"],
    package_dir={"pytc.tutorials": "tutorials"},
    package_data={"pytc.tutorials": ["*.ipynb", "*.yaml", "*.h5", "*.npz", "*.md", "*.ckpt", "tiles/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "multicut": cfg["multicut_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
