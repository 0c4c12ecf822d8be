"""Makes the committed results' pictures part of the site, as results/NAME.png."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside the folder of pages."""
    results = Path(config.config_file_path).parent / "benchmarks" / "results"
    for picture in sorted(results.glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files
