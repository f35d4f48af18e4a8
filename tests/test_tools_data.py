"""tools/_data.py and the recipes: what training and validation read."""
import io

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import CLASSES, colored_image, jpeg, write_npz
from PIL import Image

import _common as common
import _data as data
import train
from _common import UserError

STATS = dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


# --------------------------------------------------------------------------------------------------------------- npz

def test_npz_holds_the_images_that_were_written(tmp_path):
    rng = np.random.default_rng(0)
    labels = [2, 0, 3, 1, 1]
    files = [jpeg(colored_image(y, rng, size=(20 + i, 16))) for i, y in enumerate(labels)]
    write_npz(tmp_path / 'train.npz', files, labels)
    dataset = data.open_dataset('npz', str(tmp_path), 'train')
    assert len(dataset) == 5 and dataset.classes == list(CLASSES) == data.class_names(dataset)
    for i, file in enumerate(files):
        image, label = dataset[i]
        assert label == labels[i]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(file)).convert('RGB')))
    assert dataset.filename(0) == 'blue/0000.jpg' and dataset.filename(0, basename=True) == '0000.jpg'


@pytest.mark.parametrize('split, indices', [
    ('train[:3]', range(3)), ('train[3:]', range(3, 160)), ('train[10:12]', range(10, 12)), ('train[:]', range(160))])
def test_npz_part_of_a_split(npz_dir, split, indices):
    whole, part = (data.open_dataset('npz', str(npz_dir), s) for s in ('train', split))
    assert len(part) == len(indices)
    for row, i in list(enumerate(indices))[:4]:
        assert np.array_equal(np.asarray(part[row][0]), np.asarray(whole[i][0])) and part[row][1] == whole[i][1]
        assert part.filename(row) == whole.filename(i)


@pytest.mark.parametrize('split', ['train', 'train[5:30]'])
def test_npz_cache_gives_the_same_images(npz_dir, split):
    plain = data.open_dataset('npz', str(npz_dir), split)
    cached = data.open_dataset('npz', str(npz_dir), split, cache_images=True)
    assert cached.data is None and cached.cache.dtype == np.uint8
    for i in (0, 7, len(plain) - 1):
        assert np.array_equal(np.asarray(plain[i][0]), np.asarray(cached[i][0])) and plain[i][1] == cached[i][1]


@pytest.mark.parametrize('extra, message', [
    (dict(labels=None), 'no array labels'),
    (dict(names=np.array([{'a': 1}] * 4, dtype=object)), 'Object arrays cannot be loaded'),
    (dict(offsets=np.array([0, 10, 5, 20, 30])), 'offsets must increase'),
    (dict(offsets=np.array([0, 1, 2, 3, 10 ** 9])), 'offsets must increase and stay within'),
    (dict(offsets=np.array([0, 1, 2])), 'offsets must be'),
    (dict(data=np.zeros(9, np.float32)), 'data must be'),
    (dict(labels=np.array([0, 1, 2, 4])), 'label 4 but only 4 classes'),
    (dict(labels=np.array([0., 1, 2, 3])), 'labels must be'),
    (dict(names=np.array(['a'])), '1 names for 4 labels'),
])
def test_npz_with_wrong_arrays(tmp_path, extra, message):
    rng = np.random.default_rng(0)
    write_npz(tmp_path / 'train.npz', [jpeg(colored_image(y, rng)) for y in range(4)], range(4), override=extra)
    with pytest.raises(UserError, match=message) as error:
        data.open_dataset('npz', str(tmp_path), 'train')
    assert 'train.npz' in str(error.value)


def test_npz_damaged_file(npz_dir, tmp_path):
    whole = (npz_dir / 'train.npz').read_bytes()
    for name, content in (('truncated', whole[:len(whole) // 2]), ('empty', b''), ('text', b'no archive')):
        (tmp_path / f'{name}.npz').write_bytes(content)
        with pytest.raises(UserError, match=f'cannot read .*{name}.npz'):
            data.open_dataset('npz', str(tmp_path), name)


def test_npz_missing(npz_dir, tmp_path):
    with pytest.raises(UserError, match='val.npz does not exist; splits there: test, train'):
        data.open_dataset('npz', str(npz_dir), 'val')
    with pytest.raises(UserError, match='no .npz file in'):
        data.open_dataset('npz', str(tmp_path), 'train')
    with pytest.raises(UserError, match='/nowhere/at/all does not exist'):
        data.open_dataset('npz', '/nowhere/at/all', 'train')
    with pytest.raises(UserError, match='pass --data-dir'):
        data.open_dataset('npz', None, 'train')
    with pytest.raises(UserError, match='holds no image'):
        data.open_dataset('npz', str(npz_dir), 'train[160:]')
    with pytest.raises(UserError, match='expected a name'):
        data.open_dataset('npz', str(npz_dir), '../train')


@pytest.fixture
def corrupt_npz(tmp_path):
    rng = np.random.default_rng(0)
    files = [jpeg(colored_image(y % 4, rng)) for y in range(8)]
    files[5] = files[5][:200]
    write_npz(tmp_path / 'train.npz', files, np.arange(8) % 4)
    return tmp_path


@pytest.mark.parametrize('workers', [0, 2])
def test_npz_corrupt_image_is_named(corrupt_npz, workers):
    dataset = data.open_dataset('npz', str(corrupt_npz), 'train')
    assert dataset[4][1] == 0  # the others can be read
    config = dict(input_size=(3, 32, 32), interpolation='bicubic', crop_pct=1., crop_mode='center', **STATS)
    loader = data.eval_loader(dataset, config, batch_size=2, device=torch.device('cpu'), workers=workers)
    with pytest.raises(UserError, match=r'cannot decode image 5 \(green/0005.jpg\)'):
        list(loader)
    with pytest.raises(UserError, match=r'cannot decode image 5 \(green/0005.jpg\)'):
        data.open_dataset('npz', str(corrupt_npz), 'train', cache_images=True)


def test_npz_cache_needs_one_size(tmp_path):
    rng = np.random.default_rng(0)
    files = [jpeg(colored_image(0, rng, size=(32, 32))), jpeg(colored_image(1, rng, size=(32, 30)))]
    write_npz(tmp_path / 'train.npz', files, [0, 1])
    with pytest.raises(UserError, match=r'image 1 \(green/0001.jpg\) is 32x30, earlier ones are 32x32'):
        data.open_dataset('npz', str(tmp_path), 'train', cache_images=True)


def test_real_cifar10(shared_data):
    folder = shared_data('cifar10')
    for split, n in (('train', 50000), ('test', 10000)):
        dataset = data.open_dataset('npz', str(folder), split)
        assert len(dataset) == n and len(dataset.classes) == 10
        assert np.array_equal(np.bincount(dataset.labels), [n // 10] * 10)
        image, label = dataset[n - 1]
        assert image.size == (32, 32) and dataset.filename(n - 1).split('/')[0] == dataset.classes[label]


# ----------------------------------------------------------------------------------------------------- other data sets

def test_image_folder(folder_dir):
    dataset = data.open_dataset('', str(folder_dir), 'train')
    assert len(dataset) == 40 and data.class_names(dataset) == sorted(CLASSES)
    torchvision_way = data.open_dataset('torch/image_folder', str(folder_dir), 'train')
    assert len(torchvision_way) == 40 and data.class_names(torchvision_way) == sorted(CLASSES)


def test_unreadable_image_in_a_folder_is_an_error_where_it_would_be_counted(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        colored_image(0, np.random.default_rng(0)).save(tmp_path / name / 'good.png')
    (tmp_path / 'a' / 'bad.png').write_bytes(b'no picture')
    strict = data.open_dataset('', str(tmp_path), 'validation', strict=True)
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
        data.open_dataset(name, root, 'train')


def test_folder_without_images(tmp_path):
    with pytest.raises(UserError, match='Found 0 images'):
        data.open_dataset('', str(tmp_path), 'train')


def test_classes_must_be_the_models(folder_dir):
    dataset = data.open_dataset('', str(folder_dir), 'train')
    data.check_classes(dataset, 4, 'it')
    with pytest.raises(UserError, match='it has 4 classes .*the model has 10'):
        data.check_classes(dataset, 10, 'it')


# ---------------------------------------------------------------------------------------------------- training batches

def train_batches(npz_dir, *, workers=0, epoch=0, start=0, batch_size=16, rank=0, world_size=1, seed=7):
    dataset = data.open_dataset('npz', str(npz_dir), 'train')
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
    ('batch_size: 0', '--batch-size must be at least 1'),
    ('drop_path: 1.5', '--drop-path must be between 0 and 1'),
])
def test_wrong_recipe(tmp_path, text, message):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(text)
    with pytest.raises(UserError, match=message):
        train.parse_args(['--config', str(recipe)])


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
