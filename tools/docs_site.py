"""What the documentation site has beyond docs/*.md: hooks of mkdocs, see mkdocs.yml.

README.md, the READMEs of detection and segmentation, and CHANGELOG.md become pages, so that they stand once; their
links, which are right in the repository, are made right in the site. `<!-- zoo -->` becomes the table of published
weights, from the manifest.
"""
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # file of the repository: page of the site
    'README.md': 'index.md',
    'detection/README.md': 'detection.md',
    'segmentation/README.md': 'segmentation.md',
    'CHANGELOG.md': 'changelog.md',
}
MARKER = '<!-- zoo -->'
_LINK = re.compile(r'(\[[^\]]*\])\(([^)\s]+)\)')


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding='utf-8')))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    source = next((s for s, p in PAGES.items() if p == uri), f'docs/{uri}')
    markdown = _LINK.sub(lambda m: _link(m, source, uri, files), markdown)
    return markdown.replace(MARKER, zoo()) if MARKER in markdown else markdown


def _link(match, source: str, uri: str, files) -> str:
    """A link of the repository as the site has it; to a file that is no page, its text alone."""
    text, target = match.groups()
    path, _, anchor = target.partition('#')
    if not path or '://' in path or path.startswith('mailto:'):
        return match[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    page = PAGES.get(path, path.removeprefix('docs/') if path.startswith('docs/') else None)
    if page is None or files.get_file_from_path(page) is None:
        if not (ROOT / path).exists():
            raise ValueError(f'{source}: link to {path}, which does not exist')
        return f'`{path}`' if text[1:-1] == path else f'{text[1:-1]} (`{path}`)'
    page = os.path.relpath(page, posixpath.dirname(uri) or '.')
    return f'{text}({page}{"#" + anchor if anchor else ""})'


def zoo() -> str:
    """The table of all weights that have a name, and the commands behind those that were trained here."""
    import timm
    import torch

    import vim2
    rows = ['| name | parameters | px | result | from | licence | trained on |', '|---|---|---|---|---|---|---|']
    commands = ['What measures those that were trained here, and what trained them:']
    for weights in vim2.list_pretrained():
        if weights.name.startswith('tsm2'):
            parameters, px = '', ''
        else:
            with torch.device('meta'):
                model = timm.create_model(weights.name)
            parameters = f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M'
            px = model.pretrained_cfg['input_size'][-1]
        source = weights.source + (f', {weights.size / 1e6:.1f} MB' if weights.size else '')
        rows.append(f'| `{weights.name}` | {parameters} | {px} | {weights.result} | {source} | '
                    f'{weights.license} | {weights.data} |')
        if weights.command:
            commands += ['', f'- `{weights.name}`', '', f'        {weights.metric["command"]}',
                         f'        {weights.command}']
    return '\n'.join([*rows, '', *commands])
