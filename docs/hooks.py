"""What mkdocs runs while it builds the site.

The pictures of the results stay where the benchmarks write them, in bench/results, so that the pages read well on a
forge; mkdocs only publishes what lies in docs/. These hooks add the pictures to the site and point the pages at them.
"""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
IN_REPOSITORY, IN_SITE = "../bench/results/", "pictures/results/"


def on_files(files, config):
    """Add every picture of bench/results to the site's files."""
    for path in sorted((ROOT / "bench" / "results").iterdir()):
        if path.suffix in (".png", ".svg"):
            files.append(File.generated(config, IN_SITE + path.name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace a page's paths into bench/results by those of the site."""
    return markdown.replace(f"]({IN_REPOSITORY}", f"]({IN_SITE}")
