"""tools/_data.py and the recipes: what training and validation read."""
import io
import os
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import CLASSES, colored_image, jpeg, tool_environment, write_npz
from PIL import Image

import _common as common
import _data as data
import _datasets as datasets
import _images
import train
from _common import UserError

STATS = dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


# --------------------------------------------------------------------------------------------------------------- npz

def test_npz_holds_the_images_that_were_written(tmp_path):
    rng = np.random.default_rng(0)
    labels = [2, 0, 3, 1, 1]
    files = [jpeg(colored_image(y, rng, size=(20 + i, 16))) for i, y in enumerate(labels)]
    write_npz(tmp_path / 'train.npz', files, labels)
    dataset = datasets.open_dataset('npz', str(tmp_path), 'train')
    assert len(dataset) == 5 and dataset.classes == list(CLASSES) == datasets.class_names(dataset)
    for i, file in enumerate(files):
        image, label = dataset[i]
        assert label == labels[i]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(file)).convert('RGB')))
    assert dataset.filename(0) == 'blue/0000.jpg' and dataset.filename(0, basename=True) == '0000.jpg'


@pytest.mark.parametrize('split, indices', [
    ('train[:3]', range(3)), ('train[3:]', range(3, 160)), ('train[10:12]', range(10, 12)), ('train[:]', range(160))])
def test_npz_part_of_a_split(npz_dir, split, indices):
    whole, part = (datasets.open_dataset('npz', str(npz_dir), s) for s in ('train', split))
    assert len(part) == len(indices)
    for row, i in list(enumerate(indices))[:4]:
        assert np.array_equal(np.asarray(part[row][0]), np.asarray(whole[i][0])) and part[row][1] == whole[i][1]
        assert part.filename(row) == whole.filename(i)


@pytest.mark.parametrize('split', ['train', 'train[5:30]'])
def test_npz_cache_gives_the_same_images(npz_dir, split):
    plain = datasets.open_dataset('npz', str(npz_dir), split)
    cached = datasets.open_dataset('npz', str(npz_dir), split, cache_images=True)
    assert cached.images.dtype == np.uint8 and cached.images.shape == (len(plain), 32, 32, 3)
    assert datasets.class_names(cached) == datasets.class_names(plain) is not None
    assert cached.targets().tolist() == [plain[i][1] for i in range(len(plain))]
    assert cached.filename(3) == plain.filename(3)
    for i in (0, 7, len(plain) - 1):
        assert np.array_equal(np.asarray(plain[i][0]), np.asarray(cached[i][0])) and plain[i][1] == cached[i][1]


@pytest.mark.parametrize('extra, message', [
    (dict(labels=None), 'no array labels'),
    (dict(names=np.array([{'a': 1}] * 4, dtype=object)), 'Object arrays cannot be loaded'),
    (dict(offsets=np.array([0, 10, 5, 20, 30])), 'offsets must increase'),
    (dict(offsets=np.array([0, 1, 2, 3, 10 ** 9])), 'offsets must increase and stay within'),
    (dict(offsets=np.array([0, 1, 2])), 'offsets must be'),
    (dict(classes=np.array(['a', 'b', 'b', 'c'])), 'classes has a name twice'),
    (dict(classes=np.array([1, 2, 3, 4])), 'classes must be a vector of texts'),
    (dict(class_names=np.array(['a'])), 'class_names must be a vector of texts, as many as classes'),
    (dict(data=np.zeros(9, np.float32)), 'data must be'),
    (dict(labels=np.array([0, 1, 2, 4])), 'label 4 but only 4 classes'),
    (dict(labels=np.array([0., 1, 2, 3])), 'labels must be'),
    (dict(names=np.array(['a'])), 'names must be a vector of 4 texts'),
])
def test_npz_with_wrong_arrays(tmp_path, extra, message):
    rng = np.random.default_rng(0)
    write_npz(tmp_path / 'train.npz', [jpeg(colored_image(y, rng)) for y in range(4)], range(4), override=extra)
    with pytest.raises(UserError, match=message) as error:
        datasets.open_dataset('npz', str(tmp_path), 'train')
    assert 'train.npz' in str(error.value)


def test_npz_damaged_file(npz_dir, tmp_path):
    whole = (npz_dir / 'train.npz').read_bytes()
    for name, content in (('truncated', whole[:len(whole) // 2]), ('empty', b''), ('text', b'no archive')):
        (tmp_path / f'{name}.npz').write_bytes(content)
        with pytest.raises(UserError, match=f'cannot read .*{name}.npz'):
            datasets.open_dataset('npz', str(tmp_path), name)


def test_npz_missing(npz_dir, tmp_path):
    with pytest.raises(UserError, match='val.npz does not exist; splits there: test, train'):
        datasets.open_dataset('npz', str(npz_dir), 'val')
    with pytest.raises(UserError, match='no .npz file in'):
        datasets.open_dataset('npz', str(tmp_path), 'train')
    with pytest.raises(UserError, match='/nowhere/at/all does not exist'):
        datasets.open_dataset('npz', '/nowhere/at/all', 'train')
    with pytest.raises(UserError, match='pass --data-dir'):
        datasets.open_dataset('npz', None, 'train')
    with pytest.raises(UserError, match='holds no image'):
        datasets.open_dataset('npz', str(npz_dir), 'train[160:]')
    with pytest.raises(UserError, match='expected a name'):
        datasets.open_dataset('npz', str(npz_dir), '../train')


@pytest.fixture
def corrupt_npz(tmp_path):
    rng = np.random.default_rng(0)
    files = [jpeg(colored_image(y % 4, rng)) for y in range(8)]
    files[5] = files[5][:200]
    write_npz(tmp_path / 'train.npz', files, np.arange(8) % 4)
    return tmp_path


@pytest.mark.parametrize('workers', [0, 2])
def test_npz_corrupt_image_is_named(corrupt_npz, workers):
    dataset = datasets.open_dataset('npz', str(corrupt_npz), 'train')
    assert dataset[4][1] == 0  # the others can be read
    config = dict(input_size=(3, 32, 32), interpolation='bicubic', crop_pct=1., crop_mode='center', **STATS)
    loader = data.eval_loader(dataset, config, batch_size=2, device=torch.device('cpu'), workers=workers)
    with pytest.raises(UserError, match=r'cannot decode image 5 \(green/0005.jpg\)'):
        list(loader)
    with pytest.raises(UserError, match=r'cannot decode image 5 \(green/0005.jpg\)'):
        datasets.open_dataset('npz', str(corrupt_npz), 'train', cache_images=True)


@pytest.fixture
def mnist(tmp_path):
    """Forty images in the files of MNIST, a data set of torchvision's."""
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    folder = tmp_path / 'MNIST' / 'raw'
    folder.mkdir(parents=True)
    for name in ('train', 't10k'):
        (folder / f'{name}-images-idx3-ubyte').write_bytes(struct.pack('>4i', 0x803, *images.shape) + images.tobytes())
        (folder / f'{name}-labels-idx1-ubyte').write_bytes(struct.pack('>2i', 0x801, 40) + labels.tobytes())
    return tmp_path, images, labels


def test_parts_and_cache_of_a_torchvision_data_set(mnist):
    root, images, labels = mnist
    part = datasets.open_dataset('torch/mnist', str(root), 'train[30:]', cache_images=True)
    assert len(part) == 10 and part.images.shape == (10, 28, 28, 3)
    assert np.array_equal(part.images[3][..., 0], images[33]) and part.targets().tolist() == labels[30:].tolist()
    plain = datasets.open_dataset('torch/mnist', str(root), 'train[:30]')
    assert len(plain) == 30 and np.array_equal(np.asarray(plain[7][0]), images[7]) and plain[7][1] == labels[7]
    assert datasets.class_names(part) == datasets.class_names(plain) and len(datasets.class_names(part)) == 10
    with pytest.raises(UserError, match='the split holds no image'):
        datasets.open_dataset('torch/mnist', str(root), 'train[50:]')


def test_npz_cache_needs_one_size(tmp_path):
    rng = np.random.default_rng(0)
    files = [jpeg(colored_image(0, rng, size=(32, 32))), jpeg(colored_image(1, rng, size=(32, 30)))]
    write_npz(tmp_path / 'train.npz', files, [0, 1])
    with pytest.raises(UserError, match=r'image 1 \(green/0001.jpg\) is 32x30, earlier ones are 32x32'):
        datasets.open_dataset('npz', str(tmp_path), 'train', cache_images=True)


def test_real_cifar10(shared_data):
    folder = shared_data('cifar10')
    for split, n in (('train', 50000), ('test', 10000)):
        dataset = datasets.open_dataset('npz', str(folder), split)
        assert len(dataset) == n and len(dataset.classes) == 10
        assert np.array_equal(np.bincount(dataset.labels), [n // 10] * 10)
        image, label = dataset[n - 1]
        assert image.size == (32, 32) and dataset.filename(n - 1).split('/')[0] == dataset.classes[label]


# ----------------------------------------------------------------------------------------------------- other data sets

def test_image_folder(folder_dir):
    dataset = datasets.open_dataset('', str(folder_dir), 'train')
    assert len(dataset) == 40 and datasets.class_names(dataset) == sorted(CLASSES)
    torchvision_way = datasets.open_dataset('torch/image_folder', str(folder_dir), 'train')
    assert len(torchvision_way) == 40 and datasets.class_names(torchvision_way) == sorted(CLASSES)


def test_unreadable_image_in_a_folder_is_an_error_where_it_would_be_counted(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        colored_image(0, np.random.default_rng(0)).save(tmp_path / name / 'good.png')
    (tmp_path / 'a' / 'bad.png').write_bytes(b'no picture')
    strict = datasets.open_dataset('', str(tmp_path), '.', strict=True)
    assert len(strict) == 3
    with pytest.raises(UserError, match=r'cannot read image 0 \(a/bad.png\)'):
        strict[0]
    assert strict[1][1] == 0 and strict[2][1] == 1


@pytest.mark.parametrize('name, root, message', [
    ('', '/nowhere/at/all', 'data path /nowhere/at/all does not exist'),
    ('torch/cifar10', '/nowhere/at/all', 'data path /nowhere/at/all does not exist'),
    ('torch/nonsense', '.', 'Unknown torchvision dataset nonsense'),
    ('', None, 'pass --data-dir'),
])
def test_data_set_that_cannot_be_opened(name, root, message):
    with pytest.raises(UserError, match=message):
        datasets.open_dataset(name, root, 'train')


def test_folder_without_images(tmp_path):
    (tmp_path / 'train').mkdir()
    with pytest.raises(UserError, match=f'the folder {tmp_path}/train holds no image'):
        datasets.open_dataset('', str(tmp_path), 'train')


# ------------------------------------------------------------------------------------------------------------- classes

def make_folders(root, **splits):
    """SPLIT/CLASS/0.png with the number of the split and class as its pixels."""
    for split, names in splits.items():
        for i, name in enumerate(names):
            path = root / split / name / '0.png'
            path.parent.mkdir(parents=True)
            Image.new('RGB', (8, 8), (i, 0, 0)).save(path)
    return str(root)


def labels_by_name(dataset, names):
    """The labels that images get, by the names of their folders."""
    return {dataset.filename(i).split('/')[0]: names[dataset[i][1]] for i in range(len(dataset))}


def test_the_number_of_classes_must_be_the_models(folder_dir):
    dataset = datasets.open_dataset('', str(folder_dir), 'train')
    datasets.match_classes(dataset, 4, 'it')
    with pytest.raises(UserError, match='it has 4 classes .*the model has 10 outputs: pass --num-classes'):
        datasets.match_classes(dataset, 10, 'it')
    with pytest.raises(UserError, match=r'the model has 10 outputs\. '):
        datasets.match_classes(dataset, 10, 'it', asked=True)


@pytest.mark.parametrize('kind', ['', 'torch/image_folder', 'csv', 'npz', 'tar'])
def test_classes_are_matched_by_name(folder_dir, npz_dir, tmp_path, kind):
    """Whatever order a data set has them in, an image of a red folder is the model's red."""
    root, split = str(folder_dir), 'val'
    if kind == 'csv':
        files = sorted((folder_dir / 'val').rglob('*.png'))
        rows = ''.join(f'{f},{f.parent.name}\n' for f in files)
        (tmp_path / 'val.csv').write_text('path,label\n' + rows)
        root = str(tmp_path)
    elif kind == 'npz':
        root, split = str(npz_dir), 'test'
    elif kind == 'tar':
        with tarfile.open(tmp_path / 'val.tar', 'w') as archive:
            for f in sorted((folder_dir / 'val').rglob('*.png')):
                archive.add(f, f.relative_to(folder_dir / 'val'))
        root = str(tmp_path)
    dataset = datasets.open_dataset('' if kind == 'tar' else kind, root, split, strict=True)
    names = ['other', 'gray', 'red', 'blue', 'green']  # of the model: more, and in no order
    datasets.match_classes(dataset, 5, 'it', names)
    seen = set()
    for i in range(len(dataset)):
        image, label = dataset[i]
        pixels = np.asarray(image).mean((0, 1))
        want = names.index('gray' if np.ptp(pixels) < 40 else ('red', 'green', 'blue')[pixels.argmax()])
        assert label == want
        seen.add(label)
    assert seen == {1, 2, 3, 4}


def test_classes_that_the_model_lacks_are_named(tmp_path):
    root = make_folders(tmp_path, train=('abacus', 'barrel', 'bighorn'), val=('barrel', 'bighorn', 'goose'))
    train = datasets.open_dataset('', root, 'train')
    val = datasets.open_dataset('', root, 'val', strict=True)
    with pytest.raises(UserError, match=r'val has classes that train lacks: goose \(train has abacus, barrel, bighorn'):
        datasets.match_classes(val, 3, 'val', datasets.class_names(train), of='train')
    names = ['barrel', 'barrel', 'bighorn', 'goose']
    with pytest.raises(UserError, match=r'several classes of one name \(barrel\)'):
        datasets.match_classes(val, 4, 'val', names, of='the model')


def test_a_class_map_is_taken_at_its_word(tmp_path, npz_dir):
    root = make_folders(tmp_path, val=('cat', 'dog', 'tabby'))
    (tmp_path / 'map.json').write_text('{"cat": 5, "dog": 2, "tabby": 5, "horse": 0}')
    dataset = datasets.open_dataset('', root, 'val', class_map=str(tmp_path / 'map.json'))
    assert datasets.class_names(dataset) == ['horse', '', 'dog', '', '', 'cat, tabby']
    datasets.match_classes(dataset, 10, 'it', ['names of a model', 'in another language'])
    assert [dataset[i][1] for i in range(3)] == [5, 2, 5]
    with pytest.raises(UserError, match='--class-map has indices up to 5, the model has 5 outputs'):
        datasets.match_classes(dataset, 5, 'it')
    (tmp_path / 'map.txt').write_text('tabby\ndog\n')
    with pytest.raises(UserError, match=r'val\) has classes that .*map.txt lacks: cat'):
        datasets.open_dataset('', root, 'val', class_map=str(tmp_path / 'map.txt'))
    (tmp_path / 'map.txt').write_text('gray\nblue\ngreen\nred\n')
    npz = datasets.open_dataset('npz', str(npz_dir), 'test', class_map=str(tmp_path / 'map.txt'), cache_images=True)
    assert [npz[i][1] for i in range(4)] == [3, 2, 1, 0]  # npz files have a map too
    assert npz.targets().tolist() == [npz[i][1] for i in range(50)]


@pytest.mark.parametrize('name, text', [
    ('a.json', '{"cat": -1}'), ('a.json', '{"cat": 1.5}'), ('a.json', '{"cat": 4611686018427387904}'),
    ('a.json', '{"cat": true}'), ('a.json', '7'), ('a.json', '["cat", 3]'), ('a.json', '['), ('a.txt', ''),
    ('a.txt', 'cat\ncat'), ('a.json', '[' * 100_000)])
def test_wrong_class_maps(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f'{name}(: a class comes twice| is no class map)'):
        datasets.read_class_map(str(tmp_path / name))


def test_descriptions_of_classes(npz_dir, tmp_path):
    with np.load(npz_dir / 'test.npz') as npz:
        arrays = dict(npz)
    shown = [f'the colour {c}' for c in CLASSES]
    np.savez(tmp_path / 'test.npz', **arrays, class_names=np.array(shown), format=np.array(1))
    dataset = datasets.open_dataset('npz', str(tmp_path), 'test')
    assert datasets.class_descriptions(dataset) == dict(zip(CLASSES, shown))
    np.savez(tmp_path / 'test.npz', **arrays, format=np.array(2))
    with pytest.raises(UserError, match='test.npz has format 2, this tool reads 1'):
        datasets.open_dataset('npz', str(tmp_path), 'test')
    np.savez(tmp_path / 'test.npz', **arrays, class_names=np.array(shown[:3]))
    with pytest.raises(UserError, match='class_names must be a vector of texts, as many as classes'):
        datasets.open_dataset('npz', str(tmp_path), 'test')


# -------------------------------------------------------------------------------------------------------------- splits

def test_a_split_is_what_its_name_says(tmp_path):
    root = make_folders(tmp_path, train=('a', 'b'), val=('a', 'b'))
    for name in ('', 'torch/image_folder'):
        for split in ('val', 'validation', 'eval'):
            assert len(datasets.open_dataset(name, root, split)) == 2
        for split in ('test', 'tran', 'vall'):
            with pytest.raises(UserError, match=f'{tmp_path} has no split {split}; it has train, val'):
                datasets.open_dataset(name, root, split)
        with pytest.raises(UserError, match='parts of a split are for npz, csv and torch/'):
            datasets.open_dataset(name, root, 'train[:1]')
        assert len(datasets.open_dataset(name, os.path.join(root, 'val'), '.')) == 2
    (tmp_path / 'val').rename(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='has no split validation or val or valid .*; it has elsewhere, train'):
        datasets.open_dataset('', root, 'validation')
    with pytest.raises(UserError, match="torch/cifar10 has no split 'tset': train or test"):
        datasets.open_dataset('torch/cifar10', root, 'tset')
    (tmp_path / 'all.tar').write_bytes(b'')
    with pytest.raises(UserError, match='all.tar is no folder, so it has no split val: pass . as the split'):
        datasets.open_dataset('', str(tmp_path / 'all.tar'), 'val')


def test_what_a_folder_must_not_hold(tmp_path, monkeypatch):
    root = make_folders(tmp_path, train=('a', 'b', '.hidden'))
    assert datasets.class_names(datasets.open_dataset('', root, 'train')) == ['a', 'b']
    scandir = os.scandir

    def unreadable(path):
        if os.path.basename(path) == 'b':
            raise PermissionError(13, 'Permission denied')  # root, as which tests may run, can read any folder
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'scandir', unreadable)
        with pytest.raises(UserError, match='cannot read the folder .*/train/b: Permission denied'):
            datasets.open_dataset('', root, 'train')
    (tmp_path / 'train' / 'c').mkdir()
    with pytest.raises(UserError, match='the folder .*/train/c holds no image'):
        datasets.open_dataset('', root, 'train')
    os.mkfifo(tmp_path / 'train' / 'c' / 'pipe.jpg')
    with pytest.raises(UserError, match='pipe.jpg is no regular file'):
        datasets.open_dataset('', root, 'train')
    (tmp_path / 'train' / 'c' / 'pipe.jpg').unlink()
    (tmp_path / 'train' / 'c' / 'loop').symlink_to(tmp_path / 'train')
    with pytest.raises(UserError, match='loop is a link to a folder that it is in'):
        datasets.open_dataset('', root, 'train')
    (tmp_path / 'train' / 'c' / 'loop').unlink()
    (tmp_path / 'train' / 'c').rmdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'train' / 'loose.png')
    with pytest.raises(UserError, match='loose.png is an image outside of class folders'):
        datasets.open_dataset('', root, 'train')


@pytest.mark.parametrize('text, message', [
    ('file,label\na.png,x\n', 'must have columns path and label, it has file, label'),
    ('path,label\na.png,\n', 'line 2: a path and a label are needed'),
    ('path,label\nb.png,x\n', 'lists .*b.png, which is no file'),
    ('path,label\n', 'holds no image'), ('', 'must have columns'),
    ('path,label\n"\xe9', 'cannot read|a path and a label')])
def test_wrong_csv(tmp_path, text, message):
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    (tmp_path / 'train.csv').write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError, match=message) as error:
        datasets.open_dataset('csv', str(tmp_path), 'train')
    assert 'train.csv' in str(error.value)


def test_parts_of_a_csv_have_the_classes_of_the_whole(tmp_path):
    root = make_folders(tmp_path, images=('10', '9', 'b', 'a'))
    (tmp_path / 'train.csv').write_text('\ufeffpath,label,note\n' + ''.join(f'images/{c}/0.png,{c},x\n' for c in (
        '10', 'b', '9', 'a')), encoding='utf-8')
    part = datasets.open_dataset('csv', root, 'train[2:]')
    assert datasets.class_names(part) == ['9', '10', 'a', 'b'] and [part[i][1] for i in range(len(part))] == [0, 2]
    with pytest.raises(UserError, match='val.csv does not exist; splits there: train'):
        datasets.open_dataset('csv', root, 'val')


def test_loader_processes_do_not_keep_a_program_from_ending(npz_dir):
    """Though somebody still holds them: they ignore the signal by which Python would end them, and wait for it."""
    script = f'''
import sys
sys.path.insert(0, {os.path.dirname(data.__file__)!r})
import torch, timm, _data, _datasets
dataset = _datasets.open_dataset('npz', {str(npz_dir)!r}, 'test')
config = timm.data.resolve_data_config(model=timm.create_model('test_vit'))
batches = iter(_data.eval_loader(dataset, config, batch_size=1, device=torch.device('cpu'), workers=2))
next(batches)
sys.modules['holder'] = batches
'''
    result = subprocess.run([sys.executable, '-c', script], env=tool_environment(), capture_output=True, text=True,
                            timeout=600)  # where it hangs, it does so for good
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------------- costs, bad images

def test_an_npz_is_judged_before_it_is_read(tmp_path, monkeypatch):
    """A few kilobytes that would unpack to gigabytes are refused by what the file says about itself."""
    rng = np.random.default_rng(0)
    files = [jpeg(colored_image(y, rng)) for y in range(4)]
    monkeypatch.setattr(_images, '_SMALL', 1 << 20)  # 64 MiB take seconds to write
    write_npz(tmp_path / 'bomb.npz', files, range(4), override=dict(data=np.zeros(5 << 20, np.uint8)))
    assert (tmp_path / 'bomb.npz').stat().st_size < 10_000
    write_npz(tmp_path / 'large.npz', files, range(4))
    monkeypatch.setattr(np, 'load', lambda *args, **kwargs: pytest.fail('it was read'))
    with pytest.raises(UserError, match=r'bomb.npz: data unpacks from [\d,]+ to 5,24\d,\d+ bytes, .*: refused'):
        datasets.open_dataset('npz', str(tmp_path), 'bomb')
    monkeypatch.setattr(_images, 'physical_memory', lambda: 1000)
    with pytest.raises(UserError, match='large.npz takes 0.0 GB, the machine has 0.0 GB of memory'):
        datasets.open_dataset('npz', str(tmp_path), 'large')


@pytest.mark.parametrize('kind', ['folder', 'npz', 'torch/image_folder'])
@pytest.mark.parametrize('size, message', [((1, 1500), '1 x 1500 pixels, the limit is 200 times'),
                                           ((60, 50), 'exceeds limit of 2000 pixels')])
def test_images_that_would_fill_the_memory(tmp_path, kind, size, message, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    file = io.BytesIO()
    Image.new('1', size).save(file, 'PNG')
    if kind == 'npz':
        write_npz(tmp_path / 'val.npz', [file.getvalue()], [0])
    else:
        (tmp_path / 'val' / 'a').mkdir(parents=True)
        (tmp_path / 'val' / 'a' / 'huge.png').write_bytes(file.getvalue())
    dataset = datasets.open_dataset('' if kind == 'folder' else kind, str(tmp_path), 'val', strict=True)
    with pytest.raises(UserError, match=message):
        dataset[0]


def test_unreadable_training_images_are_named_and_ten_in_a_row_stop(tmp_path, caplog):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    whole = jpeg(colored_image(0, np.random.default_rng(0)))
    for i in range(30):
        (tmp_path / 'train' / 'a' / f'{i:02d}.jpg').write_bytes(whole[:300] if i in (3, *range(10, 20)) else whole)
    for name in ('', 'torch/image_folder'):
        train = datasets.open_dataset(name, str(tmp_path), 'train')
        caplog.clear()
        assert train[3][0].size == (32, 32)
        assert [m for m in caplog.messages if 'a/03.jpg' in m and 'the next one is taken' in m]
        with pytest.raises(UserError, match='10 training images in a row cannot be read: .*a/10.jpg, .*a/19.jpg'):
            train[10]


def test_labels_that_are_no_class_are_named(tmp_path):
    rng = np.random.default_rng(0)
    files = [jpeg(colored_image(y, rng)) for y in range(4)]
    for name, labels, message in (('negative', [0, 1, -1, 3], 'label -1, labels count from 0'),
                                  ('huge', [0, 1, 2, 2 ** 62], 'labels run from 0 to 4611686018427387904')):
        write_npz(tmp_path / f'{name}.npz', files, range(4), override=dict(labels=np.array(labels), classes=None))
        with pytest.raises(UserError, match=message):
            datasets.match_classes(datasets.open_dataset('npz', str(tmp_path), name), 4, 'it')
    with pytest.raises(UserError, match='label 4, but there are 4 classes'):
        datasets.Labels(None, 4)(4)


# ---------------------------------------------------------------------------------------------------- training batches

def train_batches(npz_dir, *, workers=0, epoch=0, start=0, batch_size=16, rank=0, world_size=1, seed=7):
    dataset = datasets.open_dataset('npz', str(npz_dir), 'train')
    transform = data.train_transform((3, 32, 32), crop_mode='pad', crop_padding=4, interpolation='random', hflip=0.5,
                                     auto_augment='rand-m9-mstd0.5-inc1', **STATS)
    loader, sampler = data.train_loader(dataset, batch_size=batch_size, transform=transform, channels=3, seed=seed,
                                        device=torch.device('cpu'), workers=workers, rank=rank, world_size=world_size,
                                        **STATS)
    sampler.set_position(epoch, start)
    return [(x.clone(), y.clone()) for x, y in loader]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b))


def test_batches_do_not_depend_on_workers_or_on_the_start(npz_dir):
    whole = train_batches(npz_dir)
    assert len(whole) == 10 and whole[0][0].shape == (16, 3, 32, 32) and whole[0][0].dtype == torch.float32
    torch.manual_seed(1234)  # nor on the state of the global generators
    np.random.seed(1234)
    assert same(whole, train_batches(npz_dir, workers=2))
    assert same(whole[7:], train_batches(npz_dir, start=7))
    assert same(whole[7:], train_batches(npz_dir, start=7, workers=1))
    assert not same(whole, train_batches(npz_dir, epoch=1))
    assert not same(whole, train_batches(npz_dir, seed=8))


def test_processes_share_the_batches_of_one(npz_dir):
    whole = train_batches(npz_dir, epoch=3, batch_size=16)
    parts = [train_batches(npz_dir, epoch=3, batch_size=8, rank=r, world_size=2) for r in range(2)]
    assert [len(p) for p in parts] == [10, 10]
    for b, (x, y) in enumerate(whole):
        for r in range(2):
            assert torch.equal(x[r::2], parts[r][b][0]) and torch.equal(y[r::2], parts[r][b][1])


def test_an_epoch_shows_every_image_once():
    sampler = data.EpochBatches(103, 10, seed=3)
    for epoch in range(3):
        sampler.set_position(epoch)
        seen = [key.index for batch in sampler for key in batch]
        assert len(seen) == 100 and len(set(seen)) == 100 and max(seen) < 103
    assert len(sampler) == 10


def test_pad_crop_shifts_the_image_and_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(1, 256, (32, 32, 3)).astype(np.uint8)
    transform = data.train_transform((3, 32, 32), crop_mode='pad', crop_padding=4, interpolation='bicubic', hflip=0.,
                                     color_jitter=None, **STATS)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[y:y + 32, x:x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    seen = set()
    for seed in range(40):
        data.seed_everything(seed)
        out = transform(Image.fromarray(pixels))
        assert out.dtype == torch.uint8
        seen.add(windows[out.permute(1, 2, 0).numpy().tobytes()])  # a KeyError is not a shifted copy
    assert len(seen) > 20


@pytest.mark.parametrize('policy', ['rand-m10-inc1', 'rand-m10', 'original', 'v0', 'augmix-m10-w3'])
def test_augmentation_policies_run_at_full_magnitude(policy):
    # timm asks Pillow to keep 0 bits there, which Pillow 13 refuses
    transform = data.train_transform((3, 32, 32), crop_mode='pad', crop_padding=4, interpolation='bicubic',
                                     auto_augment=policy, **STATS)
    image = colored_image(0, np.random.default_rng(0))
    names = {op.name for op in data._augment_ops(transform)}
    for seed in range(150):
        data.seed_everything(seed)
        assert transform(image).shape == (3, 32, 32)
    assert any(name.startswith('Posterize') for name in names)


def test_posterize_keeps_upper_bits():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for bits in (0, 1, 4, 8, 9):
        want = np.arange(256) & ~((1 << 8 - min(bits, 8)) - 1)
        assert np.array_equal(np.asarray(data._posterize(image, bits)).ravel(), want)


# ------------------------------------------------------------------------------------------------------------- recipes

def test_recipes_parse(root):
    recipes = sorted(r for r in (root / 'tools' / 'recipes').glob('*.yaml') if r.stem != 'forecast')  # not of train.py
    assert {r.stem for r in recipes} >= {'imagenet_vim2', 'cifar10_nano'}
    for recipe in recipes:
        args, checkpoint = train.parse_args(['--config', str(recipe), '--data-dir', 'x'])
        assert checkpoint is None and args.data_dir == 'x'
        common.register_models()
        assert timm.is_model(args.model), recipe
        for key, value in yaml.safe_load(recipe.read_text()).items():
            assert getattr(args, key) in (value, [value]), (recipe, key)


def test_imagenet_recipe_is_the_papers(root):
    args, _ = train.parse_args(['--config', str(root / 'tools' / 'recipes' / 'imagenet_vim2.yaml'), '--lr', '2e-3'])
    assert (args.epochs, args.warmup_epochs, args.batch_size * 8, args.opt) == (300, 20, 1024, 'adamw')
    assert args.opt_betas[0] == 0.9 and args.weight_decay == 0.05 and args.sched == 'cosine'
    assert args.lr == 2e-3  # the command line wins
    swin = dict(aa='rand-m9-mstd0.5-inc1', mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.25, remode='pixel',
                color_jitter=0.4, train_interpolation='bicubic', clip_grad=5.0)
    assert {k: getattr(args, k) for k in swin} == swin


@pytest.mark.parametrize('text, message', [
    ('learning_rate: 1', "unknown option 'learning_rate'"),
    ('batchsize: 1', "did you mean 'batch_size'"),
    ('lr: fast', 'lr: could not convert'),
    ('epochs: 1.5', 'epochs: invalid literal'),
    ('amp: 1', 'amp: expected true or false'),
    ('opt: [adamw]', 'opt: expected one value'),
    ('opt: 5', 'opt: expected text'),
    ('model_kwargs: 5', 'model_kwargs: expected a mapping'),
    ('remode: sparkle', "'sparkle' is not one of const, rand, pixel"),
    ('scale: [1]', 'scale: expected 2 values'),
    ('- a\n- b', 'expected a mapping'),
    ('a: [', 'is not a YAML file'),
    ('a: &x [1]\nb: *x', 'line 2 has an alias'),
    ('a: ' + '[' * 5000, 'is not a YAML file'),
    ('a: 2026-99-99', 'is not a YAML file'),
    ('#' * (1 << 20) + '\n', 'is no recipe: larger than 1 MiB'),
    ('batch_size: 0', '--batch-size must be at least 1'),
    ('drop_path: 1.5', '--drop-path must be between 0 and 1'),
])
def test_wrong_recipe(tmp_path, text, message):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(text)
    with pytest.raises(UserError, match=message):
        train.parse_args(['--config', str(recipe)])


def test_nested_aliases_of_a_recipe_cost_nothing(tmp_path):
    """465 bytes that stand for 10^9 values: refused where the first one stands for another."""
    lines = ['a0: &a0 [x, x, x, x, x, x, x, x, x, x]'] + [
        f'a{i}: &a{i} [' + ', '.join([f'*a{i - 1}'] * 10) + ']' for i in range(1, 9)]
    (tmp_path / 'bomb.yaml').write_text('\n'.join(lines))
    with pytest.raises(UserError, match='bomb.yaml is not a YAML file: line 2 has an alias'):
        common.read_recipe(str(tmp_path / 'bomb.yaml'))


def test_recipe_values_are_converted_and_can_be_taken_back(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('lr: 1e-3\nwarmup_epochs: 2\namp: true\nimg-size: 64\nmodel_kwargs: {depth: 3}\ndrop: null\n')
    args, _ = train.parse_args(['--config', str(recipe)])
    assert (args.lr, args.warmup_epochs, args.amp, args.img_size, args.model_kwargs, args.drop) == (
        1e-3, 2.0, True, [64], {'depth': 3}, None)  # YAML reads 1e-3 as text
    more = ['--no-amp', '--model-kwargs', 'a=1', 'b=x', '--img-size', '8', '9']
    args, _ = train.parse_args(['--config', str(recipe), *more])
    assert (args.amp, args.model_kwargs, args.img_size) == (False, {'a': 1, 'b': 'x'}, [8, 9])
    with pytest.raises(UserError, match='cannot read the recipe'):
        train.parse_args(['--config', str(tmp_path / 'none.yaml')])


# ------------------------------------------------------------------------------------------------------------ plumbing

def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match='cannot write /dev/full: No space left on device'):
        common.write_text('/dev/full', 'x')
    with pytest.raises(UserError, match=f'cannot write {tmp_path}: Is a directory'):
        common.write_text(tmp_path, 'x')
    with pytest.raises(UserError, match='cannot write /proc/none: '):
        common.write_torch('/proc/none', {})


@pytest.mark.parametrize('seconds, text', [(0, '0:00'), (61.4, '1:01'), (3600, '1:00:00'), (359999, '99:59:59')])
def test_duration(seconds, text):
    assert common.duration(seconds) == text
