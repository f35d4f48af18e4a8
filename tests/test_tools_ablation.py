"""tools/ablation.py: every variant trained, the table, and what is kept."""
import json

import pytest
from timm.models import create_model

import _common as common
import ablation
import vim2  # noqa: F401 (registers the models)

RECIPE = """
model: test_vim2
model_kwargs: {dims: [4, 8], token_depths: 1, channel_depths: 1, channel_expand: 1., d_state: 1}
dataset: npz
val_split: test
workers: 0
batch_size: 32
epochs: 1
data_on_device: true
img_size: 32
train_crop_mode: pad
val_interval: 1
"""


@pytest.mark.parametrize('name', ablation.VARIANTS)
def test_every_variant_is_another_model(root, name):
    recipe = common.read_recipe(root / 'tools' / 'recipes' / 'cifar10_ablation.yaml')
    model, full = (create_model(recipe['model'], num_classes=10, device='meta', **ablation.model_kwargs(n, recipe))
                   for n in (name, 'full'))
    assert sum(p.numel() for p in full.parameters()) < 1e6 and recipe['val_interval']
    shapes, others = ({n: p.shape for n, p in m.named_parameters()} for m in (model, full))
    if name == 'no-own-value':
        assert any(n.endswith('.dt_projs_diag') for n in shapes)  # starts at zero, and is frozen there
    else:
        assert (shapes == others) == (name == 'full')


def test_runs_are_kept_and_the_table_compares_them(npz_dir, tmp_path, tool):
    (tmp_path / 'recipe.yaml').write_text(RECIPE)
    arguments = ('--data-dir', npz_dir, '--output', tmp_path / 'out', '--config', tmp_path / 'recipe.yaml',
                 '--variants', 'full', 'tokens')
    result = tool('ablation', *arguments, '--seeds', 0)
    assert result.code == 0, result.err
    runs = json.loads((tmp_path / 'out' / 'results.json').read_text())['runs']
    assert [(r['variant'], r['seed']) for r in runs] == [('full', 0), ('tokens', 0)]
    assert all(0 <= r['top1'] <= 100 and r['seconds'] > 0 for r in runs)
    assert runs[0]['parameters'] > runs[1]['parameters'] > 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'out').glob('*/last.pth.tar')}
    result = tool('ablation', *arguments, '--seeds', 0)
    assert result.code == 0 and '+ weighted averaging: ViM2' in result.out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / 'out').glob('*/last.pth.tar')}  # nothing ran anew
    assert (tmp_path / 'out' / 'results.png').read_bytes().startswith(b'\x89PNG')
    result = tool('ablation', *arguments, '--', '--epochs', '2')
    assert result.code == 2 and 'is of another recipe or other options' in result.err
    (tmp_path / 'recipe.yaml').write_text(RECIPE.replace('val_interval: 1', 'val_interval: 0'))
    result = tool('ablation', *arguments)
    assert result.code == 2 and 'nothing would be measured' in result.err


def test_rows():
    def run(variant, seed, top1, seconds):
        return dict(variant=variant, seed=seed, top1=top1, seconds=seconds, parameters=1_500_000)

    rows = ablation.summarize([run('full', 0, 70., 10.), run('full', 1, 72., 10.), run('mlp', 0, 69., 5.),
                               run('mlp', 1, 70., 6.), run('scan1', 0, 71., 8.)])
    assert [r['variant'] for r in rows] == ['mlp', 'full', 'scan1']
    text = ablation.table(rows).splitlines()
    assert text[2] == '| + MLP channel mixing | 2 | 1.50 M | 69.50 ± 0.71 | -1.50 ± 0.71 | 0.55 |'
    assert text[3] == '| + weighted averaging: ViM2 | 2 | 1.50 M | 71.00 ± 1.41 |  | 1.00 |'
    assert text[4].startswith('| one scan along the channels instead of two | 1 | 1.50 M | 71.00 | +1.00 | 0.80')
